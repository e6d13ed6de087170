"""Samples on their way to the loader: one by one or many at once, checked, resized, and kept if there is room."""

from __future__ import annotations

from collections.abc import Callable

from minidet.data.sample import Dataset, Sample
from minidet.images import Preprocess

KEPT = 256 << 20
"""Bytes of images, resized: a data set that seems to need no more is read once and not again every epoch."""


class Reader:
    """Gives the samples of a data set as the network wants them, before chance changes them.

    If they are asked for `again`, epoch after epoch, it keeps them as long as it looks as if KEPT bytes were enough
    for all, in all sizes that they are given.  A data set that can give several samples at once, by a `__getitems__`
    as those of PyTorch may have, is asked for a whole batch, and nothing is kept.
    """

    def __init__(self, dataset: Dataset, *, sizes: int, again: bool) -> None:
        self.dataset, self.sizes = dataset, sizes
        self._several = dataset.__getitems__ if _gives_several(dataset) else None
        self._kept: dict[tuple[int, int], tuple[tuple[int, int], Sample]] | None = None
        if again and self._several is None:
            self._kept = {}
        self._bytes = 0

    def source(self, indices: list[int]) -> Callable[[int], Sample]:
        """What `resized` takes the samples of a batch from."""
        if self._several is None or not indices:
            return self.dataset.__getitem__
        try:
            return dict(zip(indices, self._several(indices), strict=True)).__getitem__
        except Exception as error:
            raise RuntimeError(f"images {indices} of {self.dataset!r}: {type(error).__name__}: {error}") from error

    def resized(
        self, index: int, scale: Preprocess, source: Callable[[int], Sample]
    ) -> tuple[tuple[int, int], Sample]:
        """The size (H, W) of an image, and the sample after all that can be done to bytes."""
        kept = self._kept  # another thread may give it up meanwhile
        if kept is not None and (found := kept.get((index, scale.min_size))):
            return found
        sample = source(index)
        _check(sample, len(self.dataset.classes))
        size, pixels = sample.image.shape[:2], scale.pixels(sample.image)
        boxes = scale.boxes(sample.boxes, size, pixels.shape[:2])
        made = size, Sample(pixels, boxes, sample.labels, sample.image_id, sample.name)
        if kept is not None:
            kept[index, scale.min_size] = made
            self._bytes += pixels.nbytes
            if self._bytes / len(kept) * len(self.dataset) * self.sizes > KEPT:
                self._kept = None
        return made


def _gives_several(dataset: Dataset) -> bool:
    """Whether its `__getitems__` is up to date: a class derived from another may have changed `__getitem__` alone."""
    for kind in type(dataset).__mro__:
        if "__getitems__" in vars(kind):
            return True
        if "__getitem__" in vars(kind):
            return False
    return False


def _check(sample: Sample, classes: int) -> None:
    """A data set of one's own may be wrong where those of this package are not."""
    boxes, labels = sample.boxes, sample.labels
    if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
        raise ValueError(f"{sample.name}: expected boxes (G, 4) and labels (G,), got {boxes.shape}, {labels.shape}")
    # Python's numbers: there are few, and an array's methods take longer to call.
    if not all(0 <= label < classes for label in labels.tolist()):
        raise ValueError(
            f"{sample.name}: labels {labels.min()}..{labels.max()} of {classes} classes: they count from 0, and "
            "there is no background class"
        )
    if not all(x1 < x2 and y1 < y2 for x1, y1, x2, y2 in boxes.tolist()):  # NaN included
        raise ValueError(f"{sample.name}: boxes are x1, y1, x2, y2 with x1 < x2 and y1 < y2, got {boxes.tolist()}")
