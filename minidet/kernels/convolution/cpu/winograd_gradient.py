"""Winograd's gradient of the weights: for each of the 36 points one matrix product over all tiles.

dL/dw = G' [sum over tiles of (B' x B) * (A dL/dy A')] G.  Inputs and gradients of some tiles are transformed
into panels, then every point is a product (filters x tiles) * (tiles x channels) of its own, which no other
thread touches: the sums stay in a core's cache, and come out the same for any number of threads.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from minidet.kernels.convolution.cpu.lanes import LANES, VECTORS, WIDTH
from minidet.kernels.convolution.cpu.microkernel import accumulate_tile
from minidet.kernels.convolution.cpu.panels import padded
from minidet.kernels.convolution.cpu.scratch import scratch
from minidet.kernels.convolution.cpu.transform import (
    GRADIENT_2,
    GRADIENT_4,
    TAPS,
    WEIGHT_GRADIENT_2,
    WEIGHT_GRADIENT_4,
    points,
    transform_pixels,
    transform_vectors,
)
from minidet.kernels.convolution.cpu.winograd import Tiling, gather
from minidet.kernels.parallel import parallel

FILTERS = 8 if LANES == 16 else 4
"""Rows of the register tile: it must divide the vectors that filters come in."""

RUN = 8
"""Tiles that lie together, all their points: a tile is written to all points at once, and were those far apart,
every write would wait for memory."""

RUNS = 16
"""Runs that are summed up before the sums are stored: two panels of them fit the first-level cache."""

SCRATCH = 3 << 17
"""float32 numbers of transformed inputs and gradients at a time: about a second-level cache."""

SUMS = 1 << 18
"""With more sums than this, which leave that cache themselves, at least RUNS runs are transformed at a time."""


def pointwise_products(x, gy, plan: Tiling):
    """gweight[f, i, j, c] of a 3x3 convolution at stride 1.

    Shapes:
        x: (N, S, C)
        gy: (N, S', F)
        returns: (F, 3, 3, C)
    """
    C, F, many = x.shape[2], gy.shape[2], points(plan.side)
    each = RUN * many * (padded(C) + padded(F))
    runs = -(-plan.tiles // RUN)
    chunk = min(runs, max(RUNS if many * padded(F) * padded(C) > SUMS else 2, SCRATCH // each))
    sums = scratch("sums", many * padded(F) * padded(C))
    sums[:] = 0
    left = scratch("left", chunk * RUN * many * padded(F))
    right = scratch("right", chunk * RUN * many * padded(C))
    gweight = np.empty((F, TAPS, TAPS, C), dtype=np.float32)
    arrays = (
        x.reshape(-1), gy.reshape(-1), np.zeros(LANES + max(C, F), dtype=np.float32), plan.patches, plan.targets,
        left, right, sums, gweight.reshape(-1),
    )  # fmt: skip
    for first in range(0, runs, chunk):
        count = min(chunk, runs - first)
        _gather_run(count, first * RUN, plan.tiles, count, C, F, plan.side, *arrays)
        _multiply_point(many, first * RUN, plan.tiles, count, C, F, plan.side, *arrays)
    _fold_filter(F, 0, plan.tiles, runs, C, F, plan.side, *arrays)
    return gweight


# The three loops take the same arguments: so what starts them is compiled once.


@parallel
def _gather_run(run, first, tiles, runs, C, F, side, x, gy, zeros, patches, targets, left, right, sums, gweight):
    """Transform tiles into `left`, runs of (points, panels, RUN, LANES filters), and `right`, WIDTH channels wide."""
    channels, filters = (C + LANES - 1) // LANES * LANES, (F + LANES - 1) // LANES * LANES
    for i in range(RUN):
        tile = first + run * RUN + i
        for f in range(0, F, LANES):
            target = run * points(side) * filters * RUN + f * RUN + i * LANES
            if tile < tiles:
                _gather_gradient(side, gy, F, zeros, targets, tile, f, left, target, filters * RUN)
            else:  # products with it shall add nothing
                for q in range(points(side)):
                    left[target + q * filters * RUN : target + q * filters * RUN + LANES] = 0
        for c in range(0, C, LANES):
            column = c // WIDTH * WIDTH
            width = WIDTH if channels - column > LANES else LANES
            target = run * points(side) * channels * RUN + column * RUN + i * width + c - column
            # Beyond the last tile: any numbers will do that are not NaN.
            gather(side, x, C, zeros, patches, min(tile, tiles - 1), c, right, target, channels * RUN)


@njit
def _gather_gradient(side, gy, F, zeros, targets, tile, f, left, to, apart):
    if side == 4:
        transform_pixels(gy, F, zeros, targets, tile * 16, f, left, to, apart, GRADIENT_4)
    else:
        transform_pixels(gy, F, zeros, targets, tile * 4, f, left, to, apart, GRADIENT_2)


@parallel
def _multiply_point(q, first, tiles, runs, C, F, side, x, gy, zeros, patches, targets, left, right, sums, gweight):
    """sums[q] += left[q]' right[q]: (filters, channels)."""
    channels, filters = (C + LANES - 1) // LANES * LANES, (F + LANES - 1) // LANES * LANES
    many = points(side)
    run_a, run_b = many * filters * RUN, many * channels * RUN
    for begin in range(0, runs, RUNS):
        count = min(RUNS, runs - begin)
        for column in range(0, channels, WIDTH):
            b = begin * run_b + (q * channels + column) * RUN
            for f in range(0, filters, FILTERS):
                a = begin * run_a + (q * filters + f // LANES * LANES) * RUN + f % LANES
                c = (q * filters + f) * channels + column
                if channels - column > LANES:
                    accumulate_tile(
                        left, a, LANES, run_a, right, b, run_b, RUN, count, sums, c, channels, FILTERS, VECTORS
                    )
                else:
                    accumulate_tile(left, a, LANES, run_a, right, b, run_b, RUN, count, sums, c, channels, FILTERS, 1)


@parallel
def _fold_filter(f, first, tiles, runs, C, F, side, x, gy, zeros, patches, targets, left, right, sums, gweight):
    """Transform the sums of all points back to one filter."""
    channels, filters = (C + LANES - 1) // LANES * LANES, (F + LANES - 1) // LANES * LANES
    for c in range(0, C, LANES):
        source, target, apart = f * channels + c, f * TAPS * TAPS * C + c, filters * channels
        if side == 4:
            transform_vectors(sums, source, apart, LANES, gweight, target, C, C - c, WEIGHT_GRADIENT_4)
        else:
            transform_vectors(sums, source, apart, LANES, gweight, target, C, C - c, WEIGHT_GRADIENT_2)
