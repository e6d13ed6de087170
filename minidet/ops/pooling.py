"""Max pooling, and nearest-neighbour upsampling."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from minidet.autograd import Tensor, record
from minidet.backend import Array
from minidet.kernels import max_pool, max_pool_gradient
from minidet.kernels.convolution import geometry_of
from minidet.kernels.precision import widened


def max_pool2d(x: Tensor, size: int, *, stride: int | None = None, padding: int = 0) -> Tensor:
    """The largest element of every window; padding never wins.

    Shapes:
        x: (N, H, W, C)
        returns: (N, P, Q, C) with P = (H + 2*padding - size) // stride + 1, Q likewise
    Ties: the first maximum in row-major order of the window is the one that gets the gradient.
    Backward: dL/dx adds dL/dy at every window's maximum, and is 0 elsewhere.
    Raises:
        ValueError: if a window could lie in the padding alone, or none fits, or is larger than 16 x 16.
    """
    stride = size if stride is None else stride
    _, H, W, _ = x.shape
    if not 0 <= padding <= size // 2 or min(H, W) + 2 * padding < size:
        raise ValueError(f"max_pool2d: size {size} with padding {padding} does not suit a map of {(H, W)}")
    if size > 16:
        raise ValueError(f"max_pool2d: size {size}: a byte numbers the pixels of windows up to 16 x 16")
    y, winners = max_pool(x.data, size, stride, padding)

    def backward(gy):
        return (max_pool_gradient(gy, winners, H, W, size, stride, padding),)

    geometry = geometry_of(((H, W),), (size, size), (stride, stride), (padding, padding))
    return record("max_pool2d", y, (x,), backward, geometry=geometry, fresh=True)


def upsample_nearest(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Stretch a map to any size: y[n, p, q] = x[n, floor(p * H / P), floor(q * W / Q)].

    Shapes:
        x: (N, H, W, C)
        returns: (N, P, Q, C) with (P, Q) = size
    Rule: H / P is rounded to float32 before it is multiplied, as PyTorch does it.
    Backward: dL/dx sums dL/dy over the pixels that were copied from each.
    Source: Feature Pyramid Networks, arXiv:1612.03144, section 3 ("nearest neighbor upsampling").
    """
    xp, (N, H, W, C), (P, Q) = x.xp, x.shape, size
    rows, columns = _nearest(P, H, xp, x.data.device), _nearest(Q, W, xp, x.data.device)
    pixels = xp.reshape(rows[:, None] * W + columns, (-1,))
    y = xp.reshape(xp.take(xp.reshape(x.data, (N, H * W, C)), pixels, axis=1), (N, P, Q, C))

    def backward(gy):
        if _in_blocks(P, H) and _in_blocks(Q, W):
            down, right = P // H, Q // W
            parts = [gy[:, i::down, j::right, :] for i in range(down) for j in range(right)]
            gx = parts[0]
            for part in parts[1:]:
                gx = gx + part
            return (gx + 0 if len(parts) == 1 else gx,)
        # In general pixel p of y adds to pixel rows[p] of x: a product with a matrix of zeros and ones.  bfloat16 is
        # rounded at the end alone; CuPy has no product of it with more than two axes.
        wide = widened(gy)
        gx = _selection(rows, H, xp, wide) @ xp.reshape(wide, (N, P, Q * C))
        gx = _selection(columns, W, xp, wide) @ xp.reshape(gx, (N, H, Q, C))
        return (xp.astype(gx, gy.dtype, copy=False),)

    return record("upsample_nearest", y, (x,), backward, fresh=True)


@lru_cache(maxsize=256)
def _in_blocks(new: int, old: int) -> bool:
    """Whether each old position is copied new / old times: of two made into 82, rounding copies one 42 times."""
    return new % old == 0 and np.array_equal(_nearest(new, old, np, "cpu"), np.arange(new) // (new // old))


def _nearest(new: int, old: int, xp, device) -> Array:
    """The old position that each new one copies."""
    places = xp.arange(new, dtype=xp.float32, device=device) * float(np.float32(old / new))
    return xp.astype(xp.minimum(xp.floor(places), xp.full_like(places, old - 1)), xp.int64)


def _selection(source: Array, count: int, xp, like: Array) -> Array:
    """The (count, new) matrix with a 1 where new position j copies old position i."""
    matrix = source[None, :] == xp.arange(count, dtype=source.dtype, device=like.device)[:, None]
    return xp.astype(matrix, like.dtype)
