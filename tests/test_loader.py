"""Batches that depend on the seed and the position, and on nothing else."""

from __future__ import annotations

import importlib
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from minidet.data import Augment, Dataset, Loader, Sample, shapes
from minidet.images import Preprocess
from minidet.kernels import Kernel

KEEP = Preprocess(min_size=0, max_size=0, scale=1.0, mean=(0, 0, 0), std=(1, 1, 1), pad_multiple=1)
ALL_FLIPS = Augment(hflip=0.5, vflip=0.5, transpose=True)


class Numbers:
    """A data set of one's own: image i is filled with the level i and holds one box; sizes differ."""

    classes = ("thing", "other")
    category_ids = (7, 3)

    def __init__(self, images: int = 10) -> None:
        self.images = images
        self.opened: list[int] = []

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> Sample:
        self.opened.append(index)
        h, w = self.size(index)
        box = np.array([[1, 2, 4, 8]], np.float32)
        image = np.full((h, w, 3), index, np.uint8)
        return Sample(image, box, np.array([index % 2]), 100 + index, f"number {index}")

    def size(self, index: int) -> tuple[int, int]:
        return 10 + index % 3, 12

    def ground_truth(self) -> dict:
        return {"images": [], "annotations": [], "categories": []}


def same(a, b) -> bool:
    return (
        a.position == b.position
        and a.image_ids == b.image_ids
        and a.names == b.names
        and all(np.array_equal(getattr(a, f), getattr(b, f)) for f in ("images", "sizes", "original_sizes"))
        and all(map(np.array_equal, a.boxes, b.boxes))
        and all(map(np.array_equal, a.labels, b.labels))
    )


def workers_alive() -> int:
    return sum(thread.name.startswith("minidet-loader") for thread in threading.enumerate())


def test_a_data_set_of_ones_own_is_a_data_set():
    assert isinstance(Numbers(), Dataset)
    assert isinstance(shapes(), Dataset)


def test_a_batch_says_what_it_holds():
    (batch,) = Loader(Numbers(4), KEEP, batch_size=4, shuffle=False)
    assert len(batch) == 4
    assert batch.images.shape == (4, 12, 12, 3)
    assert batch.images.dtype == np.float32
    assert batch.sizes.tolist() == batch.original_sizes.tolist() == [[10, 12], [11, 12], [12, 12], [10, 12]]
    assert batch.image_ids == [100, 101, 102, 103]
    assert batch.names[2] == "number 2"
    assert [labels.tolist() for labels in batch.labels] == [[0], [1], [0], [1]]
    assert batch.boxes[0].tolist() == [[1, 2, 4, 8]]
    assert (batch.position, batch.dropped) == (0, 0)
    assert batch.seconds > 0


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_do_not_change_the_batches(workers):
    settings = {"batch_size": 5, "seed": 3, "images": 48, "augment": ALL_FLIPS}
    alone = list(Loader(shapes("train", images=20, size=32), Preprocess(0, 0), **settings))
    helped = list(Loader(shapes("train", images=20, size=32), Preprocess(0, 0), **settings, workers=workers))
    assert len(alone) == len(helped) == 10
    assert all(map(same, alone, helped))
    assert workers_alive() == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_restart_goes_on_with_the_same_batches(workers):
    def loader(start):
        return Loader(
            Numbers(), KEEP, batch_size=4, seed=1, images=33, start=start, augment=ALL_FLIPS, workers=workers
        )

    whole, rest = list(loader(0)), list(loader(12))
    assert [batch.position for batch in rest] == [12, 16, 20, 24, 28, 32]
    assert all(map(same, whole[3:], rest))
    assert len(loader(12)) == 6
    assert len(loader(33)) == len(list(loader(33))) == 0


def test_every_epoch_sees_every_image_once_in_another_order():
    loader = Loader(Numbers(), KEEP, batch_size=4, seed=5, images=33)
    assert len(loader) == 9
    batches = list(loader)
    assert [len(batch) for batch in batches] == [4] * 8 + [1]  # a batch may span two epochs
    seen = [image_id for batch in batches for image_id in batch.image_ids]
    epochs = [seen[0:10], seen[10:20], seen[20:30]]
    assert all(sorted(epoch) == list(range(100, 110)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = Loader(Numbers(), KEEP, batch_size=4, seed=6, images=33)
    assert [i for batch in other for i in batch.image_ids] != seen


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("room", "opened"),
    [(1 << 20, [1] * 10), (0, [4, 4, 4, 3, 3, 3, 3, 3, 3, 3])],
    ids=["kept", "too many"],
)
def test_what_fits_into_memory_is_opened_once(room, opened, workers, monkeypatch):
    monkeypatch.setattr("minidet.data.reading.KEPT", 1 << 30)
    how = {"batch_size": 3, "images": 33, "augment": ALL_FLIPS, "workers": workers, "prefetch": 1}
    want = list(Loader(Numbers(), KEEP, **how))
    monkeypatch.setattr("minidet.data.reading.KEPT", room)
    data = Numbers()
    loader = Loader(data, KEEP, **how)
    got = list(loader)
    assert len(got) == len(want) == 11 and all(map(same, got, want))
    if room == 0:
        assert loader._reader._kept is None  # and the memory is free again
    if not (room and workers):  # two threads may both open an image that neither has kept yet
        assert sorted(np.bincount(data.opened), reverse=True) == opened


def test_an_image_is_kept_in_every_size_it_is_drawn_in(monkeypatch):
    at_10 = Preprocess(min_size=10, max_size=100, method="pil")
    how = {"batch_size": 4, "images": 200, "min_sizes": (10, 14, 20)}
    data = Numbers()
    kept = list(Loader(data, at_10, **how))
    assert len(data.opened) == 30
    monkeypatch.setattr("minidet.data.reading.KEPT", 0)
    assert all(map(same, kept, Loader(Numbers(), at_10, **how)))


def test_a_data_set_that_gives_several_images_is_asked_for_a_batch_at_once():
    class Several(Numbers):
        def __getitems__(self, indices):
            self.asked = [*getattr(self, "asked", []), list(indices)]
            return [self[index] for index in indices]

    data = Several()
    batches = list(Loader(data, KEEP, batch_size=4, images=14, seed=2, augment=ALL_FLIPS))
    assert all(map(same, batches, Loader(Numbers(), KEEP, batch_size=4, images=14, seed=2, augment=ALL_FLIPS)))
    assert [len(indices) for indices in data.asked] == [4, 4, 4, 2]
    assert [100 + i for indices in data.asked for i in indices] == [i for batch in batches for i in batch.image_ids]

    class Brighter(Several):  # which knows nothing of the other method
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return replace(sample, image=sample.image + 1)

    data = Brighter()
    (batch,) = Loader(data, KEEP, batch_size=2, images=2, shuffle=False)
    assert not hasattr(data, "asked")
    np.testing.assert_array_equal(batch.images[:, 0, 0, 0], KEEP.levels()[[1, 2], 0])

    class Fails(Numbers):
        def __getitems__(self, indices):
            raise OSError("the disk is gone")

    with pytest.raises(RuntimeError, match=r"images \[0, 1, 2\] of .*Fails.*: OSError: the disk is gone"):
        next(iter(Loader(Fails(), KEEP, batch_size=3, shuffle=False)))

    class Few(Numbers):
        def __getitems__(self, indices):
            return [self[index] for index in indices][1:]

    with pytest.raises(RuntimeError, match=r"images \[0, 1, 2\] of .*Few.*: ValueError: zip"):
        next(iter(Loader(Few(), KEEP, batch_size=3, shuffle=False)))


def test_without_shuffling_and_without_a_count_it_is_one_pass():
    loader = Loader(Numbers(), KEEP, batch_size=4, shuffle=False)
    assert [i for batch in loader for i in batch.image_ids] == list(range(100, 110))


def test_augmentation_differs_from_epoch_to_epoch():
    loader = Loader(shapes("val", images=1, size=32), Preprocess(0, 0), batch_size=1, images=40, augment=ALL_FLIPS)
    assert len({batch.images.tobytes() for batch in loader}) == 8  # all symmetries of a square


def test_a_batch_is_transposed_as_a_whole():
    """Wide images stay wide together or become high together: none is padded to a square."""

    class Wide(Numbers):
        def size(self, index: int) -> tuple[int, int]:
            return 8, 12

    batches = list(Loader(Wide(), KEEP, batch_size=4, images=80, augment=ALL_FLIPS))
    sizes = [batch.images.shape[1:3] for batch in batches]
    assert set(sizes) == {(8, 12), (12, 8)}
    assert all((batch.sizes == size).all() for batch, size in zip(batches, sizes, strict=True))
    assert 4 <= sizes.count((12, 8)) <= 16


def test_flips_move_boxes_with_their_pixels(rng):
    """A white rectangle on black is where its box says, however it was flipped."""
    image, box = np.zeros((20, 30, 3), np.uint8), np.array([[4, 3, 11, 15]], np.float32)
    image[3:15, 4:11] = 255
    sample = Sample(image, box, np.array([0]), 1, "white")
    found = set()
    for _ in range(100):
        flipped = ALL_FLIPS(sample, rng)
        rows, columns = np.nonzero(flipped.image[:, :, 0])
        assert flipped.boxes.tolist() == [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
        assert flipped.boxes.dtype == np.float32
        found.add((flipped.image.shape, *flipped.boxes[0].tolist()))
    assert len(found) == 8


@pytest.mark.parametrize("augment", [Augment(), Augment(hflip=1.0), Augment(vflip=1.0), ALL_FLIPS])
def test_flipping_an_image_without_objects(rng, augment):
    empty = Sample(np.zeros((4, 6, 3), np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int64), 1, "")
    assert augment(empty, rng).boxes.shape == (0, 4)


@pytest.mark.parametrize("wrong", [{"hflip": 1.5}, {"vflip": -0.1}])
def test_a_probability_is_between_0_and_1(wrong):
    with pytest.raises(ValueError, match=f"Augment.{next(iter(wrong))} is a probability"):
        Augment(**wrong)


def test_boxes_are_in_pixels_of_the_resized_image():
    half = Preprocess(min_size=6, max_size=100, pad_multiple=8)
    batch = next(iter(Loader(Numbers(3), half, batch_size=3, shuffle=False)))
    assert batch.sizes[2].tolist() == [6, 6]
    assert batch.original_sizes[2].tolist() == [12, 12]
    assert batch.boxes[2].tolist() == [[0.5, 1, 2, 4]]
    assert batch.images.shape == (3, 8, 8, 3)


def test_boxes_that_shrink_below_a_pixel_are_dropped_and_counted():
    tiny = Preprocess(min_size=2, max_size=100)
    batch = next(iter(Loader(Numbers(3), tiny, batch_size=3, shuffle=False)))
    assert batch.dropped == 3
    assert all(boxes.shape == (0, 4) for boxes in batch.boxes)
    assert all(labels.shape == (0,) for labels in batch.labels)


def test_padding_every_batch_to_one_size():
    batches = list(Loader(Numbers(), KEEP, batch_size=3, pad_to=(16, 20)))
    assert {batch.images.shape[1:] for batch in batches} == {(16, 20, 3)}
    with pytest.raises(ValueError, match="does not fit into 8 x 20"):
        next(iter(Loader(Numbers(), KEEP, batch_size=3, pad_to=(8, 20))))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_surfaces_with_the_name_of_its_image(workers):
    class Broken(Numbers):
        def __repr__(self):
            return "Broken()"

        def __getitem__(self, index):
            if index == 6:
                raise KeyError("no such blob")
            return super().__getitem__(index)

    received = []
    with pytest.raises(RuntimeError, match=r"image 6 of Broken\(\): KeyError: 'no such blob'"):
        received.extend(Loader(Broken(), KEEP, batch_size=2, shuffle=False, workers=workers))
    assert workers_alive() == 0


@pytest.mark.parametrize(
    ("boxes", "labels", "message"),
    [
        (np.zeros(4), np.zeros(1, int), r"odd: expected boxes \(G, 4\) and labels \(G,\), got \(4,\), \(1,\)"),
        ([[0, 0, 2, 2]], np.zeros(2, int), r"odd: expected boxes"),
        ([[0, 0, 2, 2]], np.array([2]), r"odd: labels 2\.\.2 of 2 classes: they count from 0"),
        ([[0, 0, 2, 2]], np.array([-1]), r"odd: labels -1\.\.-1 of 2 classes"),
        ([[2, 0, 2, 2]], np.array([0]), r"odd: boxes are x1, y1, x2, y2 with x1 < x2"),
        ([[0, 0, np.nan, 2]], np.array([0]), r"odd: boxes are x1, y1, x2, y2"),
    ],
)
def test_a_malformed_sample_is_refused(boxes, labels, message):
    class Odd(Numbers):
        def __getitem__(self, index):
            return Sample(np.zeros((4, 4, 3), np.uint8), np.array(boxes, np.float32), labels, 1, "odd")

    with pytest.raises(RuntimeError, match=message):
        next(iter(Loader(Odd(), KEEP, batch_size=1)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"images": -1}, "images must be at least 0"),
        ({"start": -4}, "start must be at least 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"prefetch": 0}, "prefetch must be at least 1"),
        ({"dataset": Numbers(0)}, "the data set has no images"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    settings = {"dataset": Numbers(), "preprocess": KEEP, "batch_size": 2} | wrong
    with pytest.raises(ValueError, match=message):
        Loader(settings.pop("dataset"), settings.pop("preprocess"), **settings)


def test_only_so_many_batches_are_prepared_ahead():
    dataset = Numbers(100)
    batches = iter(Loader(dataset, KEEP, batch_size=2, shuffle=False, workers=1, prefetch=3))
    next(batches)
    deadline = time.monotonic() + 5
    while len(dataset.opened) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(dataset.opened) == 6  # three batches: the one in hand, and two waiting
    batches.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_stopping_early_leaves_no_thread(workers):
    for _ in Loader(Numbers(100), KEEP, batch_size=2, workers=workers):
        assert workers_alive() > 0
        break
    assert workers_alive() == 0


def test_a_loader_can_be_iterated_again():
    loader = Loader(Numbers(), KEEP, batch_size=4, workers=1)
    assert all(map(same, loader, list(loader)))


def test_prefetch_threads_call_no_parallel_kernel(monkeypatch):
    """They would take the cores from the training step's pool, and Numba's pools may not be entered twice."""
    called, call = set(), Kernel.__call__

    def recorded(kernel, *args):
        called.add((threading.current_thread().name.rpartition("_")[0], kernel.__name__))
        return call(kernel, *args)

    monkeypatch.setattr(Kernel, "__call__", recorded)
    list(Loader(Numbers(), Preprocess(min_size=20, max_size=40), batch_size=2, augment=ALL_FLIPS, workers=2))
    assert called == {("minidet-loader", "resample")}
    compiled = importlib.import_module("minidet.kernels.resample")._resample
    assert not getattr(compiled, "targetoptions", {}).get("parallel")
