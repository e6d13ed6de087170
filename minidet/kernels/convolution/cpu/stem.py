"""A convolution over few channels, such as the first one over a photo's three.

The pixels of one window row lie side by side in memory.  Once a map is padded, a row of k pixels of C channels is one
tap of k*C channels: a 7x7 filter over 3 channels becomes 7 taps of 21.  Padded is only what some rows of outputs read,
in cache, just before they read it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numba import get_num_threads

from minidet.kernels.compiler import inner
from minidet.kernels.convolution.cpu.direct import NOTHING, epilogue_of
from minidet.kernels.convolution.cpu.lanes import FILTERS, LANES, PAIR, ROWS, WIDTH
from minidet.kernels.convolution.cpu.microkernel import accumulate_rows, multiply_rows
from minidet.kernels.convolution.cpu.panels import padded, vectors_of
from minidet.kernels.convolution.cpu.plan import Plan, plan_of
from minidet.kernels.convolution.cpu.scratch import aligned, local, row_of_zeros
from minidet.kernels.convolution.geometry import Geometry
from minidet.kernels.parallel import parallel

BAND = 8
"""Rows of outputs, about, that share padded rows of the input: windows overlap, so fewer would be padded again."""

BLOCK = 256
"""Output pixels, about, that the gradient takes at a time: what they read stays in cache for all taps."""


def row_products(x, weight, memo: dict, geometry: Geometry, *, scale=None, bias=None, shortcut=NOTHING, relu=False):
    """`definition.convolve`, with a tap per row of the window; panels of weights are kept in `memo` as in direct.py.

    Shapes:
        x: (N, S, C)
        weight: (F, k, l, C)
        shortcut: (N * S' * F,), or empty for none
        returns: (N, S', F)
    """
    (N, S, C), (F, k, l, _) = x.shape, weight.shape  # noqa: E741
    panels = memo.get("cpu rows")
    if panels is None:
        panels = memo["cpu rows"] = _panels(weight.reshape(F, k, l * C))
    outputs = geometry.output_pixels
    y, epilogue, floor = aligned(N, outputs, F), epilogue_of(F, scale, bias), np.float32(0 if relu else -np.inf)
    flat, zeros = (x.reshape(-1), y.reshape(-1)), row_of_zeros(l * C)
    (down, right), dilation = geometry.stride, geometry.dilation[0]
    for (H, W), inside, (P, Q), outside in geometry.levels():
        if P < 1 or Q < 1:  # no window fits into this level
            continue
        bands, wide = -(-P // BAND), W + 2 * geometry.padding[1]
        plan = _row_plan(Q, k, dilation * wide, right)
        _band(
            N * bands, bands, *flat, S, inside.start, outputs, outside.start, H, W, C, P, Q, F, *geometry.padding,
            down, dilation * (k - 1) + 1, k, l * C, zeros, plan.tiles, plan.sources, plan.targets.reshape(-1),
            panels, shortcut, epilogue, floor,
        )  # fmt: skip
    return y


def _panels(weight):
    """(F, taps, depth) in the order of panels.py: so few weights that NumPy does it in less time than a launch."""
    F, taps, depth = weight.shape
    whole = np.zeros((taps, depth, padded(F)), np.float32)
    whole[:, :, :F] = weight.transpose(1, 2, 0)
    return np.concatenate([whole[:, :, f : f + WIDTH].reshape(-1) for f in range(0, F, WIDTH)])


@lru_cache(maxsize=64)
def _row_plan(Q: int, taps: int, tap: int, step: int) -> Plan:
    """A row of Q outputs, from padded pixels: a tap begins `tap` pixels behind the one before, a window `step`."""
    sources = np.arange(Q)[:, None] * step + np.arange(taps) * tap
    return plan_of([(np.arange(Q), sources, np.arange(taps))], 0, Q, 1)


@parallel
def _band(
    unit, bands, x, y, image_x, level_x, image_y, level_y, H, W, C, P, Q, outputs, top, left,
    down, high, taps, depth, zeros, tiles, sources, targets, panels, shortcut, epilogue, floor,
):  # fmt: skip
    """Some rows of outputs of one image; the first arguments count pixels."""
    n, band = unit // bands, unit % bands
    first, last, wide = band * P // bands, (band + 1) * P // bands, W + 2 * left
    rows = (last - first - 1) * down + high
    maps = local(rows * wide * C)
    _pad(x, (n * image_x + level_x) * C, H, W * C, first * down - top, rows, left * C, maps)
    for column in range(0, outputs, WIDTH):
        valid, panel = min(WIDTH, outputs - column), column * taps * depth
        vectors = vectors_of(valid)
        for p in range(first, last):
            for tile in range(len(tiles)):
                multiply_rows(  # what it fetches ahead is this panel, which stays in cache anyway
                    vectors, maps, C, zeros, sources, tiles[tile, 0], (p - first) * down * wide, taps, depth,
                    panels, panel, panel, y, shortcut, outputs, targets, tile * ROWS,
                    n * image_y + level_y + p * Q, column, valid, epilogue, floor, False, False,
                )  # fmt: skip


@inner
def _pad(x, begin, H, length, top, rows, left, maps):
    """Rows of a map from `top` on, each between zeros, and zeros above and below it; lengths count numbers."""
    wide = length + 2 * left
    for i in range(rows):
        line = maps[i * wide : (i + 1) * wide]
        if 0 <= top + i < H:
            line[:left] = 0
            line[left + length :] = 0
            row, copy = x[begin + (top + i) * length : begin + (top + i + 1) * length], line[left : left + length]
            for j in range(len(copy)):  # to assign slices, Numba compiles the message of an error too
                copy[j] = row[j]
        else:
            line[:] = 0


def row_gradients(x, gy, geometry: Geometry):
    """gweight[f, i, j, c] of `row_products`: outer products as in weight_gradient.py, but nothing is laid out.

    The windows' rows of neighbouring pixels overlap in memory, a step of a few numbers apart, and the register tile
    takes its rows from there, a number each; filters, of which there are more, are its vectors.  Every thread sums some
    of the rows of outputs into a copy of its own.

    Shapes:
        x: (N, S, C)
        gy: (N, S', F), F a multiple of LANES
        returns: (F, k, l, C)
    """
    (N, S, C), (_, outputs, F), (k, l) = x.shape, gy.shape, geometry.size  # noqa: E741
    units, depth = get_num_threads(), -(-l * C // FILTERS) * FILTERS
    sums = aligned(units, k, depth, F)
    sums.fill(0)
    flat = x.reshape(-1), gy.reshape(-1), sums.reshape(-1)
    for (H, W), inside, (P, Q), outside in geometry.levels():
        if P < 1 or Q < 1:
            continue
        _rows_unit(
            units, units, *flat, S, inside.start, outputs, outside.start, H, W, C, N * P, P, Q, F, *geometry.padding,
            *geometry.stride, geometry.dilation[0], k, depth,
        )  # fmt: skip
    return np.ascontiguousarray(sums.sum(axis=0)[:, : l * C].transpose(2, 0, 1)).reshape(F, k, l, C)


@parallel
def _rows_unit(
    unit, units, x, gy, sums, image_x, level_x, image_gy, level_gy, H, W, C, rows, P, Q, F, top, left,
    down, right, dilation, taps, depth,
):  # fmt: skip
    """A share of the rows of outputs of all images, a few at a time; the first arguments count pixels."""
    row, end = unit * rows // units, (unit + 1) * rows // units
    most, wide = max(1, BLOCK // Q), (W + 2 * left) * C
    high = dilation * (taps - 1) + 1
    maps = local(((most - 1) * down + high) * wide + depth)
    while row < end:
        n, p = row // P, row % P
        count = min(most, P - p, end - row)
        read = (count - 1) * down + high
        _pad(x, (n * image_x + level_x) * C, H, W * C, p * down - top, read, left * C, maps)
        maps[read * wide : read * wide + depth] = 0  # some may be read behind the last pixel, for nothing
        g = (n * image_gy + level_gy + p * Q) * F
        for tap in range(taps):
            for c in range(0, depth, FILTERS):
                for f in range(0, F, PAIR * LANES):
                    accumulate_rows(
                        min(PAIR, (F - f) // LANES), maps, tap * dilation * wide + c, right * C, down * wide,
                        gy, g + f, F, Q * F, Q, count, sums, ((unit * taps + tap) * depth + c) * F + f, F, True,
                    )  # fmt: skip
        row += count
