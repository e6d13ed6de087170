"""Winograd's weights: G w G' of every filter and channel, in the order in which the register tile reads them."""

from __future__ import annotations

import numpy as np
from numba import njit

from minidet.kernels.convolution.cpu.lanes import LANES, WIDTH
from minidet.kernels.convolution.cpu.microkernel import transpose_square
from minidet.kernels.convolution.cpu.panels import padded, vectors_of
from minidet.kernels.convolution.cpu.transform import TAPS, WEIGHT_2, WEIGHT_4, points, transform_vectors
from minidet.kernels.parallel import parallel


def transformed(weight, side: int, memo: dict, *, transposed: bool):
    """`panels.packed` of the transformed filters, their depth filled up to whole vectors, kept in `memo`.

    Shapes:
        weight: (F, 3, 3, C), outputs F and depth C; `transposed` swaps them and turns every filter around: the
            input gradient
        returns: flat, panels of (points, depth, vectors_of(outputs left) * LANES)
    """
    key = "cpu winograd", side, transposed
    if key not in memo:
        F, C = weight.shape[0], weight.shape[3]
        outputs, depth = (C, F) if transposed else (F, C)
        panels = np.empty(points(side) * padded(outputs) * padded(depth), dtype=np.float32)
        if depth % LANES:  # rows that no filter or channel has
            panels[:] = 0
        unit, blocks = _turned if transposed else _straight, -(-outputs // LANES)
        unit(blocks, weight.reshape(-1), F, C, outputs, padded(depth), panels, side)
        memo[key] = panels
    return memo[key]


@parallel
def _straight(block, weight, F, C, outputs, depth, panels, side):
    """Outputs are filters: LANES of them are transformed side by side and then transposed."""
    first = block * LANES
    square = np.zeros(points(side) * LANES * LANES, dtype=np.float32)
    place, width = _place(first, outputs, depth, side)
    for c in range(0, C, LANES):
        for f in range(min(LANES, F - first)):
            _transform(weight, (first + f) * TAPS * TAPS * C + c, C, C - c, square, f * LANES, LANES * LANES, side)
        for q in range(points(side)):
            target = place + (q * depth + c) * width
            transpose_square(panels, target, width, square, q * LANES * LANES, LANES, LANES)


@parallel
def _turned(block, weight, F, C, outputs, depth, panels, side):
    """Outputs are channels, which lie side by side already; the last tap comes first."""
    first = block * LANES
    place, width = _place(first, outputs, depth, side)
    for f in range(F):
        last = (f * TAPS * TAPS + TAPS * TAPS - 1) * C + first
        _transform(weight, last, -C, C - first, panels, place + f * width, depth * width, side)


@njit
def _transform(weight, start, pitch, channels, target, to, apart, side):
    if side == 4:
        transform_vectors(weight, start, pitch, channels, target, to, apart, LANES, WEIGHT_4)
    else:
        transform_vectors(weight, start, pitch, channels, target, to, apart, LANES, WEIGHT_2)


@njit
def _place(first, outputs, depth, side):
    """Where output `first`, a multiple of LANES, stands at the panels' first point, and its panel's width."""
    column = first // WIDTH * WIDTH
    width = vectors_of(outputs - column) * LANES
    return column * points(side) * depth + first - column, width
