"""Kernels: what the Array API standard lacks."""
