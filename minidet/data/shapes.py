"""The built-in data set: eight rotated shapes, drawn when asked for and never stored.

Image i of (split, seed, size, variant) is a pure function of those five, so there is nothing to download and
nothing to cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import pi
from typing import Any, NamedTuple

import numpy as np

from minidet.data import drawing
from minidet.data.chance import integer, seeded, uniform
from minidet.data.sample import Sample
from minidet.kernels.compiler import compiled
from minidet.kernels.parallel import parallel

SPLITS = ("train", "val", "test")
MAX_IOU = 0.25
"""No two boxes of an image overlap more,"""
MAX_CONTAINED = 0.5
"""and no box covers more than this part of another."""
TRIES = 8


class Variant(NamedTuple):
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
    "crowded": Variant(sizes=(12.0, 40.0), objects=(6, 20), empty=0.0),
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
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Several images at once, each drawn on a core."""
        N, size, variant = len(indices), self.image_size, VARIANTS[self.variant]
        states = np.stack([self._state(index) for index in indices])
        images, counts = np.empty((N, size, size, 3), np.uint8), np.empty(N, np.int64)
        boxes, labels = _unfilled(variant, N)
        quantiles, enlargements = drawing.normal_quantiles(), drawing.enlargements(size)
        _draw(N, variant, states, quantiles, enlargements, images, boxes, labels, counts)
        return [
            Sample(images[n], boxes[n, :count].astype(np.float32), labels[n, :count], index + 1, self._name(index))
            for n, (index, count) in enumerate(zip(indices, counts.tolist(), strict=True))
        ]

    def size(self, index: int) -> tuple[int, int]:
        """(H, W) of every image."""
        return self.image_size, self.image_size

    def ground_truth(self) -> dict[str, Any]:
        """All boxes as a COCO dictionary; places the objects but draws no image."""
        images, annotations = [], []
        variant = VARIANTS[self.variant]
        (boxes,), (labels,) = _unfilled(variant, 1)
        masks = np.empty((len(labels), self.image_size**2), np.bool_)
        for index in range(self.images):
            images.append({
                "id": index + 1,
                "file_name": self._name(index),
                "width": self.image_size,
                "height": self.image_size,
            })
            count = _layout(variant, self.image_size, self._state(index), boxes, labels, masks)
            found = boxes[:count].astype(float).tolist()
            for (x1, y1, x2, y2), label in zip(found, labels[:count].tolist(), strict=True):
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


def _unfilled(variant: Variant, N: int) -> tuple[np.ndarray, np.ndarray]:
    """Room for boxes (N, most, 4) and labels (N, most) of so many images."""
    most = variant.objects[1]
    return np.empty((N, most, 4), np.int64), np.empty((N, most), np.int64)


@parallel
def _draw(n, variant, states, quantiles, enlargements, images, boxes, labels, counts):
    """One image, its boxes and labels, and how many there are."""
    image, state, size = images[n], states[n], images.shape[1]
    planes, masks = np.empty((3, size, size), np.float32), np.empty((labels.shape[1], size * size), np.bool_)
    counts[n] = _layout(variant, size, state, boxes[n], labels[n], masks)
    drawing.background(planes, enlargements, state)
    for g in range(counts[n]):
        drawing.paint(planes, boxes[n, g], masks[g], state, quantiles)
    drawing.add_noise(planes, image, state, quantiles)


@compiled(nogil=True)
def _layout(variant, size, state, boxes, labels, masks):
    """What lies where, and how many objects there are: boxes (most, 4), labels (most,), masks (most, size * size)."""
    count, wanted, (fewest, most) = 0, 0, variant.objects
    if uniform(state, 0.0, 1.0) >= variant.empty:
        wanted = integer(state, (fewest, most + 1))
    for _ in range(wanted):
        labels[count] = _place(boxes[count], boxes[:count], size, variant, state, masks[count])
        count += labels[count] >= 0
    return count


@compiled(nogil=True)
def _place(box, others, size, variant, state, mask):
    """Label of an object, its box and the pixels within, row after row; of `others` it hides none.

    Label -1 if none of TRIES found its place.
    """
    scale, aspects = size / 128, variant.aspects
    for _ in range(TRIES):
        label = int(uniform(state, 0.0, 8.0))
        radius = _log_uniform(variant.sizes, uniform(state, 0.0, 1.0)) / 2 * scale
        turn = uniform(state, 0.0, 2 * pi)
        # Stretched after turning, along x or along y: the box, not only the object, is long and narrow.
        side = uniform(state, -1.0, 1.0)
        stretch = _log_uniform(aspects, abs(side)) ** (0.5 if side > 0 else -0.5)
        outline = drawing.outline(label, radius * stretch, radius / stretch, turn)
        h, w = outline.shape
        x, y = int(uniform(state, 0.0, 1.0) * (size - w)), int(uniform(state, 0.0, 1.0) * (size - h))
        if max(h, w) >= size or min(h, w) / scale < variant.min_side:
            continue
        aspect = (max(h, w) / scale) / (min(h, w) / scale)
        box[0], box[1], box[2], box[3] = x, y, x + w, y + h
        if (aspects == (1, 1) or aspects[0] <= aspect <= aspects[1]) and not _too_close(box, others):
            for row in range(h):
                for column in range(w):
                    mask[row * w + column] = outline[row, column]
            return label
    return -1


@compiled
def _log_uniform(limits, chance):
    """A number such that halving and doubling are equally likely."""
    low, high = limits
    return low * (high / low) ** chance


@compiled
def _too_close(box, others):
    """Whether a box and one of others overlap more than MAX_IOU, or one lies in the other by more than
    MAX_CONTAINED."""
    x1, y1, x2, y2 = box
    for a1, b1, a2, b2 in others:
        w, h = min(x2, a2) - max(x1, a1), min(y2, b2) - max(y1, b1)
        area, other = (x2 - x1) * (y2 - y1), (a2 - a1) * (b2 - b1)
        if w > 0 and h > 0 and w * h > min(MAX_IOU * (area + other - w * h), MAX_CONTAINED * min(area, other)):
            return True
    return False
