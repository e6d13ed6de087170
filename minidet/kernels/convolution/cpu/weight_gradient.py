"""The gradient of the weights: an outer product per output pixel, of what came out and what went in.

Seen as a matrix, dL/dw has a row per filter and a column per tap and channel.  A block of pixels is laid
out twice in panels that stay in cache, dL/dy by FILTERS filters and the gathered inputs by PAIR vectors of columns; the
register tile then adds up the products of a whole block before it touches memory again.
"""

from __future__ import annotations

import numpy as np
from numba import get_num_threads

from minidet.kernels.compiler import inner
from minidet.kernels.convolution.cpu.lanes import FILTERS, LANES, PAIR, ROWS
from minidet.kernels.convolution.cpu.microkernel import accumulate_rows, copy_run
from minidet.kernels.convolution.cpu.panels import padded
from minidet.kernels.convolution.cpu.plan import Plan
from minidet.kernels.convolution.cpu.scratch import aligned, scratch
from minidet.kernels.parallel import in_turn, parallel

BLOCK = 160 // ROWS
"""Tiles of pixels in a block, at most: long enough to hide loading and storing the sums, and a panel of a block's
columns fits the first-level cache."""

GROUP = 32
"""Vectors of columns that are laid out together, so that a pixel's channels are read as they lie in memory."""

FEW_WEIGHTS = 1 << 17
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
    rows = -(-F // FILTERS) * FILTERS
    columns = taps * padded(depth)
    threads, tiles = get_num_threads(), N // plan.images * len(plan.tiles)
    shares, ranges = (min(threads, tiles), 1) if rows * columns <= FEW_WEIGHTS else (1, threads)
    gweight = aligned(F, taps, depth)
    whole = shares * rows * columns == gweight.size  # then they are summed up where they belong
    units = shares * ranges
    loops = ((_unit, 0, units),) if whole else ((_unit, 0, units), (_fold_part, 0, units))
    sums = gweight.reshape(-1) if whole else scratch("sums", shares * rows * columns)
    share = -(-tiles // shares)
    block = -(-share // -(-share // BLOCK))  # all of one length: a short one moves as many sums as a long one
    left = scratch("left", units * rows * block * ROWS)
    right = scratch("right", units * GROUP * LANES * block * ROWS)
    in_turn(
        loops, shares, ranges, tiles, x.reshape(-1), C, depth, gy.reshape(-1), F,
        plan.tiles, plan.sources, plan.targets, plan.read, plan.written, sums, rows, columns, left, right, block,
        gweight.reshape(-1),
    )  # fmt: skip
    return gweight


# Both loops take the same arguments, for one follows the other.


@parallel
def _unit(
    unit, shares, ranges, tiles, x, pitch, depth, gy, F, table, sources, targets, read, written, sums, rows, columns,
    left, right, block, gweight,
):  # fmt: skip
    """The pixels of one share of the tiles, block by block, for one of `ranges` parts of the columns."""
    share, part = unit // ranges, unit % ranges
    begin, end, place = share * tiles // shares, (share + 1) * tiles // shares, share * rows * columns
    vectors = columns // LANES
    pairs = (vectors + PAIR - 1) // PAIR
    low, high = part * pairs // ranges * PAIR, min(vectors, (part + 1) * pairs // ranges * PAIR)
    left, right = left[unit * rows * block * ROWS :], right[unit * GROUP * LANES * block * ROWS :]
    zeros = np.zeros(LANES, dtype=np.float32)
    for first in range(begin, end, block):
        last = min(first + block, end)
        pixels = (last - first) * ROWS
        _lay_out_filters(first, last, gy, F, targets, written, left, pixels)
        for start in range(low, high, GROUP):
            stop = min(start + GROUP, high)
            _lay_out_columns(first, last, start, stop, x, pitch, depth, table, sources, read, right, pixels, zeros)
            for v in range(start, stop, PAIR):
                for row in range(0, rows, FILTERS):
                    accumulate_rows(
                        min(PAIR, stop - v), left, row * pixels, FILTERS, 0, right, (v - start) * LANES * pixels, 0, 0,
                        pixels, 1, sums, place + row * columns + v * LANES, columns, first > begin,
                    )  # fmt: skip


@parallel
def _fold_part(
    part, shares, ranges, tiles, x, pitch, depth, gy, F, table, sources, targets, read, written, sums, rows, columns,
    left, right, block, gweight,
):  # fmt: skip
    """Some filters, of all shares together, without the columns that fill up vectors."""
    parts, taps = shares * ranges, len(gweight) // (F * depth)
    for i in range(part * F // parts * taps, (part + 1) * F // parts * taps):
        total = gweight[i * depth : (i + 1) * depth]
        for share in range(shares):
            source = share * rows * columns + i * (columns // taps)
            more = sums[source : source + depth]
            for c in range(depth):
                total[c] = more[c] if share == 0 else total[c] + more[c]


@inner
def _lay_out_filters(first, last, gy, F, targets, written, left, pixels):
    """dL/dy in panels of (pixels, FILTERS filters); missing filters and repeated pixels are zeros."""
    for i in range(last - first):
        repeat, tile = divmod(first + i, len(targets))
        for m in range(ROWS):
            repeated = m > 0 and targets[tile, m] == targets[tile, m - 1]
            source = (repeat * written + targets[tile, m]) * F
            target = (i * ROWS + m) * FILTERS
            for f in range(0, F, FILTERS):
                place = f * pixels + target
                if not repeated and f + FILTERS <= F:
                    copy_run(left, place, gy, source + f, FILTERS)
                else:
                    for j in range(FILTERS):
                        left[place + j] = gy[source + f + j] if not repeated and f + j < F else 0


@inner
def _lay_out_columns(first, last, begin, end, x, pitch, depth, table, sources, read, right, pixels, zeros):
    """Vectors begin to end of every pixel, LANES channels of one tap each, in panels of (pixels, PAIR vectors)."""
    each, total = (depth + LANES - 1) // LANES, end - begin
    for tap in range(begin // each, (end + each - 1) // each):
        start, stop = max(begin, tap * each), min(end, (tap + 1) * each)
        first_vector, whole = start - begin, tap * each + depth // LANES - begin
        channel = (start - tap * each) * LANES
        for i in range(last - first):
            repeat, tile = divmod(first + i, len(table))
            source, shift, row = table[tile, 0] + tap * ROWS, repeat * read, i * ROWS
            for m in range(ROWS):
                pixel = sources[source + m]
                place = (shift + pixel) * pitch + channel
                for v in range(first_vector, stop - begin):
                    panel, odd = v & -PAIR, v & (PAIR - 1)
                    width = PAIR if panel + PAIR <= total else total - panel
                    target = (panel * pixels + (row + m) * width + odd) * LANES
                    if pixel < 0:
                        copy_run(right, target, zeros, 0, LANES)
                    elif v < whole:
                        copy_run(right, target, x, place, LANES)
                    else:
                        for j in range(LANES):
                            right[target + j] = x[place + j] if j < depth % LANES else 0
                    place += LANES
