"""Hard examples: those the definition names, found without comparing everything; and the loss they leave."""

from __future__ import annotations

import numpy as np
import pytest
from gradients import assert_gradients_match

from minidet import backend
from minidet.autograd import Tensor
from minidet.detection import (
    BACKGROUND,
    IGNORE,
    CoderConfig,
    LossConfig,
    MatcherConfig,
    MiningConfig,
    build_targets,
    loss,
)
from minidet.detection.mining import hard_examples
from minidet.kernels import pairwise_iou

numpy = backend.load("numpy")
libraries = pytest.mark.parametrize("xp", [numpy, backend.load("array_api_strict")], ids=backend.name_of)
TABLE = [  # RetinaNet, table 1d
    *(MiningConfig(batch, nms) for nms in (0.7, 0.5) for batch in (128, 256, 512)),
    *(MiningConfig(batch, 0.5, ratio=3) for batch in (128, 256, 512)),
]


def crowded(rng, R: int = 400) -> np.ndarray:
    corners, sides = rng.uniform(0, 60, (R, 2)), rng.uniform(8, 30, (R, 2))
    return np.concatenate([corners, corners + sides], axis=1).astype(np.float32)


def in_words(losses, labels, anchors, config) -> list[int]:
    """Suppress among all, then take; one anchor after the other."""
    kept = []
    iou = np.asarray(pairwise_iou(anchors, anchors))
    for row in sorted(range(len(losses)), key=lambda r: (-losses[r], r)):
        if labels[row] != IGNORE and all(iou[row, other] <= config.nms for other in kept):
            kept.append(row)
    if config.ratio is None:
        return kept[: config.batch]
    positives = [row for row in kept if labels[row] >= 0][: config.batch // (1 + config.ratio)]
    return positives + [row for row in kept if labels[row] == BACKGROUND][: config.ratio * len(positives)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("positives", ["hard", "easy", "none", "all"])
@pytest.mark.parametrize(
    "config", [MiningConfig(8), MiningConfig(8, 0.7), MiningConfig(8, 0.5, 3), MiningConfig(64, 0.3, 1)]
)
def test_they_are_those_of_the_definition(config, positives, seed):
    """Also where the positives have the smallest loss of all, or there are fewer examples than wanted."""
    rng = np.random.default_rng(seed)
    anchors, losses = crowded(rng), np.round(rng.exponential(size=400), 2)  # rounded: some are equal
    labels = rng.choice([BACKGROUND, IGNORE, 0, 1], p=[0.85, 0.1, 0.03, 0.02], size=400)
    if positives == "easy":
        losses[labels >= 0] = 0.0
    elif positives == "hard":
        losses[labels >= 0] += 5
    else:
        labels = np.where(labels >= 0, BACKGROUND, labels) if positives == "none" else np.zeros_like(labels)
    got = hard_examples(losses, labels, anchors, config)
    assert got.tolist() == in_words(losses, labels, anchors, config)
    assert len(got) <= config.batch and (len(got) > 0 or config.ratio is not None)
    assert len(got) == 0 or config.ratio is None or positives != "none"
    if config.ratio and positives in ("hard", "easy"):
        assert np.sum(labels[got] >= 0) * config.ratio == np.sum(labels[got] == BACKGROUND)


def a_batch(rng, K: int = 2):
    """Two images of 24 anchors, and one without objects; logits as far apart as they are random."""
    anchors = crowded(rng, 24)
    boxes = [anchors[[3, 9]] + 1, anchors[[20]] - 1, np.zeros((0, 4), np.float32)]
    labels = [rng.integers(0, K, len(b)) for b in boxes]
    targets = build_targets(anchors, boxes, labels, MatcherConfig())
    return rng.normal(-1, 2, (3, 24, K)), np.zeros((3, 24, 4)), targets


@libraries
@pytest.mark.parametrize("ratio", [None, 3])
@pytest.mark.parametrize(("alpha", "gamma"), [(None, 0.0), (0.25, 2.0)])
def test_value_and_gradient_of_the_loss(ratio, alpha, gamma, xp, rng):
    """The examples' own losses; the gradient against differences, and none for all others."""
    logits, deltas, targets = a_batch(rng)
    config = LossConfig(alpha=alpha, gamma=gamma, mining=MiningConfig(8, ratio=ratio))

    def value(x):
        return loss(x, Tensor(xp.asarray(deltas)), targets, np.ones(3), config, CoderConfig()).total

    if backend.name_of(xp) == "numpy":  # seconds on the other, and nothing about it that it could change
        assert_gradients_match(value, logits, xp=xp, rng=rng)

    x = Tensor(xp.asarray(logits), requires_grad=True)
    losses = loss(x, Tensor(xp.asarray(deltas)), targets, np.ones(3), config, CoderConfig())
    losses.total.backward()
    p = 1 / (1 + np.exp(-logits))
    one_hot = targets.labels[..., None] == np.arange(2)
    p_t = np.where(one_hot, p, 1 - p)
    alpha_t = 1.0 if alpha is None else np.where(one_hot, alpha, 1 - alpha)
    terms = (-alpha_t * (1 - p_t) ** gamma * np.log(p_t)).sum(axis=2)  # eq. (3) where gamma is 0, (5) elsewhere
    rows = [in_words(terms[n], targets.labels[n], targets.all_anchors, config.mining) for n in range(3)]
    np.testing.assert_allclose(losses.classification, sum(terms[n, r].sum() for n, r in enumerate(rows)), rtol=1e-12)
    learned = (backend.to_numpy(x.grad) != 0).any(axis=2)
    assert [np.flatnonzero(mask).tolist() for mask in learned] == [sorted(r) for r in rows]
    assert len(rows[0]) == 8 if ratio is None else 0 == len(rows[2]) < len(rows[0])
    whole = loss(x, Tensor(xp.asarray(deltas)), targets, np.ones(3), LossConfig(), CoderConfig())
    assert whole.box == losses.box > 0  # the box loss is of every positive anchor


@pytest.mark.parametrize("alpha", [0.10, 0.25, 0.50, 0.75, 0.90, 0.99, 0.999])
def test_alpha_balanced_cross_entropy_is_equation_3(alpha, rng):
    """All of table 1a's settings: value, and gradient against differences."""
    logits, deltas, targets = a_batch(rng)

    def value(x):
        config = LossConfig(alpha=alpha, gamma=0.0, box_weight=0.0)
        return loss(x, Tensor(deltas), targets, np.ones(3), config, CoderConfig()).total

    one_hot = targets.labels[..., None] == np.arange(2)
    p_t = 1 / (1 + np.exp(np.where(one_hot, -logits, logits)))
    terms = -np.where(one_hot, alpha, 1 - alpha) * np.log(p_t) * (targets.labels != IGNORE)[..., None]
    np.testing.assert_allclose(float(value(Tensor(logits))), terms.sum(), rtol=1e-12)
    assert_gradients_match(value, logits, xp=numpy, rng=rng)


@pytest.mark.parametrize("config", TABLE, ids=lambda c: f"{c.batch}-{c.nms}-{c.ratio}")
def test_the_table_can_be_chosen(config, rng):
    rows = hard_examples(rng.exponential(size=400), np.full(400, BACKGROUND), crowded(rng), config)
    assert (len(rows) > 0) == (config.ratio is None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch": 0}, "needs batch >= 1 and 0 <= nms <= 1, got 0 and 0.5"),
        ({"nms": 1.5}, "got 128 and 1.5"),
        ({"ratio": 0}, "ratio must be at least 1 and below batch, or None, got 0"),
        ({"batch": 4, "ratio": 4}, "ratio must be at least 1 and below batch, or None, got 4"),
    ],
)
def test_impossible_mining_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        MiningConfig(**wrong)
