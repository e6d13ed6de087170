"""Convolution on NVIDIA GPUs: delete this folder and everything still works.

Read cuda.py (all that is asked of CuPy below the level of arrays), im2col.py, shift.py with shift.cu, implicit.py
with implicit.cu, and engine.py last: it says which of them runs when.
"""
