"""The built-in data set: eight rotated shapes, drawn when asked for and never stored.

Image i of (split, seed, size, variant) is a pure function of those five, so there is nothing to download and
nothing to cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi
from typing import Any

import numpy as np

from minidet.data import drawing
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

    sizes: tuple[float, float] = (12, 64)
    """Smallest and largest nominal diameter, log-uniform between."""
    objects: tuple[int, int] = (1, 6)
    empty: float = 0.08
    """Part of the images that have no object."""
    aspects: tuple[float, float] = (1, 1)
    """Length : breadth of the bounding box, along either axis; (1, 1) leaves the outlines as they are."""
    min_side: float = 6
    """Objects whose box is narrower are drawn again."""


VARIANTS = {
    "standard": Variant(),
    "tiny": Variant(sizes=(6, 16), min_side=4),
    "crowded": Variant(sizes=(12, 40), objects=(6, 20), empty=0),
    "elongated": Variant(sizes=(12, 32), aspects=(3, 8), min_side=4),
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
        rng = self._rng(index)
        masks, boxes, labels = _layout(VARIANTS[self.variant], self.image_size, rng)
        planes = drawing.background(self.image_size, rng)
        for mask, box in zip(masks, boxes, strict=True):
            drawing.paint(planes, mask, (int(box[0]), int(box[1])), rng)
        return Sample(drawing.add_noise(planes, rng), boxes, labels, index + 1, self._name(index))

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
            _, boxes, labels = _layout(VARIANTS[self.variant], self.image_size, self._rng(index))
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

    def _rng(self, index: int) -> np.random.Generator:
        if not 0 <= index < self.images:
            raise IndexError(f"{self!r} has no image {index}")
        # SFC64 gives normal numbers a third faster than the default, and they are most of an image's cost.
        return np.random.Generator(np.random.SFC64((self.seed, SPLITS.index(self.split), index)))


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


def _layout(
    variant: Variant, size: int, rng: np.random.Generator
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """What lies where: masks, boxes (G, 4) float32 with whole numbers, labels (G,)."""
    scale = size / 128
    masks: list[np.ndarray] = []
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    fewest, most = variant.objects
    wanted = 0 if rng.random() < variant.empty else int(rng.integers(fewest, most + 1))
    for _ in range(wanted):
        for _ in range(TRIES):
            chance = rng.random(6)
            label, mask = _draw_object(variant, scale, chance)
            h, w = mask.shape
            if max(h, w) >= size or not _wanted(variant, h / scale, w / scale):
                continue
            x, y = int(chance[4] * (size - w)), int(chance[5] * (size - h))
            box = (x, y, x + w, y + h)
            if any(_too_close(box, other) for other in boxes):
                continue
            masks.append(mask)
            boxes.append(box)
            labels.append(label)
            break
    return masks, np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64)


def _draw_object(variant: Variant, scale: float, chance: np.ndarray) -> tuple[int, np.ndarray]:
    """Label and mask, from four of six numbers drawn uniformly from 0..1."""
    label = int(chance[0] * len(drawing.CLASSES))
    radius = _log_uniform(variant.sizes, chance[1]) / 2 * scale
    # Stretched after turning, along x or along y: the box, not only the object, is long and narrow.
    side = 2 * chance[3] - 1
    stretch = _log_uniform(variant.aspects, abs(side)) ** (0.5 if side > 0 else -0.5)
    return label, drawing.outline(label, radius * stretch, radius / stretch, 2 * pi * chance[2])


def _log_uniform(limits: tuple[float, float], chance: float) -> float:
    """A number such that halving and doubling are equally likely."""
    low, high = limits
    return low * (high / low) ** chance


def _wanted(variant: Variant, h: float, w: float) -> bool:
    if min(h, w) < variant.min_side:
        return False
    return variant.aspects == (1, 1) or variant.aspects[0] <= max(h, w) / min(h, w) <= variant.aspects[1]


def _too_close(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    """Whether two boxes overlap more than MAX_IOU, or one lies in the other by more than MAX_CONTAINED."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return False
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return w * h > MAX_IOU * (sum(areas) - w * h) or w * h > MAX_CONTAINED * min(areas)
