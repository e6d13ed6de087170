"""Flips: the symmetries of a photo, or of a texture that knows no up and down."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minidet.data.sample import Sample


@dataclass(frozen=True)
class Augment:
    """Random flips, each drawn on its own."""

    hflip: float = 0.5
    """Probability of exchanging left and right."""
    vflip: float = 0.0
    """Probability of exchanging top and bottom."""
    transpose: bool = False
    """Exchange rows and columns of every second image, in training of all images in every second batch: wide and high
    ones together would be padded to squares.  With both flips at 0.5, all eight symmetries."""

    def __post_init__(self) -> None:
        for name in ("hflip", "vflip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Augment.{name} is a probability in 0..1, got {getattr(self, name)}")

    def __call__(self, sample: Sample, rng: np.random.Generator, swap: float | None = None) -> Sample:
        """The sample, flipped as `rng` decides; three numbers are drawn whatever the settings.

        `swap` from 0..1, the same for a whole batch, takes the place of the third.
        """
        across, down, alone = rng.random(3)
        swap = alone if swap is None else swap
        image, boxes = sample.image, sample.boxes
        H, W = image.shape[:2]
        if across < self.hflip:
            image = image[:, ::-1]
            boxes = _mirrored(boxes, 0, W)
        if down < self.vflip:
            image = image[::-1]
            boxes = _mirrored(boxes, 1, H)
        if self.transposes(swap):
            image = image.transpose(1, 0, 2)
            boxes = boxes[:, [1, 0, 3, 2]]
        return Sample(image, boxes, sample.labels, sample.image_id, sample.name)

    def transposes(self, swap: float) -> bool:
        """Whether it exchanges rows and columns at this number from 0..1."""
        return self.transpose and swap < 0.5


def _mirrored(boxes: np.ndarray, axis: int, side: int) -> np.ndarray:
    """What was at x (axis 0) or y (axis 1) is at side - x: the upper limit becomes the lower."""
    boxes = boxes.copy()
    boxes[:, axis::2] = side - boxes[:, axis + 2 :: -2]
    return boxes


NONE = Augment(hflip=0.0)
"""Images as they are."""
