"""Winograd's weights: G w G' of every filter and channel, in the order in which the register tile reads them."""

from __future__ import annotations

import numpy as np
from numba import njit

from minidet.kernels.compiler import inner
from minidet.kernels.convolution.cpu.lanes import GAP, LANES, WIDTH
from minidet.kernels.convolution.cpu.microkernel import copy_run, transpose_square
from minidet.kernels.convolution.cpu.panels import padded, vectors_of
from minidet.kernels.convolution.cpu.scratch import aligned
from minidet.kernels.convolution.cpu.transform import TAPS, WEIGHT_2, WEIGHT_4, points, transform_vectors


def room_for(side: int, outputs: int, depth: int):
    """Memory for `transform_run`'s panels: flat, (points, padded depth, vectors_of(outputs left) * LANES) each."""
    return aligned(points(side) * padded(outputs) * padded(depth))


def runs_of(outputs: int, depth: int) -> int:
    """How many runs the panels have."""
    return -(-outputs // WIDTH) * (padded(depth) // LANES)


@njit(inline="always")  # compiled where it is called, and not a second time by itself
def transform_run(unit, weight, outputs, C, turned, panels, side):
    """LANES rows of a panel, all points of them: as in panels.py, the depth filled up to whole vectors.

    `weight` is (outputs, 3, 3, C), or, `turned`, (C, 3, 3, outputs): the input gradient, with every filter turned
    around.

    They are gathered in cache, point by point, and then copied: in the panels a point is as far from the next as
    a whole matrix, often a power of two, and lines that are written in turn there would displace each other.
    """
    depth, many = (C + LANES - 1) // LANES * LANES, points(side)
    runs = depth // LANES
    first, begin = unit // runs * WIDTH, unit % runs * LANES
    width = vectors_of(outputs - first) * LANES
    apart = LANES * width + GAP
    block = np.empty(many * apart, dtype=np.float32)
    squares = np.empty(TAPS * TAPS * LANES**2, dtype=np.float32)
    for j in range(0, width, LANES):
        if turned:  # outputs are channels, which lie side by side already; the last tap comes first
            for i in range(LANES):
                f, last = begin + i, ((begin + i) * TAPS * TAPS + TAPS * TAPS - 1) * outputs + first + j
                valid = outputs - first - j if f < C else 0
                _transform(weight, last, -outputs, valid, block, i * width + j, apart, side)
        else:
            for tap in range(TAPS * TAPS):
                _transpose(weight, outputs, C, first + j, tap, begin, squares, tap * LANES**2)
            for i in range(LANES):
                _transform(squares, i * LANES, LANES**2, LANES, block, i * width + j, apart, side)
    for q in range(many):
        target = (first * many + q * width) * depth + begin * width
        for k in range(0, LANES * width, LANES):
            copy_run(panels, target + k, block, q * apart + k, LANES)


@inner
def _transpose(weight, F, C, f, tap, c, target, to):
    """target[to + i*LANES + j] = weight[f + j, tap, c + i], or zero where there is no such filter or channel."""
    if f + LANES <= F and c + LANES <= C:
        transpose_square(target, to, LANES, weight, (f * TAPS * TAPS + tap) * C + c, TAPS * TAPS * C, LANES)
    else:
        for i in range(LANES):
            for j in range(LANES):
                inside = f + j < F and c + i < C
                target[to + i * LANES + j] = weight[((f + j) * TAPS * TAPS + tap) * C + c + i] if inside else 0


@inner
def _transform(weight, start, pitch, channels, target, to, apart, side):
    if side == 4:
        transform_vectors(weight, start, pitch, channels, target, to, apart, LANES, WEIGHT_4)
    else:
        transform_vectors(weight, start, pitch, channels, target, to, apart, LANES, WEIGHT_2)
