"""Weights in the order in which the register tile reads them."""

from __future__ import annotations

from numba.extending import register_jitable

from minidet.kernels.convolution.cpu.lanes import LANES, VECTORS, WIDTH
from minidet.kernels.convolution.cpu.microkernel import copy_run, transpose_square
from minidet.kernels.convolution.cpu.scratch import aligned
from minidet.kernels.parallel import parallel


def packed(weight, order, memo: dict, *, transposed: bool):
    """`weight` as panels of WIDTH outputs each, kept in `memo` while the weights do not change.

    A panel holds, tap by tap in `order` and input channel by input channel, the weights of WIDTH
    neighbouring outputs; missing outputs are zeros, and the last panel has only as many vectors as it needs.

    Shapes:
        weight: (F, taps, C), outputs F and depth C; `transposed` swaps them: the input gradient
        returns: flat, panels of (taps, depth, vectors_of(outputs left) * LANES)
    """
    key = "cpu panels", weight.shape, transposed
    if key not in memo:
        F, T, C = weight.shape
        outputs, depth = (C, F) if transposed else (F, C)
        output_stride, depth_stride = (1, T * C) if transposed else (T * C, 1)
        panels = aligned(padded(outputs) * T * depth)
        blocks = -(-outputs // WIDTH) * len(order)
        _pack_block(blocks, weight.reshape(-1), order, panels, outputs, depth, output_stride, C, depth_stride)
        memo[key] = panels
    return memo[key]


def padded(outputs: int) -> int:
    """`outputs` rounded up to whole vectors."""
    return -(-outputs // LANES) * LANES


@register_jitable
def vectors_of(outputs):
    """Vectors of a panel behind whose first column there are so many."""
    return min(VECTORS, (outputs + LANES - 1) // LANES)


@parallel
def _pack_block(block, weight, order, panels, outputs, depth, output_stride, tap_stride, depth_stride):
    """One tap of one panel, in squares of LANES x LANES where they are whole."""
    taps = len(order)
    panel, tap = block // taps, block % taps
    first = panel * WIDTH
    width = vectors_of(outputs - first) * LANES
    begin = (first * taps + tap * width) * depth
    for j in range(0, width, LANES):
        valid = min(LANES, outputs - first - j)
        for k in range(0, depth, LANES):
            target = begin + k * width + j
            source = (first + j) * output_stride + order[tap] * tap_stride + k * depth_stride
            if valid == LANES and k + LANES <= depth:
                if depth_stride == 1:
                    transpose_square(panels, target, width, weight, source, output_stride, LANES)
                else:
                    for i in range(LANES):
                        copy_run(panels, target + i * width, weight, source + i * depth_stride, LANES)
            else:
                for i in range(min(LANES, depth - k)):
                    for o in range(LANES):
                        value = weight[source + o * output_stride + i * depth_stride] if o < valid else 0
                        panels[target + i * width + o] = value
