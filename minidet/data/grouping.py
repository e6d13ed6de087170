"""Batches of images of like shape: an epoch's order that wastes little on padding, and opens no image."""

from __future__ import annotations

import numpy as np

from minidet.data.sample import Dataset


def aspect_groups(dataset: Dataset, factor: int) -> np.ndarray:
    """The group of every image, by width over height as annotated: augmentation comes later.

    Shapes:
        returns: (N,) int64, in 0 .. 2 * factor + 1, or 0 and 1 if the factor is 0
    Rule: the edges between groups are 2 * factor + 1 numbers from 1/2 to 2, evenly spread in their logarithm;
        with factor 0 the one edge 1.  An image on an edge belongs to the wider ones.
    Source: torchvision, references/detection/group_by_aspect_ratio.py; factor 0 is detectron2's
        AspectRatioGroupedDataset, which counts squares as narrow.
    """
    sizes = np.array([dataset.size(index) for index in range(len(dataset))], np.float64)
    edges = 2.0 ** np.linspace(-1, 1, 2 * factor + 1) if factor else np.ones(1)
    return np.searchsorted(edges, sizes[:, 1] / sizes[:, 0], side="right")


def grouped_order(
    order: np.ndarray, groups: np.ndarray, batch_size: int, begun: int, rng: np.random.Generator
) -> np.ndarray:
    """An epoch's order, rearranged so that almost every batch is of one group.

    `begun` images of the first batch were already taken from the epoch before.  Every image stays in the epoch,
    once: what a group has beyond whole batches makes a few mixed ones, of neighbouring groups, and the batches
    that two epochs share.

    Shapes:
        order: (N,) int64
        groups: (N,) int64, of image 0, 1, ...
        returns: (N,) int64
    Differs: torchvision and detectron2 keep what fills no batch for later, so that a restart in the middle of
        an epoch depends on all that came before it.
    """
    first = -begun % batch_size
    if first >= len(order):
        return order
    last = (len(order) - first) % batch_size
    batches, rest = [], []
    for group in np.unique(groups):
        members = order[groups[order] == group]
        whole = len(members) // batch_size * batch_size
        batches += list(members[:whole].reshape(-1, batch_size))
        rest.append(members[whole:])
    rest = np.concatenate(rest)
    if len(rest) < first + last:  # then exactly a batch is lacking: both are N modulo the batch size
        rest = np.concatenate([rest, batches.pop(int(rng.integers(len(batches))))])
    mixed = len(rest) - first - last
    batches += list(rest[:mixed].reshape(-1, batch_size))
    shuffled = [batches[i] for i in rng.permutation(len(batches))]
    return np.concatenate([rest[mixed : mixed + first], *shuffled, rest[mixed + first :]])
