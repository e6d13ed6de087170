"""A convolution over few channels, such as the first one over a photo's three.

The pixels of one window row lie side by side in memory.  Once the maps are padded, a row of k pixels of C
channels is one tap of k*C channels: a 7x7 filter over 3 channels becomes 7 taps of 21.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from minidet.kernels.convolution.cpu.lanes import LANES
from minidet.kernels.convolution.cpu.plan import Plan, plan_of, sources_of
from minidet.kernels.convolution.cpu.scratch import scratch
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
    row = y[n * wide_image + shift + p * wide_length :][:wide_length]
    if down <= p < P - down:
        row[:right] = 0
        row[right : right + length] = x[n * image + begin + (p - down) * length :][:length]
        row[right + length :] = 0
    else:
        row[:] = 0


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
