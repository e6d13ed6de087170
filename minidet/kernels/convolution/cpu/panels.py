"""Weights in the order in which the register tile reads them.

A panel holds, tap by tap and input channel by input channel, the weights of WIDTH neighbouring outputs; missing outputs
are zeros, and the last panel has only as many vectors as it needs.
"""

from __future__ import annotations

from numba import njit
from numba.extending import register_jitable

from minidet.kernels.convolution.cpu.lanes import LANES, VECTORS, WIDTH
from minidet.kernels.convolution.cpu.microkernel import copy_run, transpose_square


def padded(outputs: int) -> int:
    """`outputs` rounded up to whole vectors."""
    return -(-outputs // LANES) * LANES


@register_jitable
def vectors_of(outputs):
    """Vectors of a panel behind whose first column there are so many."""
    return min(VECTORS, (outputs + LANES - 1) // LANES)


@njit(inline="always")  # compiled where it is called, and not a second time by itself
def pack_tap(panel, tap, weight, order, panels, outputs, depth, turned):
    """One tap of one panel, in squares of LANES x LANES where they are whole.

    `weight` is (outputs, taps, depth), or, `turned`, (depth, taps, outputs); `order` says which tap comes when.
    """
    taps, all_taps = len(order), len(weight) // (outputs * depth)  # some may meet no pixel
    strides = (1, outputs, all_taps * outputs) if turned else (all_taps * depth, depth, 1)
    output_stride, tap_stride, depth_stride = strides
    first = panel * WIDTH
    width = vectors_of(outputs - first) * LANES
    begin = (first * taps + tap * width) * depth
    for k in range(0, depth, LANES):
        for j in range(0, width, LANES):
            valid = min(LANES, outputs - first - j)
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
