"""Batches, in an order and with an augmentation that depend on nothing but the seed and the position."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from time import perf_counter

import numpy as np

from minidet.data.augment import NONE, Augment
from minidet.data.sample import Dataset
from minidet.images import Preprocess, pad_batch


@dataclass(frozen=True)
class Batch:
    """What the network sees next.

    Shapes:
        images: (N, H, W, 3)
        sizes: (N, 2)
        original_sizes: (N, 2)
    Units: boxes are x1, y1, x2, y2 in pixels of the resized image; sizes (h, w), before padding and before
        resizing.  `position` counts the images seen before this batch, `seconds` the time it was waited for.
    """

    images: np.ndarray
    sizes: np.ndarray
    original_sizes: np.ndarray
    boxes: list[np.ndarray]
    labels: list[np.ndarray]
    image_ids: list[int]
    names: list[str]
    position: int
    seconds: float = 0.0
    dropped: int = 0
    """Boxes left out because resizing made them narrower than a pixel."""

    def __len__(self) -> int:
        return len(self.images)


class Loader:
    """Iterates over `images` images, epoch after epoch, beginning at position `start`.

    The order is a permutation drawn from (seed, epoch), the augmentation from (seed, epoch, position): a
    resumed run, and any number of workers, give the same batches.  No image is dropped; a batch may span
    two epochs.

    With workers, that many threads prepare up to `prefetch` batches ahead.
    """

    def __init__(
        self,
        dataset: Dataset,
        preprocess: Preprocess,
        *,
        batch_size: int,
        seed: int = 0,
        images: int | None = None,
        start: int = 0,
        shuffle: bool = True,
        augment: Augment = NONE,
        workers: int = 0,
        prefetch: int = 2,
        pad_to: tuple[int, int] | None = None,
    ) -> None:
        images = len(dataset) if images is None else images
        if len(dataset) == 0:
            raise ValueError("the data set has no images")
        for name, value, least in (
            ("batch_size", batch_size, 1), ("seed", seed, 0), ("images", images, 0), ("start", start, 0),
            ("workers", workers, 0), ("prefetch", prefetch, 1),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"Loader: {name} must be at least {least}, got {value}")
        self.dataset, self.preprocess, self.augment = dataset, preprocess, augment
        self.batch_size, self.seed, self.images, self.start = batch_size, seed, images, start
        self.shuffle, self.workers, self.prefetch, self.pad_to = shuffle, workers, prefetch, pad_to
        self._order = lru_cache(maxsize=4)(self._permutation)

    def __len__(self) -> int:
        return max(0, -(-(self.images - self.start) // self.batch_size))

    def __iter__(self) -> Iterator[Batch]:
        positions = range(self.start, self.images, self.batch_size)
        batches = self._here(positions) if self.workers == 0 else self._ahead(positions)
        try:
            while True:
                began = perf_counter()
                batch = next(batches, None)
                if batch is None:
                    return
                yield replace(batch, seconds=perf_counter() - began)
        finally:
            batches.close()

    def _here(self, positions: range) -> Iterator[Batch]:
        for position in positions:
            yield self._batch(position)

    def _ahead(self, positions: range) -> Iterator[Batch]:
        todo = iter(positions)
        pending: deque = deque()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="minidet-loader")
        try:
            while True:
                while len(pending) < max(self.prefetch, self.workers):
                    position = next(todo, None)
                    if position is None:
                        break
                    pending.append(pool.submit(self._batch, position))
                if not pending:
                    return
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _batch(self, position: int) -> Batch:
        """The batch of images position, position + 1, ...: a pure function, so any thread may run it."""
        images, old_sizes, boxes, labels, image_ids, names, dropped = [], [], [], [], [], [], 0
        for p in range(position, min(position + self.batch_size, self.images)):
            epoch, place = divmod(p, len(self.dataset))
            sample = self.dataset[int(self._order(epoch)[place])]
            if self.augment is not NONE:
                sample = self.augment(sample, np.random.default_rng((self.seed, epoch, p)))
            image = self.preprocess.prepare(sample.image)
            moved = self.preprocess.boxes(sample.boxes, sample.image.shape[:2], image.shape[:2])
            kept = np.all(moved[:, 2:] - moved[:, :2] >= 1, axis=1)
            images.append(image)
            old_sizes.append(sample.image.shape[:2])
            boxes.append(moved[kept])
            labels.append(sample.labels[kept])
            image_ids.append(sample.image_id)
            names.append(sample.name)
            dropped += len(kept) - int(kept.sum())
        batch, sizes = pad_batch(images, self.preprocess.pad_multiple, self.pad_to)
        original_sizes = np.array(old_sizes, np.int64)
        return Batch(
            batch, sizes, original_sizes, boxes, labels, image_ids, names, position, dropped=dropped
        )

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.dataset))
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.dataset))
