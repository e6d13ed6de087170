"""Several processes train as one: the same batches, gradients, weights and numbers, and they end together."""

from __future__ import annotations

import numpy as np
import pytest

from minidet.data import Loader, shapes
from minidet.data.loader import share
from minidet.models import presets

PREPROCESS = presets.small(shapes().classes).preprocess


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 16])
def test_shares_are_even_and_complete(count, size):
    shares = [share(count, rank, size) for rank in range(size)]
    assert [place for mine in shares for place in mine] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_processes_share_every_batch():
    """Three processes see what one sees, in the last batch of two images as well, where the first has none."""
    data = shapes("train", images=5, size=64)

    def batches(**shard):
        return list(Loader(data, PREPROCESS, batch_size=6, images=14, seed=3, **shard))

    whole, parts = batches(), [batches(rank=rank, size=3) for rank in range(3)]
    for n, batch in enumerate(whole):
        shared = [part[n] for part in parts]
        assert [image_id for b in shared for image_id in b.image_ids] == batch.image_ids
        assert np.array_equal(np.concatenate([b.images for b in shared if len(b)]), batch.images)
        assert np.array_equal(np.concatenate([b.sizes for b in shared]), batch.sizes)
        assert np.array_equal(np.concatenate([b.original_sizes for b in shared]), batch.original_sizes)
        assert [(b.first, b.first + len(b), b.whole) for b in shared] == [
            (mine.start, mine.stop, len(batch)) for mine in (share(len(batch), rank, 3) for rank in range(3))
        ]
    assert [len(part[-1]) for part in parts] == [0, 1, 1]
