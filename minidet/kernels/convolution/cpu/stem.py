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
from minidet.kernels.convolution.geometry import Geometry


def padded_maps(x, geometry: Geometry):
    """Every level of `x` with its border of zeros: (N, pixels of the padded maps, C).

    Behind it in memory lie LANES zeros, so that a whole vector may be read at the last pixel.
    """
    N, _, C = x.shape
    wide = _padded(geometry)
    y = np.zeros(N * wide.pixels * C + LANES, dtype=x.dtype)[:-LANES].reshape(N, wide.pixels, C)
    down, right = geometry.padding
    for (H, W), inside, (P, Q), place in _pairs(geometry, wide):
        level = y[:, place, :].reshape(N, P, Q, C)
        level[:, down : down + H, right : right + W] = x[:, inside, :].reshape(N, H, W, C)
    return y


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


def _pairs(geometry: Geometry, wide: Geometry):
    """Of every level: its map and place, and its padded map and place."""
    for (map_, inside, _, _), (wide_map, place, _, _) in zip(geometry.levels(), wide.levels(), strict=True):
        yield map_, inside, wide_map, place
