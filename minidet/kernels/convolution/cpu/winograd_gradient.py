"""Winograd's gradient of the weights: for each of the 36 points one matrix product over all tiles.

dL/dw = G' [sum over tiles of (B' x B) * (A dL/dy A')] G.  Inputs and gradients of some tiles are transformed
into panels, then every point is a product (filters x tiles) * (tiles x channels) of its own, whose sums stay in a
core's cache.  Threads share the points, or, of few channels and many tiles, the tiles.
"""

from __future__ import annotations

from numba import get_num_threads

from minidet.kernels.compiler import inner
from minidet.kernels.convolution.cpu.lanes import FILTERS, GAP, LANES, PAIR
from minidet.kernels.convolution.cpu.microkernel import accumulate_rows
from minidet.kernels.convolution.cpu.panels import padded
from minidet.kernels.convolution.cpu.scratch import aligned, row_of_zeros, scratch
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
from minidet.kernels.parallel import in_turn, parallel

RUN = 8
"""Tiles that lie together, all their points: a tile is written to all points at once, and were those far apart,
every write would wait for memory."""

RUNS = 16
"""Runs that are summed up before the sums are stored: their panel of channels fits the first-level cache."""

PANEL = PAIR * LANES
"""Channels of a panel."""

SCRATCH = 1 << 19
"""float32 numbers of transformed inputs and gradients at a time: half of what two cores' second-level caches hold, for
the sums take room too.  Fewer would mean more loops, each of which waits for the slower core."""

FEW_SUMS, MUCH_TO_SUM = 1 << 18, 8
"""Up to so many sums, and with so many times as many transformed numbers, every thread sums what it transformed itself,
in a copy of its own: what one core wrote, another reads as slowly as memory."""

MANY_SUMS = 1 << 21
"""With more sums than this, going through all of them again costs more than inputs and gradients that leave the caches:
then as many tiles as possible are transformed at a time."""

LARGE_SCRATCH = 1 << 24
"""float32 numbers of them in that case."""


def pointwise_products(x, gy, plan: Tiling):
    """gweight[f, i, j, c] of a 3x3 convolution at stride 1.

    Shapes:
        x: (N, S, C)
        gy: (N, S', F)
        returns: (F, 3, 3, C)
    """
    C, F, many = x.shape[2], gy.shape[2], points(plan.side)
    each_left, each_right = many * (RUN * padded(F) + GAP), many * (RUN * padded(C) + GAP)
    each_sums = many * (padded(F) * padded(C) + GAP)
    few = each_sums <= FEW_SUMS and plan.tiles * (C + F) >= MUCH_TO_SUM * C * F
    runs = -(-plan.tiles // RUN)
    shares = min(runs, get_num_threads()) if few else 1
    room = SCRATCH // (2 * shares) if few else LARGE_SCRATCH if each_sums > MANY_SUMS else SCRATCH
    chunk = min(-(-runs // shares), max(2, room // (each_left + each_right)))
    sums = scratch("sums", shares * each_sums)
    left, right = scratch("left", shares * chunk * each_left), scratch("right", shares * chunk * each_right)
    gweight = aligned(F, TAPS, TAPS, C)
    loops = [(_sum_share, 0, shares)] if shares > 1 else []
    for begin in range(0, runs if shares == 1 else 0, chunk):
        point = begin // chunk * many
        loops += [(_gather_run, begin, min(begin + chunk, runs)), (_multiply_point, point, point + many)]
    in_turn(
        (*loops, (_fold_filter, 0, F)), shares, plan.tiles, chunk, C, F, plan.side, x.reshape(-1), gy.reshape(-1),
        row_of_zeros(LANES + max(C, F)), plan.patches, plan.targets, left, right, sums, gweight.reshape(-1),
    )  # fmt: skip
    return gweight


# All loops take the same arguments, for they follow each other.


@parallel
def _sum_share(share, shares, tiles, chunk, C, F, side, x, gy, zeros, patches, targets, left, right, sums, gweight):
    """The sums of some of the runs."""
    runs = (tiles + RUN - 1) // RUN
    begin, end = share * runs // shares, (share + 1) * runs // shares
    for first in range(begin, end, chunk):
        last = min(first + chunk, end)
        for run in range(first, last):
            _gather(run, share * chunk + run - first, tiles, C, F, side, x, gy, zeros, patches, targets, left, right)
        for q in range(points(side)):
            _multiply(q, share, share * chunk, last - first, first > begin, C, F, side, left, right, sums)


@parallel
def _gather_run(run, shares, tiles, chunk, C, F, side, x, gy, zeros, patches, targets, left, right, sums, gweight):
    """A run of one chunk."""
    _gather(run, run % chunk, tiles, C, F, side, x, gy, zeros, patches, targets, left, right)


@parallel
def _multiply_point(unit, shares, tiles, chunk, C, F, side, x, gy, zeros, patches, targets, left, right, sums, gweight):
    """A point, of all runs of one chunk."""
    part, q = unit // points(side), unit % points(side)
    runs = min(chunk, (tiles + RUN - 1) // RUN - part * chunk)
    _multiply(q, 0, 0, runs, part > 0, C, F, side, left, right, sums)


@inner
def _gather(run, slot, tiles, C, F, side, x, gy, zeros, patches, targets, left, right):
    """Transform tiles into `left`, runs of (points, panels, RUN, LANES filters), and `right`, PANEL channels wide."""
    channels, filters = (C + LANES - 1) // LANES * LANES, (F + LANES - 1) // LANES * LANES
    whole, apart_left, apart = channels // PANEL * PANEL, filters * RUN + GAP, channels * RUN + GAP
    for i in range(RUN):
        tile = run * RUN + i
        target = slot * points(side) * apart_left + i * LANES
        if tile < tiles:
            _gather_gradient(side, gy, F, zeros, targets, tile, left, target, apart_left)
        else:  # products with it shall add nothing
            for q in range(points(side)):
                for f in range(0, filters, LANES):
                    place = target + q * apart_left + f * RUN
                    left[place : place + LANES] = 0
        # Beyond the last tile: any numbers will do that are not NaN.
        tile = min(tile, tiles - 1)
        target = slot * points(side) * apart
        gather(side, x, C, zeros, patches, tile, 0, whole, right, target + i * PANEL, LANES, PANEL * RUN, apart)
        if whole < channels:  # the last panel is narrower
            target += whole * RUN + i * (channels - whole)
            gather(side, x, C, zeros, patches, tile, whole, channels, right, target, LANES, PANEL * RUN, apart)


@inner
def _gather_gradient(side, gy, F, zeros, targets, tile, left, to, apart):
    vector, panel, first = LANES * RUN, PANEL * RUN, tile * side * side
    if side == 4:
        transform_pixels(gy, F, zeros, targets, first, 0, F, left, to, vector, panel, apart, GRADIENT_4)
    else:
        transform_pixels(gy, F, zeros, targets, first, 0, F, left, to, vector, panel, apart, GRADIENT_2)


@inner
def _multiply(q, share, slot, runs, begun, C, F, side, left, right, sums):
    """Add left[q]' right[q] of some runs to sums[q], (filters, channels), or, unless those are `begun`, to zeros."""
    channels, filters = (C + LANES - 1) // LANES * LANES, (F + LANES - 1) // LANES * LANES
    point_a, point_b = filters * RUN + GAP, channels * RUN + GAP
    start = (share * points(side) + q) * (filters * channels + GAP)
    run_a, run_b = points(side) * point_a, points(side) * point_b
    for begin in range(slot, slot + runs, RUNS):
        count = min(RUNS, slot + runs - begin)
        for column in range(0, channels, PANEL):
            b, vectors = begin * run_b + q * point_b + column * RUN, min(PAIR, (channels - column) // LANES)
            for f in range(0, filters, FILTERS):
                a = begin * run_a + q * point_a + f // LANES * LANES * RUN + f % LANES
                c = start + f * channels + column
                accumulate_rows(
                    vectors, left, a, LANES, run_a, right, b, 0, run_b, RUN, count, sums, c, channels,
                    begun or begin > slot,
                )  # fmt: skip


@parallel
def _fold_filter(f, shares, tiles, chunk, C, F, side, x, gy, zeros, patches, targets, left, right, sums, gweight):
    """Transform the sums of all points back to one filter."""
    channels, filters = (C + LANES - 1) // LANES * LANES, (F + LANES - 1) // LANES * LANES
    apart = filters * channels + GAP
    for q in range(points(side)):
        place = q * apart + f * channels
        total = sums[place : place + channels]
        for _share in range(1, shares):
            place += points(side) * apart
            more = sums[place : place + channels]
            for c in range(channels):
                total[c] += more[c]
    for c in range(0, C, LANES):
        source, target = f * channels + c, f * TAPS * TAPS * C + c
        if side == 4:
            transform_vectors(sums, source, apart, LANES, gweight, target, C, C - c, WEIGHT_GRADIENT_4)
        else:
            transform_vectors(sums, source, apart, LANES, gweight, target, C, C - c, WEIGHT_GRADIENT_2)
