"""Max pooling: the values, who won, and the way back."""

from __future__ import annotations

import numpy as np

from minidet import backend
from minidet.kernels import cuda
from minidet.kernels.kernel import Kernel
from minidet.kernels.parallel import parallel
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
    padded = xp.full((N, H + 2 * padding, W + 2 * padding, C), -float("inf"), dtype=x.dtype, device=x.device)
    padded[:, padding : padding + H, padding : padding + W, :] = x
    best = padded[:, every(0, stride, P), every(0, stride, Q), :] + 0
    winners = xp.zeros((N, P, Q, C), dtype=xp.uint8, device=x.device)
    for tap in range(1, size * size):
        i, j = divmod(tap, size)
        candidate = padded[:, every(i, stride, P), every(j, stride, Q), :]
        better = (candidate > best) | (xp.isnan(candidate) & ~xp.isnan(best))
        best = xp.where(better, candidate, best)
        winners = xp.where(better, xp.full((), tap, dtype=xp.uint8, device=x.device), winners)
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
        won = winners == xp.full((), tap, dtype=xp.uint8, device=gy.device)
        padded[:, every(i, stride, P), every(j, stride, Q), :] += xp.where(won, gy, zero)
    return padded[:, padding : padding + height, padding : padding + width, :]


@max_pool.faster_on("numpy")
def _max_pool_numba(x, size: int, stride: int, padding: int):
    N, H, W, C = x.shape
    P, Q = (output_size(n + 2 * padding, size, stride, 1) for n in (H, W))
    best, winners = np.empty((N, P, Q, C), x.dtype), np.empty((N, P, Q, C), np.uint8)
    _max_pool_row(N * P, np.ascontiguousarray(x), (None,) * size, stride, padding, best, winners)
    return best, winners


@max_pool_gradient.faster_on("numpy")
def _max_pool_gradient_numba(gy, winners, height: int, width: int, size: int, stride: int, padding: int):
    gx = np.empty((gy.shape[0], height, width, gy.shape[3]), gy.dtype)
    _max_pool_row_gradient(len(gy) * height, np.ascontiguousarray(gy), winners, size, stride, padding, gx)
    return gx


@max_pool.faster_on("cupy", narrow=True)
def _max_pool_cuda(x, size: int, stride: int, padding: int):
    xp, (N, H, W, C) = backend.namespace(x), x.shape
    P, Q = (output_size(n + 2 * padding, size, stride, 1) for n in (H, W))
    best, winners = xp.empty((N, P, Q, C), dtype=x.dtype), xp.empty((N, P, Q, C), dtype=xp.uint8)
    arguments = cuda.contiguous(x), best, winners, best.size, H, W, P, Q, C, size, stride, padding
    cuda.launch(__file__, "max_pool", best.size, *arguments, real=x.dtype)
    return best, winners


@max_pool_gradient.faster_on("cupy", narrow=True)
def _max_pool_gradient_cuda(gy, winners, height: int, width: int, size: int, stride: int, padding: int):
    N, P, Q, C = gy.shape
    gx = backend.namespace(gy).empty((N, height, width, C), dtype=gy.dtype)
    arguments = cuda.contiguous(gy), winners, gx, gx.size, height, width, P, Q, C, size, stride, padding
    cuda.launch(__file__, "max_pool_gradient", gx.size, *arguments, real=gy.dtype)
    return gx


# A slice of an array counts its owners, which costs more than a pixel: so every element is named by all its indices.
# The loops over channels store choices instead of branching, and number the winners in the width of the values: so
# they become vector instructions.

_WRITTEN_OUT = 5
"""Side of the largest window whose taps the compiler writes out one after the other: it gives up on more."""


@parallel
def _max_pool_row(row, x, side, stride, padding, best, winners):
    """A row of the output.

    `side` is a tuple as long as a window's side: its length is part of its type, so that the compiler writes out all
    taps of a window inside the map, and the best so far stays in a register.
    """
    _, H, W, C = x.shape
    _, P, Q, _ = best.shape
    n, p, size = row // P, row % P, len(side)
    high, who = np.empty(C, x.dtype), np.empty(C, np.int32)
    for q in range(Q):
        top, left = p * stride - padding, q * stride - padding
        if size <= _WRITTEN_OUT and 0 <= top <= H - size and 0 <= left <= W - size:
            for c in range(C):
                b, winner = x[n, top, left, c], np.int32(0)
                for i in range(len(side)):
                    for j in range(len(side)):
                        v = x[n, top + i, left + j, c]
                        better = not (v <= b) and b == b  # only a NaN differs from itself
                        b = v if better else b
                        winner = np.int32(i * size + j) if better else winner
                best[n, p, q, c], winners[n, p, q, c] = b, winner
        else:
            for c in range(C):
                high[c], who[c] = -np.inf, 0
            for i in range(size):
                for j in range(size):
                    h, w, tap = top + i, left + j, np.int32(i * size + j)
                    if 0 <= h < H and 0 <= w < W:
                        for c in range(C):
                            v, b = x[n, h, w, c], high[c]
                            better = not (v <= b) and b == b
                            high[c] = v if better else b
                            who[c] = tap if better else who[c]
            for c in range(C):
                best[n, p, q, c], winners[n, p, q, c] = high[c], who[c]


@parallel
def _max_pool_row_gradient(row, gy, winners, size, stride, padding, gx):
    """A row of the input collects from all windows that contain it: windows overlap, their rows do not."""
    _, H, W, C = gx.shape
    _, P, Q, _ = gy.shape
    n, h, zero = row // H, row % H, gy.dtype.type(0)
    for w in range(W):
        for c in range(C):
            gx[n, h, w, c] = zero
    below = h + padding
    for p in range(max(0, (below - size) // stride + 1), min(P, below // stride + 1)):
        for q in range(Q):
            for j in range(size):
                w, tap = q * stride + j - padding, np.int32((below - p * stride) * size + j)
                if 0 <= w < W:
                    for c in range(C):
                        gx[n, h, w, c] += gy[n, p, q, c] if winners[n, p, q, c] == tap else zero
