"""A 3x3 convolution as three matrix products per row of the filter, without laying out windows.

Give a map a rim of zeros and look at its pixels as one long list of rows of C numbers.  Then the neighbour at
(i - 1, j - 1) of every pixel is the row (i - 1) * pitch + (j - 1) further down, the same distance for all, and

    y[p] = sum_i sum_j x[p + (i - 1) * pitch + (j - 1)] w_ij

is nine matrix products of shifted lists.  Three neighbours in a row lie side by side in memory: one row of 3C
numbers.  The rows that begin at pixels 0, 3, 6, ... are a matrix without overlaps; so are those that begin at 1, 4,
7, ... and at 2, 5, 8, ...: a product of three such matrices at once for every i, with sums of length 3C, and no copy.

The rim is half as wide as it seems to need: a zero after each row is also the zero before the next one.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from minidet import backend
from minidet.kernels.convolution.geometry import Geometry
from minidet.kernels.convolution.gpu import cuda
from minidet.kernels.convolution.gpu.cuda import Stack, ready, single
from minidet.kernels.windows import Pair

FILE, THREADS = "shift.cu", 256
TILE, TILES = 128, 264
"""A matrix product is cut into tiles of about TILE x TILE numbers; with TILES of them no multiprocessor is idle."""

MOST_PARTS = 32


def accepts(x, geometry: Geometry, channels: int, filters: int) -> bool:
    """3x3 at stride 1 with one pixel of padding, in one group; `x` is the input or the gradient of the output."""
    pieces = 8 if cuda.is_bfloat16(x) else 4  # cuBLAS is fast where rows begin at multiples of 16 bytes
    return (
        geometry.size == (3, 3)
        and geometry.stride == geometry.padding == geometry.dilation == (1, 1)
        and geometry.groups == 1
        and channels % pieces == filters % pieces == 0
        and (cuda.is_bfloat16(x) or x.dtype == np.float32)
        and x.shape[0] * geometry.pixels > 0
    )


def convolve(x, weight, bias, scale, shortcut, relu: bool, geometry: Geometry, memo: dict):
    """`definition.convolve` of 3x3 filters."""
    N, S, C = x.shape
    F, xp = weight.shape[0], backend.namespace(x)
    y = xp.empty((N, S, F), dtype=x.dtype, device=x.device)
    x, weight, scale, bias = ready(x), ready(weight), single(scale), single(bias)
    shortcut = None if shortcut is None else ready(shortcut)
    for map_, inside, _, _ in geometry.levels():
        rows = rows_of(map_, N, 3)
        rim = spread(x, map_, inside.start, rows)
        sums = xp.empty((rows, F), dtype=_sums(x), device=x.device)
        for i in range(3):
            products = Stack(rim, (i * (map_[1] + 1)) * C, 3 * C, C), Stack(weight, i * 3 * C, 9 * C, 0)
            shape = rows // 3, F, 3 * C
            cuda.multiply(Stack(sums, 0, 3 * F, F), *products, shape, 3, b_transposed=True, add=i > 0)
        place = _place((N, *map_, F, S, inside.start, 0, rows), xp, cuda.device())
        finish = sums, scale, bias, shortcut, y, place, int(relu)
        _launch(f"collect_{cuda.numbers(x)}", N * map_[0] * map_[1] * F, finish)
    return y


def convolve_input_gradient(gy, weight, geometry: Geometry, memo: dict):
    """`definition.convolve_input_gradient` of 3x3 filters: a convolution of gy with every filter turned around."""
    if "shift" not in memo:
        turned = backend.namespace(gy).permute_dims(weight[:, ::-1, ::-1, :], (3, 1, 2, 0))
        memo["shift"] = ready(turned)  # (C, 3, 3, F)
    return convolve(gy, memo["shift"], None, None, None, False, geometry, {})


def convolve_weight_gradient(x, gy, geometry: Geometry):
    """`definition.convolve_weight_gradient` of 3x3 filters, in float32 also of bfloat16.

    The same shifts, but the sum runs over the pixels: every `parts`-th row, from 0, 1, 2, ... on, makes a part of the
    result, all at once, and the parts are added up.  With three, most multiprocessors would be idle.
    """
    N, _, C = x.shape
    F, xp = gy.shape[2], backend.namespace(x)
    parts = min(MOST_PARTS, max(3, -(-TILES // (-(-F // TILE) * -(-3 * C // TILE)))))
    sums = xp.empty((3, parts, F, 3 * C), dtype=_sums(x), device=x.device)
    x, gy = ready(x), ready(gy)
    for n, (map_, inside, _, _) in enumerate(geometry.levels()):
        rows = rows_of(map_, N, parts)
        rim = spread(x, map_, inside.start, rows)
        gradients = spread(gy, map_, inside.start, rows)
        first = before(map_) * F  # gy's own zeros come first; its row p belongs to x's rows around p
        for i in range(3):
            products = Stack(gradients, first, parts * F, F), Stack(rim, i * (map_[1] + 1) * C, parts * C, C)
            shape = F, 3 * C, rows // parts
            target = Stack(sums, i * parts * F * 3 * C, 3 * C, F * 3 * C)
            cuda.multiply(target, *products, shape, parts, a_transposed=True, add=n > 0)
    return xp.reshape(xp.permute_dims(xp.sum(sums, axis=1), (1, 0, 2)), (F, 3, 3, C))


def before(map_: Pair) -> int:
    """Rows of zeros before the first pixel, for its neighbours above and to the left."""
    return map_[1] + 2


def rows_of(map_: Pair, images: int, parts: int) -> int:
    """How many rows are multiplied: up to the last pixel at least, and `parts` equal shares."""
    H, W = map_
    return -(-images * (H + 1) * (W + 1) // parts) * parts


def spread(x, map_: Pair, start: int, rows: int):
    """A level with its rim, and enough zeros around for the neighbours of every row that is multiplied.

    Shapes:
        x: (N, S, C)
        returns: (M, C), M = rows + 2 * before(map_)
    """
    N, S, C = x.shape
    xp, total = backend.namespace(x), rows + 2 * before(map_)
    rim = xp.empty((total, C), dtype=x.dtype, device=x.device)
    place = _place((N, *map_, C, S, start, before(map_), total), xp, cuda.device())
    _launch(f"spread_{cuda.numbers(x)}", total * C, (x, rim, place))
    return rim


def _launch(name: str, numbers: int, args: tuple) -> None:
    """Four numbers for each thread."""
    cuda.launch(FILE, name, (-(-numbers // (4 * THREADS)), 1), THREADS, 0, args)


@lru_cache(maxsize=4096)
def _place(numbers: tuple[int, ...], xp, device: int):
    """The struct Place of shift.cu on the device, copied there once."""
    return xp.asarray(np.asarray(numbers, np.int32))


def _sums(x):
    """The dtype of sums: float32 for bfloat16."""
    return np.dtype(np.float32) if cuda.is_bfloat16(x) else x.dtype
