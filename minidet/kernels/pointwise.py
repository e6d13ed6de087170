"""The rectifier, sums with it, and their gradients: one pass over memory each, on all cores."""

from __future__ import annotations

import numpy as np

from minidet import backend
from minidet.kernels import cuda
from minidet.kernels.kernel import Kernel
from minidet.kernels.parallel import parallel
from minidet.kernels.precision import sums_in

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
def rectify_sum(a, b):
    """max(a + b, 0), element by element; a NaN stays a NaN.

    Shapes:
        a: any
        b: the shape of a
        returns: the shape of a
    """
    xp = backend.namespace(a)
    return xp.maximum(a + b, xp.zeros_like(a))


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


@Kernel
def scale_rows(x, scale):
    """scale[f] * x[f] for every f.

    Shapes:
        x: (F, ...)
        scale: (F,)
        returns: (F, ...)
    """
    xp = backend.namespace(x)
    return x * xp.reshape(scale, (-1, *(1,) * (x.ndim - 1)))


@Kernel
def column_sums(g):
    """The sum over all but the last axis.

    Shapes:
        g: (N, S, F)
        returns: (F,)
    """
    return backend.namespace(g).sum(g, axis=(0, 1))


@Kernel
def epilogue_gradient(gy, y, scale):
    """dL/ds and dL/dbias of y = max(scale * s + bias, 0): what ends a convolution.

    With g = gy where y > 0, else 0: dL/ds = g * scale, and dL/dbias sums g over all but the last axis.

    Shapes:
        gy: (N, S, F)
        y: (N, S, F)
        scale: (F,), or None for 1
        returns: (N, S, F), (F,)
    """
    xp = backend.namespace(gy)
    g = xp.where(y > 0, gy, xp.zeros_like(gy))
    return g if scale is None else g * scale, xp.sum(g, axis=(0, 1))


@rectify.faster_on("numpy", when=lambda first, *_: first.size > BLOCK)
def _rectify_numba(x):
    y = np.empty(x.shape, x.dtype)
    _rectify(-(-x.size // BLOCK), np.ascontiguousarray(x).reshape(-1), y.reshape(-1), x.dtype.type(0))
    return y


@rectify_sum.faster_on("numpy", when=lambda a, b: a.size > BLOCK and a.dtype == b.dtype)
def _rectify_sum_numba(a, b):
    y = np.empty(a.shape, a.dtype)
    flat_a, flat_b = (np.ascontiguousarray(x).reshape(-1) for x in (a, b))
    _rectify_sum(-(-a.size // BLOCK), flat_a, flat_b, y.reshape(-1), a.dtype.type(0))
    return y


@rectify_gradient.faster_on("numpy", when=lambda first, *_: first.size > BLOCK)
def _rectify_gradient_numba(gy, y):
    gx = np.empty(gy.shape, gy.dtype)
    flat_gy, flat_y = (np.ascontiguousarray(a).reshape(-1) for a in (gy, y))
    _rectify_gradient(-(-gy.size // BLOCK), flat_gy, flat_y, gx.reshape(-1), gy.dtype.type(0))
    return gx


@scale_rows.faster_on("numpy", when=lambda x, scale: x.size > BLOCK and x.dtype == scale.dtype)
def _scale_rows_numba(x, scale):
    y, rows = np.empty(x.shape, x.dtype), np.ascontiguousarray(x).reshape(len(x), -1)
    step = max(1, BLOCK // rows.shape[1])
    _scale_rows(-(-len(x) // step), rows, scale, y.reshape(rows.shape), step)
    return y


@column_sums.faster_on("numpy", when=lambda first, *_: first.size > BLOCK)
def _column_sums_numba(g):
    rows = np.ascontiguousarray(g).reshape(-1, g.shape[-1])
    sums = _partial_sums(rows)
    _column_sums(len(sums), rows, sums)
    return sums.sum(axis=0, dtype=np.float64).astype(g.dtype)


@epilogue_gradient.faster_on("numpy", when=lambda first, *_: first.size > BLOCK)
def _epilogue_gradient_numba(gy, y, scale):
    F, gs = gy.shape[-1], np.empty(gy.shape, gy.dtype)
    rows, y = (np.ascontiguousarray(a).reshape(-1, F) for a in (gy, y))
    scale, sums = np.ones(F, gy.dtype) if scale is None else scale.astype(gy.dtype), _partial_sums(rows)
    _epilogue_gradient(len(sums), rows, y, scale, gs.reshape(-1, F), sums, gy.dtype.type(0))
    return gs, sums.sum(axis=0, dtype=np.float64).astype(gy.dtype)


def _partial_sums(rows):
    """A zero for every column, for each block of rows: blocks, not threads, so the sum is the same for any
    number of threads."""
    count, F = rows.shape
    return np.zeros((-(-count // max(1, BLOCK // F)), F), rows.dtype)


# A loop over the whole length of a slice becomes vector instructions: its index is never negative, which of a
# loop between two bounds Numba does not know.


@parallel
def _rectify(block, x, y, zero):
    part, out = x[block * BLOCK : (block + 1) * BLOCK], y[block * BLOCK : (block + 1) * BLOCK]
    for i in range(len(part)):
        out[i] = zero if part[i] < zero else part[i]


@parallel
def _rectify_sum(block, a, b, y, zero):
    first, second = a[block * BLOCK : (block + 1) * BLOCK], b[block * BLOCK : (block + 1) * BLOCK]
    out = y[block * BLOCK : (block + 1) * BLOCK]
    for i in range(len(first)):
        total = first[i] + second[i]
        out[i] = zero if total < zero else total


@parallel
def _scale_rows(block, x, scale, y, step):
    for f in range(block * step, min((block + 1) * step, len(x))):
        row, out, factor = x[f], y[f], scale[f]
        for i in range(len(row)):
            out[i] = row[i] * factor


@parallel
def _rectify_gradient(block, gy, y, gx, zero):
    part, value = gy[block * BLOCK : (block + 1) * BLOCK], y[block * BLOCK : (block + 1) * BLOCK]
    out = gx[block * BLOCK : (block + 1) * BLOCK]
    for i in range(len(part)):
        out[i] = part[i] if value[i] > zero else zero


@parallel
def _column_sums(block, rows, sums):
    step = -(-len(rows) // len(sums))
    part, total = rows[block * step : (block + 1) * step], sums[block]
    for p in range(len(part)):
        for f in range(len(total)):
            total[f] += part[p, f]


@parallel
def _epilogue_gradient(block, gy, y, scale, gs, sums, zero):
    step = -(-len(gy) // len(sums))
    part, value = gy[block * step : (block + 1) * step], y[block * step : (block + 1) * step]
    out, total = gs[block * step : (block + 1) * step], sums[block]
    for p in range(len(part)):
        for f in range(len(total)):
            g = part[p, f] if value[p, f] > zero else zero
            out[p, f] = g * scale[f]
            total[f] += g


# On a GPU.


@rectify.faster_on("cupy", narrow=True)
def _rectify_cuda(x):
    return cuda.elementwise(__file__, "rectify", x)


@rectify_sum.faster_on("cupy", when=lambda a, b: a.dtype == b.dtype, narrow=True)
def _rectify_sum_cuda(a, b):
    return cuda.elementwise(__file__, "rectify_sum", a, b)


@rectify_gradient.faster_on("cupy", when=lambda gy, y: gy.dtype == y.dtype, narrow=True)
def _rectify_gradient_cuda(gy, y):
    return cuda.elementwise(__file__, "rectify_gradient", gy, y)


@column_sums.faster_on("cupy", narrow=True)
def _column_sums_cuda(g):
    return cuda.sum_columns(__file__, "column_sums", g, cuda.contiguous(g))


@epilogue_gradient.faster_on("cupy", when=lambda gy, y, scale: gy.dtype == y.dtype, narrow=True)
def _epilogue_gradient_cuda(gy, y, scale):
    xp, F = backend.namespace(gy), gy.shape[-1]
    gs = xp.empty(gy.shape, dtype=gy.dtype)
    scale = xp.ones(F, dtype=sums_in(gy)) if scale is None else xp.astype(scale, sums_in(gy))
    return gs, cuda.sum_columns(__file__, "epilogue_gradient", gy, *map(cuda.contiguous, (gy, y, scale)), gs)
