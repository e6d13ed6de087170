"""What every data set gives: one Sample an image, and the ground truth the evaluator reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np


@dataclass(frozen=True, slots=True)
class Sample:
    """One image and its objects.

    Shapes:
        image: (H, W, 3)
        boxes: (G, 4)
        labels: (G,)
    Units: image uint8 RGB; boxes float32 x1, y1, x2, y2 in pixels of the image, no + 1; labels 0..K-1.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    image_id: int
    name: str


@runtime_checkable
class Dataset(Protocol):
    """Anything that can be trained on and evaluated: write these five and it fits everywhere."""

    classes: tuple[str, ...]
    """Names; label k is classes[k]."""
    category_ids: tuple[int, ...]
    """The data set's own id of each class, for result files; they may be sparse."""

    def __len__(self) -> int:
        """How many images."""

    def __getitem__(self, index: int) -> Sample:
        """Image `index`, the same at every call: augmentation is the loader's work."""

    def size(self, index: int) -> tuple[int, int]:
        """(H, W) of image `index`, without opening it."""

    def ground_truth(self) -> dict[str, Any]:
        """A COCO dictionary of images, annotations (crowds included) and categories."""
