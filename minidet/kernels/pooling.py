"""Max pooling: the values, who won, and the way back."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from minidet import backend
from minidet.kernels.kernel import Kernel
from minidet.kernels.windows import every, output_size


@Kernel
def max_pool(x, size: int, stride: int, padding: int):
    """The largest element of every window, and which of its size*size taps that was.

    Shapes:
        x: (N, H, W, C)
        returns: values (N, P, Q, C) and winners (N, P, Q, C) as uint8, row-major tap numbers
    Ties: the first tap wins.  A NaN wins over everything, so it is never lost.
    """
    xp = backend.namespace(x)
    N, H, W, C = x.shape
    P, Q = (output_size(n + 2 * padding, size, stride, 1) for n in (H, W))
    padded = xp.full(
        (N, H + 2 * padding, W + 2 * padding, C), -float("inf"), dtype=x.dtype, device=x.device
    )
    padded[:, padding : padding + H, padding : padding + W, :] = x
    best = padded[:, every(0, stride, P), every(0, stride, Q), :] + 0
    winners = xp.zeros((N, P, Q, C), dtype=xp.uint8, device=x.device)
    for tap in range(1, size * size):
        i, j = divmod(tap, size)
        candidate = padded[:, every(i, stride, P), every(j, stride, Q), :]
        better = (candidate > best) | (xp.isnan(candidate) & ~xp.isnan(best))
        best = xp.where(better, candidate, best)
        winners = xp.where(better, xp.asarray(tap, dtype=xp.uint8, device=x.device), winners)
    return best, winners


@Kernel
def max_pool_gradient(gy, winners, height: int, width: int, size: int, stride: int, padding: int):
    """dL/dx of `max_pool`: every window hands its gradient to its winner.

    Shapes:
        gy: (N, P, Q, C)
        winners: (N, P, Q, C)
        returns: (N, height, width, C)
    """
    xp = backend.namespace(gy)
    N, P, Q, C = gy.shape
    padded = xp.zeros((N, height + 2 * padding, width + 2 * padding, C), dtype=gy.dtype, device=gy.device)
    zero = xp.zeros_like(gy)
    for tap in range(size * size):
        i, j = divmod(tap, size)
        won = winners == xp.asarray(tap, dtype=xp.uint8, device=gy.device)
        padded[:, every(i, stride, P), every(j, stride, Q), :] += xp.where(won, gy, zero)
    return padded[:, padding : padding + height, padding : padding + width, :]


@max_pool.faster_on("numpy")
def _max_pool_numba(x, size: int, stride: int, padding: int):
    N, H, W, C = x.shape
    P, Q = (output_size(n + 2 * padding, size, stride, 1) for n in (H, W))
    best, winners = np.empty((N, P, Q, C), x.dtype), np.empty((N, P, Q, C), np.uint8)
    _max_pool(np.ascontiguousarray(x), size, stride, padding, best, winners)
    return best, winners


@max_pool_gradient.faster_on("numpy")
def _max_pool_gradient_numba(gy, winners, height: int, width: int, size: int, stride: int, padding: int):
    gx = np.zeros((gy.shape[0], height, width, gy.shape[3]), gy.dtype)
    _max_pool_gradient(np.ascontiguousarray(gy), winners, size, stride, padding, gx)
    return gx


@njit(parallel=True, cache=True)
def _max_pool(x, size, stride, padding, best, winners):
    N, P = best.shape[:2]
    for row in prange(N * P):
        n, p = row // P, row % P
        _max_pool_row(x[n], p * stride - padding, size, stride, padding, best[n, p], winners[n, p])


# The loops over channels store choices instead of branching, and number the winners in the width of the
# values, so that they become vector instructions.


@njit(cache=True)
def _max_pool_row(x, top, size, stride, padding, best, winners):
    H, W, C = x.shape
    high, who = np.empty(C, x.dtype), np.empty(C, np.int32)
    for q in range(len(best)):
        high[:] = -np.inf
        who[:] = 0
        for tap in range(size * size):
            h, w = top + tap // size, q * stride + tap % size - padding
            if 0 <= h < H and 0 <= w < W:
                pixel, number = x[h, w], np.int32(tap)
                for c in range(C):
                    v, b = pixel[c], high[c]
                    better = not (v <= b) and b == b  # only a NaN differs from itself
                    high[c] = v if better else b
                    who[c] = number if better else who[c]
        for c in range(C):
            best[q, c] = high[c]
            winners[q, c] = who[c]


@njit(parallel=True, cache=True)
def _max_pool_gradient(gy, winners, size, stride, padding, gx):
    for n in prange(gy.shape[0]):  # windows of one image overlap, those of two never do
        _max_pool_image_gradient(gy[n], winners[n], size, stride, padding, gx[n])


@njit(cache=True)
def _max_pool_image_gradient(gy, winners, size, stride, padding, gx):
    H, W, C = gx.shape
    zero, who = gy.dtype.type(0), np.empty(C, np.int32)
    for p in range(gy.shape[0]):
        for q in range(gy.shape[1]):
            g = gy[p, q]
            for c in range(C):
                who[c] = winners[p, q, c]
            for tap in range(size * size):
                h, w = p * stride + tap // size - padding, q * stride + tap % size - padding
                if 0 <= h < H and 0 <= w < W:
                    pixel, number = gx[h, w], np.int32(tap)
                    for c in range(C):
                        pixel[c] += g[c] if who[c] == number else zero
