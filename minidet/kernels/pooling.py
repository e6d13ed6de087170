"""Max pooling: the values, who won, and the way back."""

from __future__ import annotations

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
