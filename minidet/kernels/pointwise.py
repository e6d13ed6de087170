"""The rectifier and its gradient: one pass over memory each, on all cores."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from minidet import backend
from minidet.kernels.kernel import Kernel

BLOCK = 1 << 14
"""Elements a thread takes at a time: 64 KiB of float32."""


@Kernel
def rectify(x):
    """max(x, 0), element by element; a NaN stays a NaN.

    Shapes:
        x: any
        returns: the shape of x
    """
    xp = backend.namespace(x)
    return xp.maximum(x, xp.zeros_like(x))


@Kernel
def rectify_gradient(gy, y):
    """dL/dx of y = max(x, 0), from y alone: gy where y > 0, else 0.

    Shapes:
        gy: any
        y: the shape of gy
        returns: the shape of gy
    """
    xp = backend.namespace(gy)
    return xp.where(y > 0, gy, xp.zeros_like(gy))


@rectify.faster_on("numpy", when=lambda x: x.size > BLOCK)
def _rectify_numba(x):
    y = np.empty(x.shape, x.dtype)
    _rectify(np.ascontiguousarray(x).reshape(-1), y.reshape(-1), x.dtype.type(0))
    return y


@rectify_gradient.faster_on("numpy", when=lambda gy, y: gy.size > BLOCK)
def _rectify_gradient_numba(gy, y):
    gx = np.empty(gy.shape, gy.dtype)
    flat_gy, flat_y = (np.ascontiguousarray(a).reshape(-1) for a in (gy, y))
    _rectify_gradient(flat_gy, flat_y, gx.reshape(-1), gy.dtype.type(0))
    return gx


@njit(parallel=True, cache=True)
def _rectify(x, y, zero):
    for block in prange(-(-x.size // BLOCK)):
        for i in range(block * BLOCK, min(x.size, (block + 1) * BLOCK)):
            y[i] = zero if x[i] < zero else x[i]


@njit(parallel=True, cache=True)
def _rectify_gradient(gy, y, gx, zero):
    for block in prange(-(-gy.size // BLOCK)):
        for i in range(block * BLOCK, min(gy.size, (block + 1) * BLOCK)):
            gx[i] = gy[i] if y[i] > zero else zero
