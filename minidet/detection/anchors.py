"""Anchors: the boxes that the network's outputs are relative to, the same for every image of one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from minidet.backend import Array


@dataclass(frozen=True)
class AnchorConfig:
    """Which boxes stand in every cell of every pyramid level.

    Differs: every system draws them a little differently; each field below is one such choice.
    """

    sizes: tuple[tuple[float, ...], ...]
    """Per level, the sides of the square anchors in pixels of the network input."""
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height over width; an anchor of any ratio has the area of its square."""
    rounded: bool = False
    """Whether corners are rounded to whole pixels, halves to even (torchvision)."""
    scale_major: bool = False
    """Order within a cell: all ratios of the first size, then of the next (detectron2), instead of all
    sizes of the first ratio (torchvision)."""
    offset: float = 0.0
    """Where in its cell an anchor is centred, in strides: 0 the cell's corner, 0.5 its middle."""
    strides: tuple[int, ...] | None = None
    """Pixels from cell to cell, per level; None: input size // grid size, per axis (torchvision)."""

    def __post_init__(self):
        if not self.sizes or not self.ratios or not all(self.sizes):
            raise ValueError(f"anchors: need at least one size per level and one ratio, got {self}")
        if len({len(level) for level in self.sizes}) > 1:
            raise ValueError(
                f"anchors: levels share one head, so each needs as many sizes, got {[len(s) for s in self.sizes]}"
            )
        if min(min(level) for level in self.sizes) <= 0 or min(self.ratios) <= 0:
            raise ValueError(f"anchors: sizes and ratios must be positive, got {self.sizes} and {self.ratios}")
        if self.strides is not None and len(self.strides) != len(self.sizes):
            raise ValueError(f"anchors: {len(self.sizes)} levels of sizes but {len(self.strides)} strides")

    @property
    def per_cell(self) -> int:
        """Anchors per cell, A."""
        return len(self.sizes[0]) * len(self.ratios)


def octaves(bases: Sequence[float], scales: int = 3) -> tuple[tuple[float, ...], ...]:
    """Sizes per level: base * 2^(k / scales) for k = 0 .. scales - 1.

    Source: RetinaNet, arXiv:1708.02002, section 4 "Anchors": bases 32 .. 512 on P3 .. P7, scales 2^0, 2^(1/3),
        2^(2/3).
    """
    return tuple(tuple(base * 2 ** (k / scales) for k in range(scales)) for base in bases)


def anchors_for(
    config: AnchorConfig, image_hw: tuple[int, int], grids: Sequence[tuple[int, int]], xp=np
) -> Array:
    """All anchors of an input of this size, in the order of the network's outputs, as an array of `xp`.

    Shapes:
        returns: (R, 4) float32, read-only: level by level, row by row, column by column, A per cell
    Units: pixels of the network input, padding included; anchors may reach beyond it.
    Source: RetinaNet, arXiv:1708.02002, section 4 "Anchors".
    Raises:
        ValueError: if there is not one grid per level.
    """
    if len(grids) != len(config.sizes):
        raise ValueError(f"anchors: sizes are given for {len(config.sizes)} levels, the pyramid has {len(grids)}")
    return _anchors(config, tuple(image_hw), tuple(tuple(grid) for grid in grids), xp)


@lru_cache(maxsize=32)  # and so copied to a device once, not at each step
def _anchors(config: AnchorConfig, image_hw: tuple[int, int], grids: tuple[tuple[int, int], ...], xp) -> Array:
    levels = []
    for level, (rows, columns) in enumerate(grids):
        if config.strides is None:
            stride_y, stride_x = image_hw[0] // rows, image_hw[1] // columns
        else:
            stride_y = stride_x = config.strides[level]
        y = ((np.arange(rows) + config.offset) * stride_y).astype(np.float32)
        x = ((np.arange(columns) + config.offset) * stride_x).astype(np.float32)
        centres = np.zeros((rows, columns, 1, 4), np.float32)
        centres[..., 0::2] = x[None, :, None, None]
        centres[..., 1::2] = y[:, None, None, None]
        levels.append((centres + cell_anchors(config, level)).reshape(-1, 4))
    anchors = np.concatenate(levels)
    anchors.flags.writeable = False  # one array serves every caller
    return xp.asarray(anchors)


def cell_anchors(config: AnchorConfig, level: int) -> np.ndarray:
    """The anchors of one cell of this level, around (0, 0).

    Shapes:
        returns: (A, 4) float32
    """
    ratios, sizes = np.asarray(config.ratios)[:, None], np.asarray(config.sizes[level], np.float64)[None, :]
    width, height = sizes / np.sqrt(ratios), sizes * np.sqrt(ratios)  # (ratios, sizes)
    boxes = np.stack([-width, -height, width, height], axis=-1) / 2
    if config.scale_major:
        boxes = boxes.swapaxes(0, 1)
    boxes = boxes.reshape(-1, 4)
    return (np.round(boxes) if config.rounded else boxes).astype(np.float32)
