"""bfloat16: where it is rounded to, and what stays float32."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from minidet import backend
from minidet.backend import Array

PRECISIONS = ("float32", "bfloat16")
"""In what a network may compute.  bfloat16 is float32 without the last 16 bits: its range, and 8 bits of fraction."""


def bfloat16(xp):
    """The dtype bfloat16 of a namespace.

    Raises:
        RuntimeError: if the library has none, or the package that defines it is missing.
    """
    if backend.name_of(xp) == "array_api_strict":
        raise RuntimeError("bfloat16 is not in the Array API standard: array_api_strict computes in float32")
    try:
        return np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    except ImportError as error:
        raise RuntimeError("bfloat16 needs a package: pip install ml_dtypes") from error


def is_bfloat16(x: Array) -> bool:
    """Whether the array holds bfloat16, which NumPy and CuPy know as an extension of kind "V"."""
    return getattr(getattr(x, "dtype", None), "kind", "") == "V"


def widened(x: Any) -> Any:
    """bfloat16 as float32, which holds every one of its numbers; all else as it is."""
    return backend.namespace(x).astype(x, np.float32) if is_bfloat16(x) else x


def sums_in(x: Array):
    """The dtype for sums over `x`, and for what is computed from them: float32 of bfloat16, else its own."""
    return np.dtype(np.float32) if is_bfloat16(x) else x.dtype


def rounded_once(kernel: Callable, args: tuple):
    """What a kernel gives for bfloat16, where no version is made for it: computed in float32, and rounded once.

    Sums over maps (the gradients of weights and biases) stay float32, which parameters are: they are told by
    their number of axes, which is not the first argument's.
    """
    xp, axes, dtype = backend.namespace(args[0]), args[0].ndim, args[0].dtype
    results = kernel(*map(widened, args))

    def rounded(y):
        return xp.astype(y, dtype) if y.ndim == axes and y.dtype == xp.float32 else y

    return tuple(map(rounded, results)) if isinstance(results, tuple) else rounded(results)
