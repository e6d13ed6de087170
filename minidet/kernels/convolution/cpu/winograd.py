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
from numba import get_num_threads

from minidet.kernels.compiler import inner
from minidet.kernels.convolution.cpu.direct import NOTHING, epilogue_of
from minidet.kernels.convolution.cpu.filters import room_for, runs_of, transform_run
from minidet.kernels.convolution.cpu.lanes import LANES, LINE, PAIR, ROWS, UNROLLED, WIDTH
from minidet.kernels.convolution.cpu.microkernel import product_rows
from minidet.kernels.convolution.cpu.panels import padded, vectors_of
from minidet.kernels.convolution.cpu.plan import NOWHERE
from minidet.kernels.convolution.cpu.scratch import aligned, local, row_of_zeros
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
from minidet.kernels.parallel import in_turn, parallel

CACHE = 80 << 10
"""float32 numbers of transformed inputs and products that a block of tiles may have: a core's second-level cache."""

LEAST_BLOCK, MOST_BLOCK = 2 * ROWS, 4 * ROWS
"""Tiles of a block, as that cache allows."""

SPAN = 64
"""Columns of outputs that are multiplied before they are transformed back: the more, the longer a point's inputs stay
in the first-level cache."""

HEAVY, HEAVY_BLOCK = 1 << 20, 15 * ROWS
"""Transformed weights that are more than so many numbers come from the last cache or from memory: each is fetched for
as many tiles as possible, though their inputs then leave the second-level cache.  These are read again for every two
panels of weights."""

LEAST_FULL = 0.5
"""A tile of 4x4 costs 36 products and its transforms, one of 2x2 16, a pixel 9: where fewer of a tile's pixels are
outputs, the direct way is cheaper."""

LEAST_TILES, LEAST_IN_GRADIENT = 32, 16
"""With fewer tiles of 4x4, or less than twice as many of 2x2, transforming the weights costs more than is saved; the
gradient of the weights, which is transformed back, asks for fewer."""

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
def worthwhile(geometry: Geometry, images: int, weights: int, side: int, least: int) -> bool:
    """Whether a 3x3 convolution at stride 1 has enough, and full enough, tiles; and not too many weights for 4x4."""
    if geometry.size != (TAPS, TAPS) or geometry.stride != (1, 1) or geometry.dilation != (1, 1):
        return False
    tiles = sum(-(-P // side) * -(-Q // side) for P, Q in geometry.output_maps)
    full = geometry.output_pixels >= LEAST_FULL * side**2 * tiles
    return full and images * tiles >= least * (4 // side) and (side == 2 or weights < MANY_WEIGHTS)


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


def tiled_product(
    x, plan: Tiling, weight, memo: dict, pixels: int, *,
    scale=None, bias=None, shortcut=NOTHING, relu=False, turned=False,
):  # fmt: skip
    """act(bias + shortcut + scale * convolution); transformed weights are kept in `memo` while they do not change.

    Shapes:
        x: (N, S, C)
        weight: (outputs, 3, 3, C); `turned` swaps them and turns every filter around: the input gradient
        shortcut: (N * pixels * outputs,), or empty for none
        returns: (N, pixels, outputs)
    """
    (N, _, C), outputs, side = x.shape, weight.shape[3 if turned else 0], plan.side
    y = aligned(N, pixels, outputs)
    many = points(side)
    heavy = many * C * outputs > HEAVY
    span = min(2 * WIDTH if heavy else max(WIDTH, SPAN), padded(outputs))
    room = CACHE // (many * (padded(C) + span))
    block = HEAVY_BLOCK if heavy else min(MOST_BLOCK, max(LEAST_BLOCK, room))
    units, groups = get_num_threads(), -(-plan.tiles // ROWS)
    units *= -(-plan.tiles // (units * block))  # as many blocks for every thread, all of about one length
    loops, key = ((_block, 0, units),), ("cpu winograd", side, turned)
    panels = memo.get(key)
    if panels is None:
        panels = room_for(side, outputs, C)
        loops = (_transform, 0, runs_of(outputs, C)), *loops
    in_turn(
        loops, units, groups, plan.tiles, x.reshape(-1), C, row_of_zeros(padded(C)), plan.patches, plan.targets,
        weight.reshape(-1), turned, panels, y.reshape(-1), shortcut, outputs, epilogue_of(outputs, scale, bias),
        np.float32(0 if relu else -np.inf), span, side,
    )  # fmt: skip
    memo[key] = panels
    return y


# Both loops take the same arguments, for one follows the other.


@parallel
def _transform(
    unit, units, groups, tiles, x, C, zeros, patches, targets, weight, turned, panels, y, shortcut, outputs,
    epilogue, floor, span, side,
):  # fmt: skip
    """Some rows of a panel of weights."""
    transform_run(unit, weight, outputs, C, turned, panels, side)


@parallel
def _block(
    unit, units, groups, tiles, x, C, zeros, patches, targets, weight, turned, panels, y, shortcut, outputs,
    epilogue, floor, span, side,
):  # fmt: skip
    """Some tiles: all their inputs, then their outputs, `span` columns of them at a time."""
    first, last = unit * groups // units * ROWS, (unit + 1) * groups // units * ROWS
    count, depth, many = min(last, tiles) - first, len(zeros), points(side)
    # A tile's points lie together, for they are written together.  At distances of a power of two they would share
    # one set of the cache: so rows are a vector longer, and a tile has a row more, than they need.
    pitch, step = depth + LANES, many + 1
    rows = (last - first) * step
    inputs, products = local(rows * pitch), local(rows * span)
    nowhere = np.empty(outputs, dtype=np.float32)
    for t in range(count):
        gather(side, x, C, zeros, patches, first + t, 0, C, inputs, t * step * pitch, LANES, PAIR * LANES, pitch)
    # Behind the last tile, any numbers would do, for what they give is never stored; but left as they are, some may be
    # denormal, and to multiply those takes a hundred times as long.
    inputs[count * step * pitch :] = 0
    for start in range(0, outputs, span):
        stop = min(start + span, outputs)
        for q in range(many):
            for column in range(start, stop, WIDTH):
                vectors = vectors_of(stop - column)
                panel = (column * many + q * vectors * LANES) * depth
                ahead = panel + vectors * LANES * depth  # the next panel, a part of it with every tile
                for t in range(q, q + count * step, ROWS * step):
                    product_rows(
                        vectors, inputs, t * pitch, step * pitch, panels, panel, depth, ahead,
                        products, t * span + column - start, step * span,
                    )  # fmt: skip
                    ahead += depth // UNROLLED * LINE // 4
        for t in range(count):
            _scatter(
                side, products, t * step * span, span, y, shortcut, outputs, targets, first + t, start, stop,
                epilogue, floor, nowhere,
            )  # fmt: skip


@inner
def gather(side, x, C, zeros, patches, tile, begin, end, target, to, vector, panel, apart):
    """The transformed inputs of a tile, channels begin to end of them, every point `apart` from the one before."""
    first = tile * points(side)
    if side == 4:
        transform_pixels(x, C, zeros, patches, first, begin, end, target, to, vector, panel, apart, INPUT_4)
    else:
        transform_pixels(x, C, zeros, patches, first, begin, end, target, to, vector, panel, apart, INPUT_2)


@inner
def _scatter(
    side, products, start, apart, y, shortcut, outputs, targets, tile, begin, end, epilogue, floor, nowhere
):
    first = tile * side * side
    if side == 4:
        scatter_outputs(
            products, start, apart, y, shortcut, outputs, targets, first, begin, end, epilogue, floor, nowhere, OUTPUT_4
        )
    else:
        scatter_outputs(
            products, start, apart, y, shortcut, outputs, targets, first, begin, end, epilogue, floor, nowhere, OUTPUT_2
        )
