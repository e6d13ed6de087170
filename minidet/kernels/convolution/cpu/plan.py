"""The geometry of a convolution as a table: which pixels make which pixel.

Forward and input gradient are the same computation, "every output pixel is a sum over taps of an input
pixel times that tap's weights", with other tables.  So stride, padding, dilation, levels and the parity
of a strided gradient live here, in NumPy, computed once per shape; the compiled loops know only tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from minidet.kernels.convolution.cpu.lanes import ROWS
from minidet.kernels.convolution.geometry import Geometry

NOWHERE = -1
"""The source of a tap that falls outside of the map: it reads zeros."""

WASTE = 1.03
"""A plan covers more images than one until at most this share of its rows is padding."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Tiles of ROWS output pixels, for `images` images; N images repeat it N / images times.

    tiles: (tiles, 3) int64        where a tile's sources begin, its first tap in `order`, its taps
    sources: flat int32            per tile (taps, ROWS): the input pixel, or NOWHERE
    targets: (tiles, ROWS) int32   the output pixel; a tile that is not full repeats its last pixel
    order: (taps,) int64           the taps, those of a tile next to each other
    most: taps of a tile, at most
    read, written: pixels of the input and the output, over all images of the plan
    """

    images: int
    tiles: np.ndarray
    sources: np.ndarray
    targets: np.ndarray
    order: np.ndarray
    most: int
    read: int
    written: int


@lru_cache(maxsize=256)
def forward_plan(geometry: Geometry, images: int) -> Plan:
    """y[n, o] = sum_t x[n, source[o, t]] * w[t] for every output pixel o, in order."""
    targets = np.arange(geometry.output_pixels)
    phase = targets, sources_of(geometry), np.arange(geometry.taps)
    return plan_of([phase], geometry.pixels, geometry.output_pixels, images)


@lru_cache(maxsize=256)
def input_gradient_plan(geometry: Geometry, images: int) -> Plan:
    """gx[n, s] = sum_t gy[n, source[s, t]] * w[t] for every input pixel s.

    With a stride, a pixel was read by only some of the taps, always the same ones for pixels whose row
    and column have the same remainders: each such phase is a convolution of its own, with fewer taps.
    """
    down, right = geometry.stride
    phases = []
    for phase in np.ndindex(down, right):
        rows = _readers(phase[0], geometry, 0)
        columns = _readers(phase[1], geometry, 1)
        taps = (rows[:, None] * geometry.size[1] + columns).ravel()
        targets, sources = [], []
        for (H, W), inside, (P, Q), output_inside in geometry.levels():
            h, w = np.arange(phase[0], H, down), np.arange(phase[1], W, right)
            p = (h[:, None] + geometry.padding[0] - rows * geometry.dilation[0]) // down
            q = (w[:, None] + geometry.padding[1] - columns * geometry.dilation[1]) // right
            targets.append((inside.start + h[:, None] * W + w).ravel())
            sources.append(_pixels(p, q, P, Q, output_inside.start))
        phases.append((np.concatenate(targets), np.concatenate(sources), taps))
    return plan_of(phases, geometry.output_pixels, geometry.pixels, images)


def sources_of(geometry: Geometry) -> np.ndarray:
    """The input pixel that each tap of each output pixel reads: (S', taps)."""
    offsets = [np.arange(k) * d for k, d in zip(geometry.size, geometry.dilation, strict=True)]
    levels = []
    for (H, W), inside, (P, Q), _ in geometry.levels():
        h = np.arange(P)[:, None] * geometry.stride[0] - geometry.padding[0] + offsets[0]
        w = np.arange(Q)[:, None] * geometry.stride[1] - geometry.padding[1] + offsets[1]
        levels.append(_pixels(h, w, H, W, inside.start))
    return np.concatenate(levels)


def plan_of(phases, read: int, written: int, images: int) -> Plan:
    """Cut (targets, sources, taps) of one image into tiles, over as many images as fill them well."""
    images = _covered([len(targets) for targets, _, _ in phases], images)
    shift = np.arange(images)[:, None]
    tiles, all_sources, all_targets, order = [], [], [], []
    position = first_tap = 0
    for targets, sources, taps in phases:
        if len(targets):
            targets = _whole_tiles((targets + shift * written).ravel())
            T = len(taps)
            sources = np.where(sources == NOWHERE, NOWHERE, sources + shift[..., None] * read)
            sources = _whole_tiles(sources.reshape(sources.shape[0] * sources.shape[1], T))
            sources = sources.reshape(len(targets) // ROWS, ROWS, T).transpose(0, 2, 1)
            starts = position + np.arange(len(sources)) * T * ROWS
            tiles.append(np.stack(np.broadcast_arrays(starts, first_tap, T), axis=1))
            all_sources.append(sources.ravel())
            all_targets.append(targets.reshape(-1, ROWS))
            position += sources.size
        order.append(taps)
        first_tap += len(taps)
    return Plan(
        images=images,
        tiles=np.concatenate(tiles).astype(np.int64),
        sources=np.concatenate(all_sources).astype(np.int32),
        targets=np.concatenate(all_targets).astype(np.int32),
        order=np.concatenate(order).astype(np.int64),
        most=max((len(taps) for targets, _, taps in phases if len(targets)), default=0),
        read=images * read,
        written=images * written,
    )


def _pixels(h, w, H: int, W: int, start: int) -> np.ndarray:
    """Rows h (P, k) and columns w (Q, l) -> pixel numbers (P * Q, k * l), NOWHERE outside of H x W."""
    (P, k), (Q, l) = h.shape, w.shape  # noqa: E741
    inside = ((h >= 0) & (h < H))[:, None, :, None] & ((w >= 0) & (w < W))[None, :, None, :]
    pixel = start + h[:, None, :, None] * W + w[None, :, None, :]
    return np.where(inside, pixel, NOWHERE).reshape(P * Q, k * l)


def _readers(phase: int, geometry: Geometry, axis: int) -> np.ndarray:
    """The taps along one axis that ever read a pixel whose position has remainder `phase`."""
    taps = np.arange(geometry.size[axis])
    shift = phase + geometry.padding[axis] - taps * geometry.dilation[axis]
    return taps[shift % geometry.stride[axis] == 0]


def _covered(pixels: list[int], images: int) -> int:
    """The smallest divisor of `images` for which the padding of tiles is small."""
    for covered in range(1, images):
        if images % covered == 0:
            padded = sum(-(-n * covered // ROWS) * ROWS for n in pixels)
            if padded <= WASTE * covered * sum(pixels):
                return covered
    return images


def _whole_tiles(rows: np.ndarray) -> np.ndarray:
    """Repeat the last row until the number of rows is a multiple of ROWS."""
    missing = -len(rows) % ROWS
    return np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)])
