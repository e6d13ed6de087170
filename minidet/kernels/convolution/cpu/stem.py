"""A convolution over few channels, such as the first one over a photo's three.

The pixels of one window row lie side by side in memory.  Once the maps are padded, a row of k pixels of C
channels is one tap of k*C channels: a 7x7 filter over 3 channels becomes 7 taps of 21.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
from numba import get_num_threads

from minidet.kernels.convolution.cpu.lanes import FILTERS, LANES, PAIR
from minidet.kernels.convolution.cpu.microkernel import accumulate_rows, accumulate_tile
from minidet.kernels.convolution.cpu.panels import padded
from minidet.kernels.convolution.cpu.plan import Plan, plan_of, sources_of
from minidet.kernels.convolution.cpu.scratch import aligned, scratch
from minidet.kernels.convolution.geometry import Geometry
from minidet.kernels.parallel import parallel


def padded_maps(x, geometry: Geometry):
    """Every level of `x` with its border of zeros: (N, pixels of the padded maps, C), in scratch memory.

    Behind it in memory lie LANES zeros, so that a whole vector may be read at the last pixel.
    """
    N, S, C = x.shape
    wide = _padded(geometry)
    size = N * wide.pixels * C
    y = scratch("padded maps", size + LANES)
    y[size:] = 0
    for ((_, W), inside, _, _), ((P, Q), place, _, _) in zip(geometry.levels(), wide.levels(), strict=True):
        begin, shift, down, right = inside.start * C, place.start * C, geometry.padding[0], geometry.padding[1] * C
        _pad_row(N * P, P, x.reshape(-1), S * C, begin, W * C, y, wide.pixels * C, shift, Q * C, down, right)
    return y[:size].reshape(N, wide.pixels, C)


@parallel
def _pad_row(unit, P, x, image, begin, length, y, wide_image, shift, wide_length, down, right):
    """A row of a padded map; lengths and places count numbers, not pixels."""
    n, p = unit // P, unit % P
    start = n * wide_image + shift + p * wide_length
    stop = start + wide_length
    if down <= p < P - down:
        inside, source = start + right, n * image + begin + (p - down) * length
        y[start:inside] = 0
        for i in range(length):  # to copy slices, Numba compiles the message of an error too
            y[inside + i] = x[source + i]
        y[inside + length : stop] = 0
    else:
        y[start:stop] = 0


BLOCK = 256
"""Output pixels of a block, about: what they read stays in the first-level cache for all taps and filters."""


def row_products(x, gy, geometry: Geometry):
    """gweight[f, i, j, c] of `stem`: outer products as in weight_gradient.py, but nothing is laid out.

    The windows' rows of neighbouring pixels overlap in memory, a step of a few numbers apart, and the register tile
    takes them from there.  Every thread sums some of the rows of outputs into a copy of its own.

    Shapes:
        x: padded maps (N, S, C)
        gy: (N, S', F), F a multiple of FILTERS
        returns: (F, k, l, C)
    """
    (N, S, C), (_, outputs, F), (k, l) = x.shape, gy.shape, geometry.size  # noqa: E741
    vectors, units = padded(l * C) // LANES, get_num_threads()
    sums = aligned(units, F, k * vectors * LANES)
    sums.fill(0)
    (down, right), flat = geometry.stride, (x.reshape(-1), gy.reshape(-1), sums.reshape(-1))
    for (_, W), inside, (P, Q), outside in _padded(geometry).levels():
        if P < 1 or Q < 1:  # no window fits into this level
            continue
        row, first = W * C, (inside.start * C, outside.start * F)
        steps = down * row, right * C, geometry.dilation[0] * row
        _rows_unit(units, units, N * P, P, Q, F, k, vectors, *first, S * C, outputs * F, *steps, *flat)
    return np.ascontiguousarray(sums.sum(axis=0).reshape(F, k, -1)[:, :, : l * C]).reshape(F, k, l, C)


@parallel
def _rows_unit(
    unit, units, rows, P, Q, F, taps, vectors, first_x, first_gy, image_x, image_gy, down, right, tap_step, x, gy, sums
):  # fmt: skip
    """A share of the rows of outputs of all images; steps in x count numbers."""
    row, end = unit * rows // units, (unit + 1) * rows // units
    columns = taps * vectors * LANES
    while row < end:
        n, p = row // P, row % P
        count = min(max(1, BLOCK // Q), P - p, end - row)
        a, b = n * image_gy + first_gy + p * Q * F, n * image_x + first_x + p * down
        for tap in range(taps):
            v = 0
            while v < vectors:
                place, target = b + tap * tap_step + v * LANES, unit * F * columns + (tap * vectors + v) * LANES
                if vectors - v == 3:  # such as 7 pixels of 3 colours in vectors of 8: one would be left, at half speed
                    for f in range(0, F, FILTERS):
                        accumulate_tile(
                            gy, a + f, F, Q * F, x, place, right, down, Q, count, sums, target + f * columns, columns,
                            FILTERS, 3,
                        )  # fmt: skip
                    break
                for f in range(0, F, FILTERS):
                    accumulate_rows(
                        min(PAIR, vectors - v), gy, a + f, F, Q * F, x, place, right, down,
                        Q, count, sums, target + f * columns, columns,
                    )  # fmt: skip
                v += PAIR
        row += count


@lru_cache(maxsize=64)
def row_plan(geometry: Geometry, images: int) -> Plan:
    """`plan.forward_plan` with a tap per row of the window, over padded maps."""
    wide = _padded(geometry)
    sources = sources_of(wide)[:, :: geometry.size[1]]  # the first pixel of each row
    phase = np.arange(len(sources)), sources, np.arange(geometry.size[0])
    return plan_of([phase], wide.pixels, geometry.output_pixels, images)


def _padded(geometry: Geometry) -> Geometry:
    """The same convolution over maps that already contain their padding."""
    down, right = geometry.padding
    maps = tuple((H + 2 * down, W + 2 * right) for H, W in geometry.maps)
    return replace(geometry, maps=maps, padding=(0, 0))
