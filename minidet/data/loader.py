"""Batches, in an order and with an augmentation that depend on nothing but the seed and the position."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import cycle
from time import perf_counter

import numba
import numpy as np

from minidet import backend
from minidet.backend import Array
from minidet.data.augment import NONE, Augment
from minidet.data.grouping import aspect_groups, grouped_order
from minidet.data.reading import Reader
from minidet.data.sample import Dataset, Sample
from minidet.data.upload import Parts, Place
from minidet.images import ImageError, Preprocess, pad_batch


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

    images: Array
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
    first: int = 0
    """Where the first of these images stands in the whole batch, which several processes may share."""
    elsewhere: int = 0
    """Images of the whole batch that other processes have."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def whole(self) -> int:
        """Images of the whole batch, those of other processes included."""
        return len(self) + self.elsewhere


def share(count: int, rank: int, size: int) -> range:
    """What process `rank` of `size` takes of `count` things: neighbours, and as many as every other, or one more."""
    return range(count * rank // size, count * (rank + 1) // size)


def cuts(count: int, parts: int) -> list[slice]:
    """`count` images in at most so many parts: all as large, but the last one, which may be smaller."""
    size = max(1, -(-count // parts))
    return [slice(start, start + size) for start in range(0, count, size)]


class Loader:
    """Iterates over `images` images, epoch after epoch, beginning at position `start`.

    The order is a permutation drawn from (seed, epoch), the augmentation from (seed, epoch, position) and, for what
    a batch has in common, from (seed, batch): a resumed run, and any number of workers, give the same batches.  No
    image is dropped; a batch may span two epochs.

    With `min_sizes`, one of them is drawn for every image, in place of the preprocessing's `min_size`.  With an
    `aspect_factor`, almost every batch is of images of like shape (data/grouping.py).

    A data set of some hundred photos is read and resized in the first epoch only (data/reading.py).

    With workers, that many threads prepare up to `prefetch` batches ahead: threads, since decoding and resizing
    leave the interpreter free, while sending a batch from another process takes longer than making it.

    For CuPy's `xp` the images come on the GPU, copied to it while the batch before is used, by a thread that takes
    batches from those workers or prepares them itself.  Where the preprocessing keeps bytes, bytes are what is copied.
    Of more than one of `parts`, as `cuts` makes them, each is copied while the one before is used (`upload.Parts`).

    As one of several processes, `rank` of `size`, it gives its `share` of every batch, which may be no image.
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
        min_sizes: Sequence[int] = (),
        aspect_factor: int | None = None,
        workers: int = 0,
        prefetch: int = 2,
        pad_to: tuple[int, int] | None = None,
        rank: int = 0,
        size: int = 1,
        parts: int = 1,
        xp=np,
    ) -> None:
        images = len(dataset) if images is None else images
        if len(dataset) == 0:
            raise ValueError("the data set has no images")
        for name, value, least in (
            ("batch_size", batch_size, 1), ("seed", seed, 0), ("images", images, 0), ("start", start, 0),
            ("workers", workers, 0), ("prefetch", prefetch, 1), ("parts", parts, 1),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"Loader: {name} must be at least {least}, got {value}")
        self.dataset, self.preprocess, self.augment = dataset, preprocess, augment
        self.batch_size, self.seed, self.images, self.start = batch_size, seed, images, start
        self.shuffle, self.workers, self.prefetch, self.pad_to = shuffle, workers, prefetch, pad_to
        self.rank, self.size, self.parts, self.xp = rank, size, parts, xp
        self._scales = [replace(preprocess, min_size=size) for size in min_sizes] or [preprocess]
        self._on_gpu = backend.name_of(xp) == "cupy"
        self._as_bytes = self._on_gpu and preprocess.keeps_bytes
        self._groups = None if aspect_factor is None else aspect_groups(dataset, aspect_factor)
        self._order = lru_cache(maxsize=4)(self._permutation)
        self._reader = Reader(dataset, sizes=len(self._scales), again=images - start > len(dataset))
        self._swap = lru_cache(maxsize=64)(lambda batch: np.random.default_rng((seed, batch, 0, 0)).random())

    def __len__(self) -> int:
        return max(0, -(-(self.images - self.start) // self.batch_size))

    def __iter__(self) -> Iterator[Batch]:
        positions = range(self.start, self.images, self.batch_size)
        batches = self._here(positions) if self.workers == 0 else self._ahead(positions)
        batches = self._sent(batches) if self._on_gpu else batches
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
        # Each on one core, where a data set's compiled code would use them all.
        alone = partial(numba.set_num_threads, 1)
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="minidet-loader", initializer=alone)
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

    def _sent(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches on the GPU, part by part: while one is used, the next is fetched and its copy ordered."""
        places = Place.two(self.xp, self.preprocess)
        turns = cycle(places)
        pool = ThreadPoolExecutor(1, thread_name_prefix="minidet-loader-sends")
        pieces = ((batch, cut) for batch in batches for cut in cuts(len(batch), self.parts) or [slice(0, 1)])

        def send() -> tuple[Batch, slice, Place] | None:
            (batch, cut), place = next(pieces, (None, None)), next(turns)
            if batch is None:
                return None
            place.send(batch.images[cut])
            return batch, cut, place

        def take() -> Array:
            nonlocal coming
            batch, cut, place = coming.result()
            images = place.receive(batch.sizes[cut])
            coming = pool.submit(send)  # into the other place, from which the part before was received
            return images

        try:
            coming = pool.submit(send)
            while (sent := coming.result()) is not None:
                batch, parts = sent[0], cuts(len(sent[0]), self.parts)
                if len(parts) <= 1:
                    yield replace(batch, images=take())
                    continue
                yield replace(batch, images=Parts(batch.images, batch.sizes, parts, take, places[0]))
                while parts:  # that nobody asked for
                    parts.pop()
                    take()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            batches.close()
            for place in places:
                place.leave()

    def _batch(self, position: int) -> Batch:
        """The batch of images position, position + 1, ...: a pure function, so any thread may run it."""
        whole = min(self.batch_size, self.images - position)
        mine = share(whole, self.rank, self.size)
        source = self._reader.source([self._index(position + place) for place in mine])
        samples, originals, images, boxes, labels, dropped = [], [], [], [], [], 0
        for place in mine:
            sample, original, image, moved = self._prepare(position + place, source)
            wide_enough = (moved[:, 2:] - moved[:, :2] >= 1).all(axis=1)
            samples.append(sample)
            originals.append(original)
            images.append(image)
            boxes.append(moved[wide_enough])
            labels.append(sample.labels[wide_enough])
            dropped += len(moved) - len(boxes[-1])
        batch, sizes = np.zeros((0, 0, 0, 3), np.float32), np.zeros((0, 2), np.int64)
        if images:
            batch, sizes = pad_batch(images, self.preprocess.pad_multiple, self.pad_to)
        return Batch(
            images=batch,
            sizes=sizes,
            original_sizes=np.array(originals, np.int64).reshape(-1, 2),
            boxes=boxes,
            labels=labels,
            image_ids=[sample.image_id for sample in samples],
            names=[sample.name for sample in samples],
            position=position,
            dropped=dropped,
            first=mine.start,
            elsewhere=whole - len(mine),
        )

    def _index(self, position: int) -> int:
        """Of the image at a position."""
        epoch, place = divmod(position, len(self.dataset))
        return int(self._order(epoch)[place])

    def _prepare(
        self, position: int, source: Callable[[int], Sample]
    ) -> tuple[Sample, tuple[int, int], np.ndarray, np.ndarray]:
        """The augmented sample at a position, its size before resizing, its image, and its boxes in that one's pixels.

        Bytes are resized before they are flipped: by then they are few.
        """
        index = self._index(position)
        try:
            rng = np.random.default_rng((self.seed, position // len(self.dataset), position))
            swap = self._swap(position // self.batch_size)
            scale = self._scales[int(rng.integers(len(self._scales)))]
            original, sample = self._reader.resized(index, scale, source)
            original = original[::-1] if self.augment.transposes(swap) else original
            sample = self.augment(sample, rng, swap)
            image = sample.image if self._as_bytes else scale.normalise(sample.image)
        except ImageError:  # names its file
            raise
        except Exception as error:
            raise RuntimeError(f"image {index} of {self.dataset!r}: {type(error).__name__}: {error}") from error
        return sample, original, image, scale.boxes(sample.boxes, sample.image.shape[:2], image.shape[:2])

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.dataset))
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.dataset))
        if self._groups is None:
            return order
        return grouped_order(order, self._groups, self.batch_size, epoch * len(self.dataset) % self.batch_size, rng)

