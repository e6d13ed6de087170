"""The gradient of the weights: an outer product per output pixel, of what came out and what went in.

Seen as a matrix, dL/dw has a row per filter and a column per tap and channel.  A block of pixels is laid
out twice in panels that stay in cache, dL/dy by ROWS filters and the gathered inputs by two vectors of
columns; the register tile then adds up the products of a whole block before it touches memory again.
"""

from __future__ import annotations

import numpy as np
from numba import get_num_threads, njit

from minidet.kernels.convolution.cpu.lanes import LANES, ROWS, VECTORS, WIDTH
from minidet.kernels.convolution.cpu.microkernel import accumulate_tile, copy_run
from minidet.kernels.convolution.cpu.panels import padded
from minidet.kernels.convolution.cpu.plan import Plan
from minidet.kernels.parallel import parallel

BLOCK = 128 // ROWS
"""Tiles of pixels in a block: long enough to hide loading and storing the sums."""

FEW_WEIGHTS = 1 << 16
"""Up to so many weights every thread sums some pixels into a copy of its own; with more, a second copy
costs too much memory traffic, and every thread sums all pixels for some of the columns."""


def outer_products(x, gy, plan: Plan, *, depth: int):
    """gweight[f, t, c] = sum over output pixels p of gy[p, f] * x[source[p, t], c].

    Shapes:
        x: (N, S, C), of whose pixels `depth` numbers are read
        gy: (N, S', F)
        returns: (F, taps, depth)
    """
    N, _, C = x.shape
    F, taps = gy.shape[2], len(plan.order)
    rows = -(-F // ROWS) * ROWS
    columns = -(-taps * padded(depth) // WIDTH) * WIDTH
    threads = get_num_threads()
    shares, ranges = (threads, 1) if rows * columns <= FEW_WEIGHTS else (1, threads)
    sums = np.zeros((shares, rows, columns), dtype=np.float32)
    tiles = N // plan.images * len(plan.tiles)
    _unit(
        shares * ranges, shares, ranges, tiles, x.reshape(-1), C, depth, gy.reshape(-1), F,
        plan.tiles, plan.sources, plan.targets, plan.read, plan.written, sums.reshape(-1), rows, columns,
    )  # fmt: skip
    total = sums[0] if shares == 1 else sums.sum(axis=0)
    return np.ascontiguousarray(total[:F, : taps * padded(depth)].reshape(F, taps, -1)[:, :, :depth])


@parallel
def _unit(
    unit, shares, ranges, tiles, x, pitch, depth, gy, F, table, sources, targets, read, written, sums, rows, columns
):
    """The pixels of one share of the tiles, block by block, for one of `ranges` parts of the columns."""
    share, part = unit // ranges, unit % ranges
    begin, end, place = share * tiles // shares, (share + 1) * tiles // shares, share * rows * columns
    pairs = columns // WIDTH
    used = len(sources) // targets.size * ((depth + LANES - 1) // LANES)
    left = np.zeros(rows * BLOCK * ROWS, dtype=np.float32)
    right = np.zeros(WIDTH * BLOCK * ROWS, dtype=np.float32)
    zeros = np.zeros(LANES, dtype=np.float32)
    for first in range(begin, end, BLOCK):
        last = min(first + BLOCK, end)
        pixels = (last - first) * ROWS
        _lay_out_filters(first, last, gy, F, targets, written, left, pixels)
        for pair in range(part * pairs // ranges, (part + 1) * pairs // ranges):
            # Of an odd number of vectors the last has no partner: what is in its place is cut off later.
            for v in range(min(VECTORS, used - pair * VECTORS)):
                _lay_out_column(first, last, pair * VECTORS + v, x, pitch, depth, table, sources, read, right, v, zeros)
            for row in range(0, rows, ROWS):
                target = place + row * columns + pair * WIDTH
                accumulate_tile(
                    left, row * pixels, ROWS, 0, right, 0, 0, pixels, 1, sums, target, columns, ROWS, VECTORS
                )


@njit
def _lay_out_filters(first, last, gy, F, targets, written, left, pixels):
    """dL/dy in panels of (pixels, ROWS filters); missing filters and repeated pixels are zeros."""
    for i in range(last - first):
        repeat, tile = divmod(first + i, len(targets))
        for m in range(ROWS):
            repeated = m > 0 and targets[tile, m] == targets[tile, m - 1]
            source = (repeat * written + targets[tile, m]) * F
            target = (i * ROWS + m) * ROWS
            for f in range(0, F, ROWS):
                place = f * pixels + target
                if not repeated and f + ROWS <= F:
                    copy_run(left, place, gy, source + f, ROWS)
                else:
                    for j in range(ROWS):
                        left[place + j] = gy[source + f + j] if not repeated and f + j < F else 0


@njit
def _lay_out_column(first, last, vector, x, pitch, depth, table, sources, read, right, v, zeros):
    """One tap's LANES channels of every pixel, as the v-th vector of rows of WIDTH."""
    each = (depth + LANES - 1) // LANES
    tap, channel = vector // each, vector % each * LANES
    valid = min(LANES, depth - channel)
    for i in range(last - first):
        repeat, tile = divmod(first + i, len(table))
        source = table[tile, 0] + tap * ROWS
        for m in range(ROWS):
            target = (i * ROWS + m) * WIDTH + v * LANES
            pixel = sources[source + m]
            start = (repeat * read + pixel) * pitch + channel
            if pixel < 0:
                copy_run(right, target, zeros, 0, LANES)
            elif valid == LANES:
                copy_run(right, target, x, start, LANES)
            else:
                for j in range(valid):
                    right[target + j] = x[start + j]
                for j in range(valid, LANES):
                    right[target + j] = 0
