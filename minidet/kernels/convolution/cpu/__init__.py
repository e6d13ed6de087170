"""A fast float32 convolution for CPUs, written in Numba: delete this folder and everything still works.

Read lanes.py, then microkernel.py (the few lines of machine code everything else feeds), plan.py (the
geometry, as tables of pixel numbers), panels.py, direct.py, weight_gradient.py, stem.py, transform.py, filters.py,
winograd.py, winograd_gradient.py, and engine.py last: it says which of them runs when.
"""
