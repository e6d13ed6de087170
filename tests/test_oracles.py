"""Numbers that a RetinaNet must reproduce whoever wrote it: parameters, anchors, and the loss before training.

Counts of torchvision's are published with its weights; the rest is arithmetic on the paper's definitions.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from minidet.autograd import Tensor, no_grad
from minidet.detection import BACKGROUND, Targets, build_targets, image_weights, loss
from minidet.models import RetinaNet, presets

CLASSES = tuple(str(i) for i in range(91))


def parameters(config) -> int:
    return sum(math.prod(p.shape) for p in RetinaNet(config, xp=np).parameters())


@pytest.mark.parametrize(
    ("preset", "classes", "count"),
    [
        ("torchvision_v1", 91, 34_014_999),
        ("torchvision_v2", 91, 38_198_935),
        ("paper", 80, 37_915_572),
        ("detectron2", 80, 37_915_572),
        ("torchvision_v1", 80, 33_786_804),
    ],
)
def test_parameters(preset, classes, count, undrawn):
    assert parameters(presets.PRESETS[preset](CLASSES[:classes])) == count


def test_parameters_of_batch_norm(undrawn):
    """A weight and a bias for each of 26,560 filters, where it is not frozen."""
    config = presets.paper(CLASSES[:80])
    norm = replace(config.backbone.norm, name="batch")
    trained = replace(config, backbone=replace(config.backbone, norm=norm))
    assert parameters(trained) - parameters(config) == 53_120


@pytest.mark.parametrize(
    ("height", "width", "count"),
    [
        (800, 800, 120_087),
        (800, 1333, 200_700),
        (600, 1000, 113_193),
        (512, 512, 49_104),
        (256, 256, 12_276),
        (128, 128, 3_069),
    ],
)
def test_anchors(height, width, count, undrawn):
    """Nine a cell; P6 and P7 round up like every other level."""
    model = RetinaNet(presets.paper(CLASSES[:1]), xp=np)
    assert model.anchors(height, width).shape == (count, 4)
    assert sum(model.level_counts(height, width)) == count


def test_smallest_and_largest_anchor(undrawn):
    """Section 4: "32 to 813 pixels"."""
    model = RetinaNet(presets.paper(CLASSES[:1]), xp=np)
    boxes = model.anchors(512, 512)
    sides = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    assert (round(float(sides.min())), round(float(sides.max()))) == (32, 813)


# The first loss: every anchor says "object" with the prior, so that it has a closed form.


def first_loss(anchors: int, classes: int, *, prior: float, positives: int = 0, **settings) -> float:
    """The classification loss of logits that all say `prior`, not divided by the positives."""
    config = replace(presets.paper(CLASSES[:1]).loss, **settings)
    labels = np.full((1, anchors), BACKGROUND)
    labels[0, :positives] = 0
    none = np.zeros((0, 4))
    targets = Targets(labels, np.zeros(0, np.int64), none, none, np.array([positives]), none)
    logits = Tensor(np.full((1, anchors, classes), -math.log((1 - prior) / prior)))
    coder = presets.paper(CLASSES[:1]).coder
    return loss(logits, Tensor(np.zeros((1, anchors, 4))), targets, np.ones(1), config, coder).classification


def test_the_first_loss_of_background():
    """.75 * .01^2 * -log .99 for each anchor and class."""
    each = 7.53775e-7
    assert first_loss(1, 1, prior=0.01) == pytest.approx(each, rel=1e-6)
    assert first_loss(3_069, 80, prior=0.01) == pytest.approx(3_069 * 80 * each, rel=1e-6)
    assert first_loss(12_276, 80, prior=0.01) == pytest.approx(0.7403, rel=1e-4)  # an image of 256 x 256
    assert each * 120_087 * 80 == pytest.approx(7.241, rel=1e-4)  # of 800 x 800


def test_the_first_loss_of_an_object():
    """.25 * .99^2 * -log .01, in place of the background's for its class."""
    with_one = first_loss(100, 80, prior=0.01, positives=1)
    assert with_one - first_loss(100, 80, prior=0.01) == pytest.approx(1.12838 - 7.53775e-7, rel=1e-5)


def test_what_the_prior_and_the_focus_save():
    """Of 120,087 anchors x 80 classes of background; section 4.1: without a prior training diverges."""
    image, cross_entropy = 120_087 * 80, {"alpha": None, "gamma": 0.0}
    assert image * first_loss(1, 1, prior=0.5) == pytest.approx(1.2486e6, rel=1e-4)
    assert image * first_loss(1, 1, prior=0.01, **cross_entropy) == pytest.approx(9.66e4, rel=1e-3)
    assert image * first_loss(1, 1, prior=0.5, **cross_entropy) == pytest.approx(6.66e6, rel=1e-3)


def test_the_first_loss_of_a_network():
    """1.128 + 7.53775e-7 R K / N_pos, but for the noise of the first weights, and ignored anchors."""
    config = presets.paper(CLASSES[:20])
    thin = replace(config.backbone, stem=8, widths=(4, 8, 8, 8), blocks=(1, 1, 1, 1))
    model = RetinaNet(replace(config, backbone=thin, pyramid=replace(config.pyramid, channels=32)), xp=np)
    images = np.random.default_rng(0).normal(size=(1, 256, 256, 3)).astype(np.float32)
    anchors = model.anchors(256, 256)
    boxes = [np.array([[30, 40, 150, 130], [160, 20, 250, 240]], np.float32)]
    targets = build_targets(anchors, boxes, [np.array([3, 7])], config.matcher)
    weights, _ = image_weights(config.loss, targets.positives)
    with no_grad():
        found = loss(*model(Tensor(images)), targets, weights, config.loss, config.coder)
    positives = targets.positives.sum()
    assert positives > 10
    expected = 1.12838 + 7.53775e-7 * (targets.labels != -2).sum() * 20 / positives
    assert found.classification == pytest.approx(expected, rel=0.01)
