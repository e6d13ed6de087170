"""Winograd's convolution: 3x3 at stride 1 with a quarter of the multiplications.

A few tiles at a time, so that everything stays in cache: gather and transform their inputs, multiply 36
small matrices (the register tile again, with one tap), transform and store their outputs.  The tiles of
all levels and images stand in one table, so a pyramid is one call.

The input gradient is the same with every filter turned around.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numba import get_num_threads, njit, prange

from minidet.kernels.convolution.cpu.direct import epilogue_of
from minidet.kernels.convolution.cpu.lanes import LANES, ROWS, VECTORS, WIDTH
from minidet.kernels.convolution.cpu.microkernel import multiply_tile
from minidet.kernels.convolution.cpu.panels import packed
from minidet.kernels.convolution.cpu.plan import NOWHERE
from minidet.kernels.convolution.cpu.transform import (
    INPUTS,
    OUTPUTS,
    both_ways,
    gather_inputs,
    scatter_outputs,
    weight_transform,
)
from minidet.kernels.convolution.geometry import Geometry

POINTS = INPUTS * INPUTS
BLOCK = 2 * ROWS
"""Tiles in a block: their transformed inputs, 36 numbers per channel each, fit the second-level cache."""

STEP = BLOCK + 1
"""Rows from one point to the next: a tile is written to all 36 points at once, and at a distance of a power
of two those places would share one set of the cache."""

PIXELS_PER_TILE = 8
"""A tile costs 36 products and its transforms, a pixel 9 products: below this the direct way is cheaper."""

LEAST_TILES = 128
"""With fewer, transforming the weights costs more than is saved."""


@dataclass(frozen=True, eq=False)
class Tiling:
    """The tiles of all images: patches (T, 36) and targets (T, 16), flat int32 pixels or NOWHERE."""

    tiles: int
    patches: np.ndarray
    targets: np.ndarray


def worthwhile(geometry: Geometry, images: int) -> bool:
    """Whether a 3x3 convolution at stride 1 has enough, and full enough, tiles."""
    if geometry.size != (3, 3) or geometry.stride != (1, 1) or geometry.dilation != (1, 1):
        return False
    tiles = sum(-(-P // OUTPUTS) * -(-Q // OUTPUTS) for P, Q in geometry.output_maps)
    return images * tiles >= LEAST_TILES and geometry.output_pixels >= PIXELS_PER_TILE * tiles


def fits(depth: int, outputs: int) -> bool:
    """Whether channels fill whole vectors, and outputs whole panels but for the tail of a vector."""
    return depth % LANES == 0 and (outputs - 1) % WIDTH >= LANES


def spread(geometry: Geometry) -> Geometry:
    """The convolution of dL/dy that makes dL/dx: outputs and inputs trade places."""
    return replace(geometry, maps=geometry.output_maps, padding=tuple(2 - pad for pad in geometry.padding))


@lru_cache(maxsize=64)
def tiling(geometry: Geometry, images: int) -> Tiling:
    """Every level cut into tiles of 4x4 outputs; those at the lower and right edge may be partly empty."""
    patches, targets = [], []
    for (H, W), inside, (P, Q), outside in geometry.levels():
        p, q = np.arange(0, P, OUTPUTS), np.arange(0, Q, OUTPUTS)
        down, right = geometry.padding
        patches.append(_squares(p - down, q - right, INPUTS, H, W, inside.start))
        targets.append(_squares(p, q, OUTPUTS, P, Q, outside.start))
    return Tiling(
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


def transformed(weight, memo: dict, *, transposed: bool):
    """G w G' of every filter and channel, in panels; of filters turned around for the input gradient."""
    key = "cpu winograd", transposed
    if key not in memo:
        F, C = weight.shape[0], weight.shape[3]
        taps = weight[:, ::-1, ::-1] if transposed else weight
        points = np.matmul(_WEIGHT_MATRIX, taps.reshape(F, 9, C))               # (F, 36, C)
        memo[key] = packed(points, np.arange(POINTS), {}, transposed=transposed)
    return memo[key]


def _weight_matrix() -> np.ndarray:
    """What G w G' does to the nine weights of a filter: (36, 9)."""
    units = np.eye(9).reshape(3, 3, 9)
    return np.array(both_ways(weight_transform, units)).reshape(POINTS, 9).astype(np.float32)


_WEIGHT_MATRIX = _weight_matrix()


def tiled_product(x, plan: Tiling, panels, pixels: int, outputs: int, *, scale=None, bias=None, relu=False):
    """act(bias + scale * convolution) with `panels` of transformed weights.

    Shapes:
        x: (N, S, C)
        returns: (N, pixels, outputs)
    """
    N, _, C = x.shape
    y = np.empty((N, pixels, outputs), dtype=np.float32)
    blocks = -(-plan.tiles // BLOCK)
    threads = get_num_threads()
    _run(
        threads if blocks <= 4 * threads else blocks, plan.tiles, x.reshape(-1), C, np.zeros(C, np.float32),
        plan.patches, plan.targets, panels, y.reshape(-1), outputs, epilogue_of(outputs, scale, bias),
        epilogue_of(WIDTH, None, None), np.arange(ROWS, dtype=np.int32), np.float32(0 if relu else -np.inf),
    )  # fmt: skip
    return y


@njit(parallel=True, cache=True)
def _run(
    units, tiles, x, C, zeros, patches, targets, panels, y, outputs, epilogue, neutral, identity, floor
):
    for unit in prange(units):
        begin, end = np.intp(unit) * tiles // units, (np.intp(unit) + 1) * tiles // units
        _unit(
            begin, end, x, C, zeros, patches, targets, panels, y, outputs, epilogue, neutral, identity, floor
        )


@njit(cache=True)
def _unit(
    begin, end, x, C, zeros, patches, targets, panels, y, outputs, epilogue, neutral, identity, floor
):
    """Tiles `begin` to `end`, a block at a time."""
    # Behind the last tile of a block lie old numbers: multiplied along with it, never stored.
    inputs = np.zeros(POINTS * STEP * C, dtype=np.float32)
    products = np.empty(POINTS * STEP * WIDTH, dtype=np.float32)
    for first in range(begin, end, BLOCK):
        tiles = min(BLOCK, end - first)
        for t in range(tiles):
            for c in range(0, C, LANES):
                patch = (first + t) * POINTS
                gather_inputs(x, C, zeros, patches, patch, c, inputs, t * C + c, STEP * C)
        for column in range(0, outputs, WIDTH):
            for q in range(POINTS):
                panel = (column * POINTS + q * WIDTH) * C
                for t in range(q * STEP, q * STEP + tiles, ROWS):
                    multiply_tile(
                        inputs, C, zeros, identity, 0, t, 1, C, panels, panel, products, WIDTH, identity, 0, t,
                        0, WIDTH, neutral, -np.float32(np.inf), ROWS, VECTORS,
                    )  # fmt: skip
            for t in range(tiles):
                for c in range(0, min(WIDTH, outputs - column), LANES):
                    scatter_outputs(
                        products, t * WIDTH + c, STEP * WIDTH, y, outputs, targets,
                        (first + t) * OUTPUTS * OUTPUTS, column + c, outputs, epilogue, floor,
                    )  # fmt: skip
