"""Batches of like shape, and images of several scales: functions of seed and position, no image opened for them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from minidet.data import Augment, Loader, Sample
from minidet.data.grouping import aspect_groups, grouped_order
from minidet.images import Preprocess

PLAIN = Preprocess(min_size=0, max_size=100, pad_multiple=1)
SIZES = [(30, 40), (40, 30), (30, 40), (35, 40), (30, 40), (20, 60), (30, 30)]


class Photos:
    """A data set of one's own: mostly landscape, some portrait, few panoramas; counts what is opened."""

    classes, category_ids = ("thing",), (1,)

    def __init__(self, images: int):
        self.images, self.opened = images, 0

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> Sample:
        self.opened += 1
        h, w = self.size(index)
        box = np.array([[2, 3, w - 2, h - 3]], np.float32)
        return Sample(np.full((h, w, 3), index % 256, np.uint8), box, np.zeros(1, np.int64), index, f"photo {index}")

    def size(self, index: int) -> tuple[int, int]:
        return SIZES[index * index % 11 % len(SIZES)]


def loader(images: int, epochs: float = 3, batch_size: int = 4, **how) -> Loader:
    how = {"aspect_factor": 3, "seed": 5, "augment": Augment()} | how
    return Loader(Photos(images), PLAIN, batch_size=batch_size, images=int(images * epochs), **how)


@pytest.mark.parametrize(
    ("factor", "edges"), [(0, [1.0]), (1, [0.5, 1.0, 2.0]), (3, [0.5, 0.63, 0.794, 1.0, 1.26, 1.587, 2.0])]
)
def test_groups_are_torchvisions(factor, edges):
    """Its edges, written out; an image on an edge belongs to the wider ones."""
    photos = Photos(1)
    for w, h in [(640, 480), (480, 640), (500, 500), (1000, 500), (500, 1000), (640, 427), (300, 1000), (1000, 300)]:
        photos.size = lambda index, h=h, w=w: (h, w)
        assert aspect_groups(photos, factor).tolist() == [sum(w / h >= edge - 5e-4 for edge in edges)]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 7, 16])
@pytest.mark.parametrize("images", [1, 3, 8, 50, 97])
@pytest.mark.parametrize("kinds", [1, 2, 5])
def test_an_epoch_is_every_image_once_and_few_batches_are_mixed(kinds, images, batch_size, rng):
    groups = rng.integers(0, kinds, images) ** 2
    for epoch in range(5):
        order = rng.permutation(images)
        begun = epoch * images % batch_size
        got = grouped_order(order, groups, batch_size, begun, rng)
        assert sorted(got) == list(range(images))
        whole = got[-begun % batch_size :]
        batches = [whole[i : i + batch_size] for i in range(0, len(whole) - batch_size + 1, batch_size)]
        mixed = sum(len(set(groups[batch])) > 1 for batch in batches)
        assert mixed <= kinds - 1  # each group leaves less than one batch behind
        assert mixed == 0 if kinds == 1 or batch_size == 1 else True


def test_a_large_epoch_is_still_in_random_order(rng):
    """Batches of a group do not follow each other, and their images are not neighbours."""
    groups = np.arange(20_000) % 4 // 3  # 3 : 1
    got = grouped_order(rng.permutation(20_000), groups, 16, 0, rng)
    kinds = groups[got[::16]]
    changes = np.count_nonzero(np.diff(kinds))
    assert abs(changes / len(kinds) - 2 * 0.25 * 0.75) < 0.05
    assert abs(np.corrcoef(np.arange(20_000), got)[0, 1]) < 0.03


def test_batches_are_of_one_shape():
    batches = list(loader(200, epochs=2, batch_size=8))
    seen = [image_id for batch in batches for image_id in batch.image_ids]
    assert sorted(seen[:200]) == sorted(seen[200:]) == list(range(200)) and seen[:200] != seen[200:]
    groups = aspect_groups(Photos(200), 3)
    mixed = [len(set(groups[batch.image_ids])) > 1 for batch in batches]
    assert sum(mixed) <= 2 * (len(set(groups)) - 1)
    ungrouped = list(loader(200, epochs=2, batch_size=8, aspect_factor=None))
    waste = [
        1 - sum(b.sizes.prod(axis=1).sum() for b in some) / sum(b.images[..., 0].size for b in some)
        for some in (batches, ungrouped)
    ]
    assert waste[0] < 0.05 < 0.3 < waste[1]


def test_grouping_opens_no_image():
    photos = Photos(100)
    made = Loader(photos, PLAIN, batch_size=8, aspect_factor=3)
    assert photos.opened == 0
    next(iter(made))
    assert photos.opened == 8


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [4, 24, 32, 48])
def test_a_restart_within_an_epoch_goes_on_with_the_same_batches(start, workers):
    how = {"min_sizes": (20, 25, 30), "workers": workers}
    whole, rest = list(loader(21, **how)), list(loader(21, start=start, **how))
    assert len(rest) == len(whole) - start // 4
    for a, b in zip(whole[start // 4 :], rest, strict=True):
        assert a.image_ids == b.image_ids and a.position == b.position
        assert np.array_equal(a.images, b.images) and all(map(np.array_equal, a.boxes, b.boxes))


def test_several_processes_share_the_same_batches():
    how = {"min_sizes": (20, 30)}
    whole = list(loader(21, **how))
    shares = [list(loader(21, rank=rank, size=3, **how)) for rank in range(3)]
    for n, batch in enumerate(whole):
        parts = [share[n] for share in shares]
        assert [i for part in parts for i in part.image_ids] == batch.image_ids
        assert [s for part in parts for s in part.sizes.tolist()] == batch.sizes.tolist()


def test_every_image_has_a_scale_of_its_own():
    """Drawn anew in every epoch, each as often as the others; the boxes follow; flips stay what they were."""
    how = {"aspect_factor": None, "epochs": 30}
    scaled, plain = list(loader(20, min_sizes=(20, 25, 30), **how)), list(loader(20, **how))
    sizes, originals = (np.concatenate([getattr(b, f) for b in scaled]) for f in ("sizes", "original_sizes"))
    shorter = sizes.min(axis=1)
    counts = [np.count_nonzero(shorter == size) for size in (20, 25, 30)]
    assert sum(counts) == 600 and min(counts) > 160
    assert len({tuple(shorter[20 * e : 20 * e + 20]) for e in range(30)}) == 30
    assert any(len(set(batch.sizes.min(axis=1))) > 1 for batch in scaled)
    np.testing.assert_allclose(sizes / originals, (shorter / originals.min(axis=1))[:, None].repeat(2, 1), atol=0.03)
    for a, b in zip(scaled, plain, strict=True):
        assert a.image_ids == b.image_ids
        for box, other, size, original in zip(a.boxes, b.boxes, a.sizes, a.original_sizes, strict=True):
            np.testing.assert_allclose(box, other * np.tile((size / original)[::-1], 2), rtol=1e-5)


def test_without_scales_nothing_changes():
    """One scale is the preprocessing's own."""
    at_25 = replace(PLAIN, min_size=25)
    one = Loader(Photos(8), at_25, batch_size=4, seed=3, augment=Augment())
    same = Loader(Photos(8), replace(at_25, min_size=10), batch_size=4, seed=3, augment=Augment(), min_sizes=(25,))
    assert all(np.array_equal(a.images, b.images) for a, b in zip(one, same, strict=True))
