"""Reading windows of a map, and the transpose of reading: adding windows back."""

from __future__ import annotations

import numpy as np

from minidet import backend
from minidet.kernels.kernel import Kernel

Pair = tuple[int, int]


@Kernel
def gather_windows(x, size: Pair, stride: Pair, dilation: Pair):
    """Every window of `x`: i rows and j columns of it, `dilation` apart, starting every `stride` pixels.

    windows[n, p, q, i, j, c] = x[n, p*stride + i*dilation, q*stride + j*dilation, c]

    Shapes:
        x: (N, H, W, C), already padded
        returns: (N, P, Q, *size, C) with P = output_size(H), Q = output_size(W)
    """
    xp = backend.namespace(x)
    N, H, W, C = x.shape
    P, Q = (output_size(n, *rule) for n, rule in zip((H, W), zip(size, stride, dilation, strict=True), strict=True))
    windows = xp.empty((N, P, Q, *size, C), dtype=x.dtype, device=x.device)
    for i in range(size[0]):
        for j in range(size[1]):
            rows, columns = every(i * dilation[0], stride[0], P), every(j * dilation[1], stride[1], Q)
            # Offset (i, j) of every window at once: a strided slice of the map.
            windows[:, :, :, i, j, :] = x[:, rows, columns, :]
    return windows


@gather_windows.faster_on("numpy")
def _gather_windows_numpy(x, size: Pair, stride: Pair, dilation: Pair):
    # A view with repeated strides: no copy at all.  Callers must not write to it.
    N, H, W, C = x.shape
    P, Q = (output_size(n, *rule) for n, rule in zip((H, W), zip(size, stride, dilation, strict=True), strict=True))
    n, h, w, c = x.strides
    return np.lib.stride_tricks.as_strided(
        x,
        (N, P, Q, *size, C),
        (n, h * stride[0], w * stride[1], h * dilation[0], w * dilation[1], c),
        writeable=False,
    )


@Kernel
def scatter_windows(windows, height: int, width: int, stride: Pair, dilation: Pair):
    """Add every window back to where it was read; overlaps add up.

    The transpose of `gather_windows`: <gather(x), c> = <x, scatter(c)> for all x and c.

    Shapes:
        windows: (N, P, Q, k, l, C)
        returns: (N, height, width, C)
    """
    xp = backend.namespace(windows)
    N, P, Q, k, l, C = windows.shape  # noqa: E741
    x = xp.zeros((N, height, width, C), dtype=windows.dtype, device=windows.device)
    for i in range(k):
        for j in range(l):
            rows, columns = every(i * dilation[0], stride[0], P), every(j * dilation[1], stride[1], Q)
            # Windows overlap, but for ONE offset (i, j) no pixel is hit twice, so a plain += on a
            # slice is enough: no scatter-add needed.
            x[:, rows, columns, :] += windows[:, :, :, i, j, :]
    return x


def output_size(n: int, size: int, stride: int, dilation: int) -> int:
    """How many windows of `size` pixels, `dilation` apart, fit into n pixels; never negative."""
    return max(0, (n - dilation * (size - 1) - 1) // stride + 1)


def every(start: int, stride: int, count: int) -> slice:
    """`count` positions from `start`; the stop stays inside the axis, as the standard demands."""
    return slice(start, start + stride * (count - 1) + 1 if count else start, stride)
