"""Batches on their way to a GPU: which bytes travel, who waits for whom, and that the numbers are NumPy's."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from fake_streams import ORDERS
from test_loader import Numbers

from minidet import backend
from minidet.data import Loader
from minidet.data.loader import cuts
from minidet.data.upload import Place
from minidet.images import Preprocess
from minidet.kernels import cuda
from minidet.training.blame import first_non_finite
from minidet.training.communicator import Alone
from minidet.training.together import pad_alike

BYTES = Preprocess(min_size=20, max_size=24, method="pil", pad_multiple=8)
NUMBERS = replace(BYTES, method="float")
KEPT = replace(NUMBERS, min_size=0, max_size=0)


class Noise(Numbers):
    """Images of several sizes, with every byte in them."""

    def __getitem__(self, index):
        rng, sample = np.random.default_rng(index), super().__getitem__(index)
        return replace(sample, image=rng.integers(0, 256, (*self.size(index), 3), dtype=np.uint8))


def loader(preprocess, xp=np, images=10, **settings) -> Loader:
    return Loader(Noise(images), preprocess, batch_size=3, shuffle=False, xp=xp, **settings)


def copies() -> list[np.ndarray]:
    return [memory for _, what, memory in ORDERS if what == "copy"]


@pytest.mark.parametrize("preprocess", [BYTES, NUMBERS], ids=["pil", "float"])
def test_batches_arrive_as_they_are_on_numpy(preprocess, cupy):
    """On a real GPU too, with -m gpu."""
    for want, got in zip(loader(preprocess, images=40), loader(preprocess, cupy, images=40, workers=2), strict=True):
        np.testing.assert_array_equal(backend.to_numpy(got.images), want.images)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("preprocess", "dtype"),
    [(BYTES, np.uint8), (replace(BYTES, bgr=True, scale=1.0), np.uint8), (KEPT, np.uint8), (NUMBERS, np.float32)],
    ids=["pil", "bgr", "kept", "float"],
)
def test_the_numbers_are_numpys_and_bytes_travel_where_resizing_gives_bytes(preprocess, dtype, workers, fake_cupy):
    xp = backend.load("cupy")
    want = list(loader(preprocess))
    fake_cupy.counts.clear()
    got = []
    for batch in loader(preprocess, xp, workers=workers):
        assert backend.library(batch.images) == "cupy" and batch.images.dtype == np.float32
        got.append(batch)
    # What bytes are normalised to, and then the sizes of each batch's images.
    assert not fake_cupy.counts.waits and len(fake_cupy.counts.uploads) == 1 + (dtype == np.uint8) * len(want)
    assert [memory.dtype for memory in copies()] == [dtype] * len(want)
    assert [memory.nbytes for memory in copies()] == [np.dtype(dtype).itemsize * b.images.size for b in want]
    for w, g in zip(want, got, strict=True):  # only now: no batch was overwritten by a later one
        np.testing.assert_array_equal(backend.to_numpy(g.images), w.images)
        assert g.image_ids == w.image_ids and np.array_equal(g.sizes, w.sizes)
    assert any(np.prod(w.sizes, axis=1).min() < w.images[0, :, :, 0].size for w in want)  # some were padded


def test_batches_there_are_padded_like_those_of_other_processes(fake_cupy):
    class Other(Alone):
        def all_max(self, x):
            x[...] = np.maximum(x, (40, 32))

    xp = backend.load("cupy")
    batches = [iter(loader(BYTES)), iter(loader(BYTES, xp)), iter(loader(BYTES, xp, parts=2))]
    want, got, parts = (pad_alike(next(each), Other()).images for each in batches)
    assert want.shape == parts.shape == (3, 40, 32, 3)
    np.testing.assert_array_equal(got.get(), want)
    for cut in cuts(3, 2):
        np.testing.assert_array_equal(parts[cut].get(), want[cut])


def test_images_there_that_are_not_finite_are_told(fake_cupy):
    images = backend.load("cupy").asarray(np.array([[1, np.inf]]))
    assert first_non_finite(None, images, lambda: None) == "the input images"


def test_no_image_is_a_batch_too(fake_cupy):
    (batch,) = loader(BYTES, backend.load("cupy"), images=1, rank=0, size=2)
    assert len(batch) == 0 and batch.images.shape == (0, 0, 0, 3) and batch.images.dtype == np.float32


def test_the_next_copy_is_ordered_while_this_batch_is_used(fake_cupy):
    batches = iter(loader(BYTES, backend.load("cupy")))
    for seen in (1, 2, 3):
        next(batches)
        until = time.monotonic() + 10
        while len(copies()) < seen + 1 and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(0.02)
        assert len(copies()) == seen + 1  # and no further one: there are two places
    batches.close()


@pytest.mark.parametrize("preprocess", [BYTES, NUMBERS], ids=["pil", "float"])
@pytest.mark.parametrize("parts", [2, 3])
def test_parts_of_a_batch_come_when_they_are_needed(parts, preprocess, fake_cupy):
    """Whoever takes no part, only the first, or all of them: the copy of one more is ordered, and nothing is lost."""
    want = list(loader(preprocess))
    ordered = 0
    for n, batch in enumerate(loader(preprocess, backend.load("cupy"), parts=parts)):
        assert batch.images.shape == want[n].images.shape and len(batch) == len(want[n])
        pieces = cuts(len(batch), parts)
        for cut in pieces[: n % 3]:
            images = batch.images[cut] if len(pieces) > 1 else batch.images
            assert backend.library(images) == "cupy" and len(copies()) <= ordered + 2
            np.testing.assert_array_equal(images.get(), want[n].images[cut])
            ordered += 1
        ordered += len(pieces[n % 3 :])
        if len(pieces) > 1:  # out of turn, as whoever looks for what went wrong asks
            np.testing.assert_array_equal(batch.images[:].get(), want[n].images)
            ordered += 1
    assert n == len(want) - 1


def test_parts_are_cut_evenly():
    assert cuts(8, 2) == [slice(0, 4), slice(4, 8)] and cuts(0, 2) == []
    assert [len(range(7)[cut]) for cut in cuts(7, 3)] == [3, 3, 1] and len(cuts(2, 4)) == 2


def test_a_batch_is_normalised_by_one_launch(fake_cupy, monkeypatch):
    launched, launch = [], cuda.launch
    monkeypatch.setattr(cuda, "launch", lambda *args, **how: launched.append(args[1]) or launch(*args, **how))
    assert ["normalise"] * len(list(loader(BYTES, backend.load("cupy")))) == launched


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_streams_wait_for_each_other(workers, parts, fake_cupy):
    list(loader(BYTES, backend.load("cupy"), workers=workers, parts=parts, images=14))
    ours = [(what, about) for stream, what, about in ORDERS if stream == "own"]
    steps = [ours[n : n + 3] for n in range(0, len(ours), 3)]
    assert len(ours) == 3 * len(steps) and len(steps) == {1: 5, 3: 14}[parts]
    for (first, used), (second, _), (third, copied) in steps:
        assert (first, second, third) == ("wait", "copy", "record")
        begun = ORDERS.index(("own", first, used))
        assert ("null", "record", used) in ORDERS[:begun]  # else the copy would wait for nothing
        received = ORDERS.index(("null", "wait", copied))
        assert ORDERS[received + 1 :].index(("null", "record", used)) >= 0
    # Before its second use, and its third, a place's copy waits for what was received from the one before.
    for place in (steps[0::2], steps[1::2]):
        assert len({id(about) for step in place for what, about in (step[0],)}) == 1
        used, copied = place[0][0][1], place[0][2][1]
        story = [(stream, what) for stream, what, about in ORDERS if about is used or about is copied]
        once = [("own", "wait"), ("own", "record"), ("null", "wait"), ("null", "record")]
        assert story == [("null", "record"), *once * len(place), ("null", "wait")]


def test_pinned_memory_is_kept_until_its_copy_is_done_and_grows(fake_cupy, rng):
    xp = backend.load("cupy")
    place, other = Place.two(xp, BYTES)
    small, large = (rng.integers(0, 256, (1, side, side, 3), dtype=np.uint8) for side in (4, 6))
    place.send(small)
    (first,) = copies()
    arrived = place.receive(np.array([[4, 4]]))
    place.send(small[:, ::-1])
    assert np.shares_memory(first, copies()[-1]) and not fake_cupy.counts.waits
    place.send(large)  # the one before was not even received: the host waits for its copy
    assert len(fake_cupy.counts.waits) == 1 and not np.shares_memory(first, copies()[-1])
    other.send(small)
    assert not np.shares_memory(copies()[-1], copies()[-2])
    padded = np.zeros((1, 6, 6, 3), np.float32)
    padded[:, :5, :3] = BYTES.levels()[large[:, :5, :3], np.arange(3)]
    np.testing.assert_array_equal(place.receive(np.array([[5, 3]])).get(), padded)
    np.testing.assert_array_equal(arrived.get(), BYTES.levels()[small, np.arange(3)])


@pytest.mark.parametrize("workers", [0, 2])
def test_stopping_early_leaves_no_thread_and_no_copy(workers, fake_cupy):
    for _ in loader(BYTES, backend.load("cupy"), workers=workers, images=100):
        break
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("minidet-loader")]
    copied = {id(about) for stream, what, about in ORDERS if (stream, what) == ("own", "record")}
    assert copied <= {id(about) for _, what, about in ORDERS[-2:]} and {what for _, what, _ in ORDERS[-2:]} == {"wait"}


def test_what_fails_while_the_next_batch_is_fetched_is_raised_in_its_turn(fake_cupy):
    class Broken(Noise):
        def __getitem__(self, index):
            if index == 4:
                raise OSError("unplugged")
            return super().__getitem__(index)

    batches = iter(Loader(Broken(), BYTES, batch_size=3, shuffle=False, xp=backend.load("cupy")))
    assert len(next(batches)) == 3
    with pytest.raises(RuntimeError, match=r"image 4 of .*unplugged"):
        next(batches)
