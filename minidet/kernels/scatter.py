"""Scatter-add: the transpose of picking rows by position."""

from __future__ import annotations

from minidet import backend
from minidet.kernels.kernel import Kernel


@Kernel
def scatter_add(x, index, rows):
    """`x` with rows[m] added to row index[m], for every m; a position may repeat and then adds up.

    The transpose of `take`: <take(x, index), c> = <x, scatter_add(0, index, c)> for all x and c.

    Shapes:
        x: (R, ...)
        index: (M,) integers in 0..R-1
        rows: (M, ...)
        returns: (R, ...), a new array
    """
    xp = backend.namespace(x)
    total = xp.asarray(x, copy=True)
    for m in range(index.shape[0]):
        r = int(index[m])
        total[r, ...] += rows[m, ...]
    return total


@scatter_add.faster_on("cupy")
@scatter_add.faster_on("numpy")
def _scatter_add_at(x, index, rows):
    total = x.copy()
    backend.namespace(x).add.at(total, index, rows)
    return total
