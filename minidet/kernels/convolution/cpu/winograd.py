"""Winograd's convolution: 3x3 at stride 1 with a quarter of the multiplications.

Some tiles at a time, so that everything stays in cache: gather and transform their inputs, multiply a small
matrix per point (the register tile again, with one tap), transform and store their outputs.  The tiles of all
levels and images stand in one table, so a pyramid is one call.

The input gradient is the same with every filter turned around.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numba import get_num_threads, njit

from minidet.kernels.convolution.cpu.direct import epilogue_of
from minidet.kernels.convolution.cpu.lanes import LANES, ROWS, VECTORS, WIDTH
from minidet.kernels.convolution.cpu.microkernel import multiply_tile
from minidet.kernels.convolution.cpu.panels import padded
from minidet.kernels.convolution.cpu.plan import NOWHERE
from minidet.kernels.convolution.cpu.transform import (
    INPUT_2,
    INPUT_4,
    OUTPUT_2,
    OUTPUT_4,
    TAPS,
    points,
    scatter_outputs,
    transform_pixels,
)
from minidet.kernels.convolution.geometry import Geometry
from minidet.kernels.parallel import parallel

CACHE = 80 << 10
"""float32 numbers of transformed inputs and products that a block of tiles may have: a core's second-level cache."""

HEAVY = 1 << 20
"""Transformed weights that are more than so many numbers come from the last cache or from memory: each is fetched for
as many tiles as possible, though their inputs then leave the second-level cache."""

PIXELS_PER_TILE = 8
"""A tile of 4x4 costs 36 products and its transforms, a pixel 9 products: below this the direct way is cheaper."""

LEAST_TILES = 32
"""With fewer, transforming the weights costs more than is saved."""

MANY_WEIGHTS = 1 << 18
"""From so many channels times filters on, 36 numbers for each leave the last cache, and 16 are better."""


@dataclass(frozen=True, eq=False)
class Tiling:
    """The tiles of all images: patches (T, (side + 2)**2) and targets (T, side**2), flat int32 pixels or NOWHERE."""

    side: int
    tiles: int
    patches: np.ndarray
    targets: np.ndarray


@lru_cache(maxsize=1024)
def worthwhile(geometry: Geometry, images: int, weights: int, side: int) -> bool:
    """Whether a 3x3 convolution at stride 1 has enough, and full enough, tiles; and not too many weights for 4x4."""
    if geometry.size != (3, 3) or geometry.stride != (1, 1) or geometry.dilation != (1, 1):
        return False
    tiles = sum(-(-P // 4) * -(-Q // 4) for P, Q in geometry.output_maps)
    enough = images * tiles >= LEAST_TILES and geometry.output_pixels >= PIXELS_PER_TILE * tiles
    return enough and (side == 2 or weights < MANY_WEIGHTS)


@lru_cache(maxsize=1024)
def spread(geometry: Geometry) -> Geometry:
    """The convolution of dL/dy that makes dL/dx: outputs and inputs trade places."""
    return replace(geometry, maps=geometry.output_maps, padding=tuple(2 - pad for pad in geometry.padding))


@lru_cache(maxsize=64)
def tiling(geometry: Geometry, images: int, side: int) -> Tiling:
    """Every level cut into square tiles of outputs; those at the lower and right edge may be partly empty."""
    patches, targets = [], []
    for (H, W), inside, (P, Q), outside in geometry.levels():
        p, q = np.arange(0, P, side), np.arange(0, Q, side)
        down, right = geometry.padding
        patches.append(_squares(p - down, q - right, side + TAPS - 1, H, W, inside.start))
        targets.append(_squares(p, q, side, P, Q, outside.start))
    return Tiling(
        side,
        images * sum(map(len, patches)),
        _every_image(np.concatenate(patches), geometry.pixels, images),
        _every_image(np.concatenate(targets), geometry.output_pixels, images),
    )


def _squares(rows, columns, side: int, H: int, W: int, start: int) -> np.ndarray:
    """Squares of `side` pixels with these upper left corners: (corners, side * side)."""
    h = rows[:, None, None, None] + np.arange(side)[:, None]
    w = columns[:, None, None] + np.arange(side)
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
    return np.where(inside, start + h * W + w, NOWHERE).reshape(-1, side * side)


def _every_image(pixels: np.ndarray, step: int, images: int) -> np.ndarray:
    """The same table for every image, whose pixels are `step` further on: flat."""
    shifted = pixels + step * np.arange(images)[:, None, None]
    return np.where(pixels == NOWHERE, NOWHERE, shifted).astype(np.int32).reshape(-1)


def tiled_product(x, plan: Tiling, panels, pixels: int, outputs: int, *, scale=None, bias=None, relu=False):
    """act(bias + scale * convolution) with `panels` of transformed weights (filters.py).

    Shapes:
        x: (N, S, C)
        returns: (N, pixels, outputs)
    """
    N, _, C = x.shape
    y = np.empty((N, pixels, outputs), dtype=np.float32)
    many = points(plan.side)
    if many * C * outputs > HEAVY:
        block, span = 8 * ROWS, 4 * WIDTH
    else:
        block, span = ROWS * min(8, max(2, CACHE // (many * (padded(C) + WIDTH) * ROWS))), WIDTH
    units = get_num_threads()
    _unit(
        units, units, plan.tiles, x.reshape(-1), C, np.zeros(padded(C), np.float32), plan.patches, plan.targets,
        panels, y.reshape(-1), outputs, epilogue_of(outputs, scale, bias), epilogue_of(span, None, None),
        np.arange(ROWS, dtype=np.int32), np.float32(0 if relu else -np.inf), block, span, plan.side,
    )  # fmt: skip
    return y


@parallel
def _unit(
    unit, units, tiles, x, C, zeros, patches, targets, panels, y, outputs, epilogue, neutral, identity, floor,
    block, span, side,
):  # fmt: skip
    """A share of the tiles, a block at a time."""
    begin, end = unit * tiles // units, (unit + 1) * tiles // units
    depth, many = len(zeros), points(side)
    # A tile is written to all points at once.  At distances of a power of two those places would share one set of
    # the cache: so rows are a vector longer, and points a row further apart, than they need to be.
    pitch, step = depth + LANES, block + 1
    inputs = np.zeros(many * step * pitch, dtype=np.float32)
    products = np.empty(many * step * span, dtype=np.float32)
    for first in range(begin, end, block):
        # Behind the last tile of a block lie old numbers: multiplied along with it, never stored.
        count = min(block, end - first)
        for t in range(count):
            for c in range(0, C, LANES):
                gather(side, x, C, zeros, patches, first + t, c, inputs, t * pitch + c, step * pitch)
        for start in range(0, outputs, span):
            stop = min(start + span, outputs)
            for q in range(many):
                for column in range(start, stop, WIDTH):
                    width = WIDTH if outputs - column > LANES else LANES
                    panel = (column * many + q * width) * depth
                    for t in range(q * step, q * step + count, ROWS):
                        if width == WIDTH:
                            multiply_tile(
                                inputs, pitch, zeros, identity, 0, t, 1, depth, panels, panel, products, span,
                                identity, 0, t, column - start, WIDTH, neutral, -np.float32(np.inf), ROWS, VECTORS,
                            )  # fmt: skip
                        else:
                            multiply_tile(
                                inputs, pitch, zeros, identity, 0, t, 1, depth, panels, panel, products, span,
                                identity, 0, t, column - start, LANES, neutral, -np.float32(np.inf), ROWS, 1,
                            )  # fmt: skip
            for t in range(count):
                for column in range(start, stop, LANES):
                    _scatter(
                        side, products, t * span + column - start, step * span, y, outputs, targets, first + t, column,
                        epilogue, floor,
                    )  # fmt: skip


@njit
def gather(side, x, C, zeros, patches, tile, channel, target, to, apart):
    """The transformed inputs of a tile, LANES channels of them, to every `apart` numbers of `target`."""
    if side == 4:
        transform_pixels(x, C, zeros, patches, tile * points(4), channel, target, to, apart, INPUT_4)
    else:
        transform_pixels(x, C, zeros, patches, tile * points(2), channel, target, to, apart, INPUT_2)


@njit
def _scatter(side, products, start, apart, y, outputs, targets, tile, column, epilogue, floor):
    if side == 4:
        scatter_outputs(products, start, apart, y, outputs, targets, tile * 16, column, epilogue, floor, OUTPUT_4)
    else:
        scatter_outputs(products, start, apart, y, outputs, targets, tile * 4, column, epilogue, floor, OUTPUT_2)
