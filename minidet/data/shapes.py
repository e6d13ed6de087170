"""The built-in data set: eight rotated shapes, drawn when asked for and never stored.

Image i of (split, seed, size, variant) is a pure function of those five, so there is nothing to download and
nothing to cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi
from typing import Any

import numpy as np
from numba import njit

from minidet.data import drawing
from minidet.data.chance import integers, seeded, uniform
from minidet.data.sample import Sample

SPLITS = ("train", "val", "test")
MAX_IOU = 0.25
"""No two boxes of an image overlap more,"""
MAX_CONTAINED = 0.5
"""and no box covers more than this part of another."""
TRIES = 8


@dataclass(frozen=True)
class Variant:
    """How hard the images are; sizes in pixels of a 128-pixel image."""

    sizes: tuple[float, float] = (12.0, 64.0)
    """Smallest and largest nominal diameter, log-uniform between."""
    objects: tuple[int, int] = (1, 6)
    empty: float = 0.08
    """Part of the images that have no object."""
    aspects: tuple[float, float] = (1.0, 1.0)
    """Length : breadth of the bounding box, along either axis; (1, 1) leaves the outlines as they are."""
    min_side: float = 6.0
    """Objects whose box is narrower are drawn again."""


VARIANTS = {
    "standard": Variant(),
    "tiny": Variant(sizes=(6.0, 16.0), min_side=4.0),
    "crowded": Variant(sizes=(12.0, 40.0), objects=(6, 20), empty=0),
    "elongated": Variant(sizes=(12.0, 32.0), aspects=(3.0, 8.0), min_side=4.0),
}


class Shapes:
    """A split of the built-in data; see `shapes`."""

    classes = drawing.CLASSES
    category_ids = tuple(range(1, len(drawing.CLASSES) + 1))

    def __init__(self, split: str, images: int, seed: int, size: int, variant: str) -> None:
        if split not in SPLITS:
            raise ValueError(f"shapes has no split {split!r}: choose one of {', '.join(SPLITS)}")
        if variant not in VARIANTS:
            raise ValueError(f"shapes has no variant {variant!r}: choose one of {', '.join(VARIANTS)}")
        if images < 1:
            raise ValueError(f"shapes: images must be at least 1, got {images}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"shapes: seed must be in 0..2**32-1, got {seed}")
        if not 32 <= size <= 4096:
            raise ValueError(f"shapes: size must be in 32..4096 pixels, got {size}")
        self.split, self.images, self.seed, self.image_size, self.variant = split, images, seed, size, variant

    def __len__(self) -> int:
        return self.images

    def __repr__(self) -> str:
        return (
            f"shapes({self.split!r}, images={self.images}, seed={self.seed}, size={self.image_size}, "
            f"variant={self.variant!r})"
        )

    def __getitem__(self, index: int) -> Sample:
        state = self._state(index)
        masks, boxes, labels = _layout(VARIANTS[self.variant], self.image_size, state)
        planes = drawing.background(self.image_size, state)
        for mask, (x, y, _, _) in zip(masks, boxes.astype(np.int64), strict=True):
            drawing.paint(planes, mask, x, y, state)
        return Sample(drawing.add_noise(planes, state), boxes, labels, index + 1, self._name(index))

    def size(self, index: int) -> tuple[int, int]:
        """(H, W) of every image."""
        return self.image_size, self.image_size

    def ground_truth(self) -> dict[str, Any]:
        """All boxes as a COCO dictionary; places the objects but draws no image."""
        images, annotations = [], []
        for index in range(self.images):
            images.append({
                "id": index + 1,
                "file_name": self._name(index),
                "width": self.image_size,
                "height": self.image_size,
            })
            _, boxes, labels = _layout(VARIANTS[self.variant], self.image_size, self._state(index))
            for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist(), strict=True):
                annotations.append({
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": self.category_ids[label],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                })
        categories = [{"id": i, "name": n} for i, n in zip(self.category_ids, self.classes, strict=True)]
        return {"images": images, "annotations": annotations, "categories": categories}

    def _name(self, index: int) -> str:
        return f"{self.split}_{index:06d}.png"

    def _state(self, index: int) -> np.ndarray:
        if not 0 <= index < self.images:
            raise IndexError(f"{self!r} has no image {index}")
        return seeded(self.seed, SPLITS.index(self.split), index)


def shapes(
    split: str = "train",
    *,
    images: int | None = None,
    seed: int = 0,
    size: int = 128,
    variant: str = "standard",
) -> Shapes:
    """The built-in data: 0 to 6 rotated shapes of eight classes, 12 to 64 pixels, on noisy textures.

    Splits share no image, whatever the seed.  Without `images`, "train" has 28,800 and the others 400.
    Objects grow with `size`.  Harder variants: "tiny", "crowded", "elongated".

    Raises:
        ValueError: for a split or variant that does not exist, or a number out of range.
    """
    if images is None:
        images = 28_800 if split == "train" else 400
    return Shapes(split, images, seed, size, variant)


def _layout(variant: Variant, size: int, state: np.ndarray) -> tuple[list, np.ndarray, np.ndarray]:
    """What lies where: masks, boxes (G, 4) float32 with whole numbers, labels (G,)."""
    fewest, most = variant.objects
    wanted = 0 if uniform(state, 0.0, 1.0) < variant.empty else int(integers(state, fewest, most + 1, 1)[0])
    masks, labels, boxes = [], [], np.empty((wanted, 4), np.int64)
    for _ in range(wanted):
        label, mask = _place(boxes, len(masks), size, variant.sizes, variant.aspects, variant.min_side, state)
        if label >= 0:
            masks.append(mask)
            labels.append(label)
    return masks, boxes[: len(masks)].astype(np.float32), np.array(labels, np.int64)


@njit(cache=True, nogil=True)
def _place(boxes, count, size, sizes, aspects, min_side, state):
    """Label and mask of an object that hides none of the first `count` of `boxes`, and its box behind them.

    Label -1 if none of TRIES found its place.
    """
    scale = size / 128
    for _ in range(TRIES):
        label = int(uniform(state, 0.0, 8.0))
        radius = _log_uniform(sizes, uniform(state, 0.0, 1.0)) / 2 * scale
        turn = uniform(state, 0.0, 2 * pi)
        # Stretched after turning, along x or along y: the box, not only the object, is long and narrow.
        side = uniform(state, -1.0, 1.0)
        stretch = _log_uniform(aspects, abs(side)) ** (0.5 if side > 0 else -0.5)
        mask = drawing.outline(label, radius * stretch, radius / stretch, turn)
        h, w = mask.shape
        x, y = int(uniform(state, 0.0, 1.0) * (size - w)), int(uniform(state, 0.0, 1.0) * (size - h))
        if max(h, w) >= size or min(h, w) / scale < min_side:
            continue
        aspect = (max(h, w) / scale) / (min(h, w) / scale)
        boxes[count, 0], boxes[count, 1], boxes[count, 2], boxes[count, 3] = x, y, x + w, y + h
        if (aspects == (1, 1) or aspects[0] <= aspect <= aspects[1]) and not _too_close(boxes, count):
            return label, mask
    return -1, mask


@njit(cache=True)
def _log_uniform(limits, chance):
    """A number such that halving and doubling are equally likely."""
    low, high = limits
    return low * (high / low) ** chance


@njit(cache=True)
def _too_close(boxes, count):
    """Whether box `count` and one before it overlap more than MAX_IOU, or one lies in the other by more than
    MAX_CONTAINED."""
    x1, y1, x2, y2 = boxes[count]
    for a1, b1, a2, b2 in boxes[:count]:
        w, h = min(x2, a2) - max(x1, a1), min(y2, b2) - max(y1, b1)
        area, other = (x2 - x1) * (y2 - y1), (a2 - a1) * (b2 - b1)
        if w > 0 and h > 0 and w * h > min(MAX_IOU * (area + other - w * h), MAX_CONTAINED * min(area, other)):
            return True
    return False
