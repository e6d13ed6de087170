"""Anchors, matching, box deltas, the loss and the choice of detections."""

from __future__ import annotations

import math
from dataclasses import replace

import numba
import numpy as np
import pytest
from gradients import assert_gradients_match, away_from

from minidet import backend, kernels
from minidet.autograd import Tensor
from minidet.detection import (
    BACKGROUND,
    IGNORE,
    AnchorConfig,
    CoderConfig,
    Detections,
    LossConfig,
    MatcherConfig,
    PostprocessConfig,
    anchors_for,
    assign,
    assignment,
    build_targets,
    decode_boxes,
    decode_deltas,
    encode_boxes,
    image_weights,
    loss,
    octaves,
    postprocess,
)
from minidet.detection.anchors import cell_anchors
from minidet.detection.assignment import assign_from_iou, assign_images
from minidet.detection.criterion import MOVING_START
from minidet.kernels import boxes as boxes_module
from minidet.ops import bce_with_logits

numpy = backend.load("numpy")
libraries = pytest.mark.parametrize("xp", [numpy, backend.load("array_api_strict")], ids=["numpy", "strict"])

STRIDES = (8, 16, 32, 64, 128)
PAPER = AnchorConfig(octaves((32, 64, 128, 256, 512)), strides=STRIDES)


def grids(height, width):
    """Every level halves the one before, and rounds up."""
    return [(math.ceil(height / s), math.ceil(width / s)) for s in STRIDES]


# --- anchors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ((800, 800), 120_087),
        ((800, 1333), 200_700),
        ((600, 1000), 113_193),
        ((512, 512), 49_104),
        ((256, 256), 12_276),
        ((128, 128), 3_069),
    ],
)
def test_anchor_counts(size, count):
    anchors = anchors_for(PAPER, size, grids(*size))
    assert anchors.shape == (count, 4)
    assert anchors.dtype == np.float32
    assert PAPER.per_cell == 9


def test_anchors_have_the_areas_and_ratios_of_the_paper():
    for level, base in enumerate((32, 64, 128, 256, 512)):
        x1, y1, x2, y2 = cell_anchors(PAPER, level).astype(np.float64).T
        np.testing.assert_allclose(np.sqrt((x2 - x1) * (y2 - y1)), np.tile(base * 2 ** (np.arange(3) / 3), 3))
        np.testing.assert_allclose((y2 - y1) / (x2 - x1), np.repeat([0.5, 1, 2], 3), rtol=1e-6)
        np.testing.assert_array_equal(x1, -x2)
    assert 812 < x2[5] * 2 < 813  # "from 32 to 813 pixels"


def test_anchors_go_row_by_row_from_the_corner_of_the_cell():
    config = AnchorConfig(((4.0,), (8.0,)), ratios=(1.0,), strides=(8, 16))
    anchors = anchors_for(config, (16, 24), [(2, 3), (1, 2)])
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    first, second = [[0, 0], [8, 0], [16, 0], [0, 8], [8, 8], [16, 8]], [[0, 0], [16, 0]]
    assert centres.tolist() == first + second
    middle = anchors_for(replace(config, offset=0.5), (16, 24), [(2, 3), (1, 2)])
    np.testing.assert_array_equal(middle[:6], anchors[:6] + 4)
    np.testing.assert_array_equal(middle[6:], anchors[6:] + 8)


def test_the_two_orders_within_a_cell_are_permutations():
    by_ratio, by_scale = (cell_anchors(replace(PAPER, scale_major=major), 0) for major in (False, True))
    for ratio in range(3):
        for scale in range(3):
            np.testing.assert_array_equal(by_ratio[3 * ratio + scale], by_scale[3 * scale + ratio])


def test_rounding_goes_to_even():
    cell = cell_anchors(AnchorConfig(((101.0, 203.0),), ratios=(1.0,), rounded=True), 0)
    assert cell[:, 2].tolist() == [50, 102]  # 50.5 and 101.5


def test_strides_may_follow_the_padded_size():
    config = AnchorConfig(((4.0,),), ratios=(1.0,), strides=None)
    anchors = anchors_for(config, (100, 90), [(7, 4)])
    assert (anchors[1] - anchors[0]).tolist() == [90 // 4, 0, 90 // 4, 0]
    assert (anchors[4] - anchors[0]).tolist() == [0, 100 // 7, 0, 100 // 7]


def test_anchors_are_made_once_and_cannot_be_written_to():
    anchors = anchors_for(PAPER, (64, 64), grids(64, 64))
    assert anchors is anchors_for(PAPER, (64, 64), grids(64, 64))
    with pytest.raises(ValueError, match="read-only"):
        anchors[0] = 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sizes": ()}, "at least one size per level"),
        ({"sizes": ((32,), ())}, "at least one size per level"),
        ({"sizes": ((32,), (64, 80))}, r"each needs as many sizes, got \[1, 2\]"),
        ({"sizes": ((0,),)}, "must be positive"),
        ({"sizes": ((32,),), "ratios": (-1.0,)}, "must be positive"),
        ({"sizes": ((32,), (64,)), "strides": (8,)}, "2 levels of sizes but 1 strides"),
    ],
)
def test_impossible_anchors_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        AnchorConfig(**fields)


def test_anchors_need_a_grid_per_level():
    with pytest.raises(ValueError, match="sizes are given for 5 levels, the pyramid has 2"):
        anchors_for(PAPER, (64, 64), [(8, 8), (4, 4)])


# --- matching -----------------------------------------------------------------------------------------

ANCHORS = np.asarray([[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 4], [0, 0, 10, 3], [50, 50, 60, 60]], np.float32)
SQUARE = np.asarray([[0, 0, 10, 10]], np.float32)  # overlaps them by 1, .5, .4, .3 and 0


def test_thresholds_include_their_ends():
    """IoU .5 is positive and .4 is not background, though float32(.4) is not the float64 number."""
    assert assign(ANCHORS, SQUARE, MatcherConfig()).tolist() == [0, 0, IGNORE, BACKGROUND, BACKGROUND]
    assert assign(ANCHORS, SQUARE, MatcherConfig(0.5, 0.3)).tolist() == [0, 0, IGNORE, IGNORE, BACKGROUND]


def test_an_image_without_objects_is_all_background():
    nothing = np.zeros((0, 4), np.float32)
    assert assign(ANCHORS, nothing, MatcherConfig(low_quality=True)).tolist() == [BACKGROUND] * 5


def test_low_quality_matches_rescue_every_best_anchor():
    thin = np.asarray([[0, 0, 10, 1]], np.float32)
    assert (assign(ANCHORS[[0, 1, 4]], thin, MatcherConfig()) == BACKGROUND).all()
    assert assign(ANCHORS[[0, 1, 1, 4]], thin, MatcherConfig(low_quality=True)).tolist() == [-1, 0, 0, -1]


def test_a_rescued_anchor_goes_to_its_own_best_object():
    anchor = np.asarray([[0, 0, 10, 10]], np.float32)
    gt = np.asarray([[0, 0, 10, 2], [0, 0, 10, 3.9]], np.float32)  # object 0 rescues it, object 1 gets it
    assert assign(anchor, gt, MatcherConfig(low_quality=True)).tolist() == [1]


def test_an_object_that_overlaps_no_anchor_claims_none():
    gt = np.concatenate([SQUARE, SQUARE + 1000])
    config = MatcherConfig(low_quality=True)
    assert assign(ANCHORS, gt, config).tolist() == [0, 0, IGNORE, BACKGROUND, BACKGROUND]
    trap = replace(config, zero_iou=True)
    assert assign(ANCHORS, gt, trap).tolist() == [0] * 5  # its best IoU is 0, and all anchors attain that


@libraries
@pytest.mark.parametrize("zero_iou", [False, True])
@pytest.mark.parametrize("low_quality", [False, True])
def test_assign_equals_its_definition_on_the_matrix(xp, low_quality, zero_iou, rng):
    config = MatcherConfig(low_quality=low_quality, zero_iou=zero_iou)
    anchors = anchors_for(PAPER, (96, 128), grids(96, 128))
    for G in (1, 2, 9):
        corner = rng.uniform(0, 90, (G, 2))
        gt = np.concatenate([corner, corner + rng.uniform(5, 90, (G, 2))], axis=1).astype(np.float32)
        want = assign_from_iou(kernels.pairwise_iou(gt, anchors), config)
        got = assign(xp.asarray(anchors), xp.asarray(gt), config)
        np.testing.assert_array_equal(backend.to_numpy(got), want)


RULES = (
    MatcherConfig(0.5, 0.0), MatcherConfig(0.0, 0.0), MatcherConfig(low_quality=True),
    MatcherConfig(low_quality=True, zero_iou=True),
)  # fmt: skip


def batch_to_match(rng, dtype, R: int, counts):
    """Anchors, all objects, and where each image's end: overlapped equally, by nothing, or without an area."""
    anchors = boxes(rng, R, np.dtype(dtype))
    anchors[R // 2 :: 7, 2:] = anchors[R // 2 :: 7, :2]
    objects = [boxes(rng, count, np.dtype(dtype)) for count in counts]
    if len(counts) > 1:
        objects[-1] = anchors[[0, 0, R // 2, R - 1]]
        objects[1] = np.concatenate([objects[1], objects[1] + 5000])[::-1]
    everything = np.concatenate([np.zeros((0, 4), dtype), *objects])
    return anchors, everything, np.cumsum([0, *map(len, objects)]).tolist()


def assert_matched(matches, anchors, objects, ends, config):
    assert matches.shape == (len(ends) - 1, len(anchors))
    for one, start, stop in zip(matches, ends[:-1], ends[1:], strict=True):
        iou = kernels.pairwise_iou(objects[start:stop], anchors)
        want = assign_from_iou(iou, config) if stop > start else [BACKGROUND] * len(anchors)
        np.testing.assert_array_equal(one, want)


@libraries
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("counts", [(), (0,), (0, 0), (3,), (0, 2, 0, 1, 5, 0)])
@pytest.mark.parametrize("config", RULES, ids=str)
def test_a_batch_is_matched_as_its_images_are(config, counts, dtype, xp, rng):
    for R in (1, 127, 128, 300):
        anchors, objects, ends = batch_to_match(rng, dtype, R, counts)
        version = "claiming" if config.low_quality else "fast"
        if backend.name_of(xp) == "numpy" and len(objects):
            assert assign_images.choose(anchors, objects, ends, config)[0] == f"numpy:{version}"
        for only in (version, "textbook"):
            with kernels.only(only):
                got = assign_images(xp.asarray(anchors), xp.asarray(objects), ends, config)
            assert got.dtype == xp.int64
            assert_matched(backend.to_numpy(got), anchors, objects, ends, config)


@pytest.mark.parametrize("config", RULES, ids=str)
def test_a_batch_is_matched_by_the_same_lines_in_python(config, rng, monkeypatch):
    for name in ("match_all", "claim"):
        monkeypatch.setattr(assignment, name, getattr(boxes_module, name).py_func)
    monkeypatch.setattr(boxes_module, "iou_of", boxes_module.iou_of.py_func)
    monkeypatch.setattr(boxes_module, "_LANES", 8)
    monkeypatch.setattr(assignment, "_assign_image", assignment._assign_image.one_by_one)
    anchors, objects, ends = batch_to_match(rng, "float32", 19, (0, 2, 1, 0))
    assert_matched(assignment._assign_images_numba(anchors, objects, ends, config), anchors, objects, ends, config)


def test_small_objects_cannot_reach_the_thresholds():
    """The smallest anchor has 32^2 pixels: under 512 an object cannot reach IoU .5, under 409.6 not .4."""
    anchors = anchors_for(PAPER, (128, 128), grids(128, 128))
    for area, label in ((513, 0), (511, IGNORE), (408, BACKGROUND)):
        half = math.sqrt(area) / 2
        gt = np.asarray([[64 - half, 64 - half, 64 + half, 64 + half]], np.float32)
        best = kernels.pairwise_iou(anchors, gt).argmax()
        assert assign(anchors, gt, MatcherConfig())[best] == label


@pytest.mark.parametrize(("high", "low"), [(0.4, 0.5), (1.5, 0.4), (0.5, -0.1)])
def test_impossible_thresholds_are_refused(high, low):
    with pytest.raises(ValueError, match="needs 0 <= low <= high <= 1"):
        MatcherConfig(high, low)


# --- deltas --------------------------------------------------------------------------------------------

SCALED = CoderConfig(weights=(10.0, 10.0, 5.0, 5.0))


def boxes(rng, count, dtype=np.float64):
    corner = rng.uniform(-20, 80, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(5, 60, (count, 2))], axis=1).astype(dtype)


def test_deltas_by_hand():
    anchor = np.asarray([[0, 0, 10, 20.0]])
    box = np.asarray([[5, 10, 25, 20.0]])  # centre (5, 10) -> (15, 15), sides (10, 20) -> (20, 10)
    deltas = encode_boxes(box, anchor, CoderConfig())
    np.testing.assert_allclose(deltas, [[1.0, 0.25, math.log(2), -math.log(2)]])
    np.testing.assert_allclose(encode_boxes(box, anchor, SCALED), deltas * [10, 10, 5, 5])


@libraries
@pytest.mark.parametrize("config", [CoderConfig(), SCALED], ids=["plain", "scaled"])
def test_decoding_inverts_encoding(xp, config, rng):
    anchors, wanted = xp.asarray(boxes(rng, 30)), xp.asarray(boxes(rng, 30))
    deltas = encode_boxes(wanted, anchors, config)
    np.testing.assert_allclose(
        backend.to_numpy(decode_boxes(deltas, anchors, config)), backend.to_numpy(wanted), rtol=1e-12
    )


@libraries
@pytest.mark.parametrize("config", [CoderConfig(), SCALED], ids=["plain", "scaled"])
def test_gradient_of_decoding(xp, config, rng):
    anchors = boxes(rng, 6).reshape(2, 3, 4)
    bound = config.clip * np.asarray(config.weights)
    deltas = away_from(rng.normal(0, 3, (2, 3, 4)) * config.weights, bound)
    deltas[0, 0, 2:] = bound[2:] + 1  # beyond the clip on both axes
    assert_gradients_match(
        lambda d: decode_deltas(d, xp.asarray(anchors), config), deltas, xp=xp, rng=rng, rtol=1e-6, atol=1e-5
    )


def test_the_clip_passes_the_gradient_at_the_bound_and_not_beyond():
    config = CoderConfig()
    deltas = Tensor(np.asarray([[0, 0, d, 0] for d in (config.clip, config.clip + 1e-9)]), requires_grad=True)
    box = decode_deltas(deltas, np.asarray([[0, 0, 16, 16.0]]), config)
    np.testing.assert_allclose(box.data[:, 2] - box.data[:, 0], 1000)
    box.backward(np.asarray([[0, 0, 1.0, 0]] * 2))
    np.testing.assert_allclose(deltas.grad[:, 2], [500, 0])


# --- the loss --------------------------------------------------------------------------------------------


def a_batch(rng, objects=(3, 0, 5), K=4, dtype=np.float64):
    """Logits, deltas and targets of three small images, one of them empty."""
    anchors = anchors_for(AnchorConfig(octaves((8, 16, 32, 64, 128)), strides=STRIDES), (48, 64), grids(48, 64))
    gt = [boxes(rng, G, np.float32) for G in objects]
    labels = [rng.integers(0, K, G) for G in objects]
    targets = build_targets(anchors, gt, labels, MatcherConfig(low_quality=True))
    N, R = len(objects), len(anchors)
    return rng.normal(-2, 1, (N, R, K)).astype(dtype), rng.normal(0, 1, (N, R, 4)).astype(dtype), targets


def in_words(logits, deltas, targets, config, coder):
    """The loss as the configuration describes it, image by image and anchor by anchor."""
    classification, box = [], []
    for n, labels in enumerate(targets.labels):
        counted = labels != IGNORE
        one_hot = (labels[:, None] == np.arange(logits.shape[2])).astype(np.float64)
        terms, _ = kernels.focal_terms(logits[n], one_hot, config.alpha, config.gamma)
        classification.append(terms[counted].sum())
        box.append(0.0)
    R = deltas.shape[1]
    for row, gt, anchor in zip(targets.rows, targets.boxes, targets.anchors, strict=True):
        n, r = divmod(row, R)
        if config.box == "giou":
            found = decode_boxes(deltas[n, r], anchor, coder)
            box[n] += 1 - giou(found, gt)
        else:
            d = np.abs(deltas[n, r] - encode_boxes(gt[None].astype(float), anchor[None].astype(float), coder)[0])
            beta = config.beta if config.box == "smooth_l1" else 0.0
            box[n] += sum(0.5 * e * e / beta if e < beta else e - beta / 2 for e in d)
    return np.asarray(classification), config.box_weight * np.asarray(box)


def giou(a, b):
    intersection = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return intersection / union - (hull - union) / hull


@libraries
@pytest.mark.parametrize("coder", [CoderConfig(), SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize(
    "config",
    [
        LossConfig(box="l1", normaliser="image"),
        LossConfig(box="smooth_l1", beta=0.3, alpha=None, gamma=0.0, box_weight=2.5),
        LossConfig(box="giou", normaliser="moving"),
    ],
    ids=lambda c: f"{c.box}-{c.normaliser}",
)
def test_the_loss_is_what_its_configuration_says(xp, config, coder, rng):
    logits, deltas, targets = a_batch(rng)
    N = len(logits)
    if config.normaliser == "image":
        factors = 1 / (N * np.maximum(1, targets.positives))
    elif config.normaliser == "batch":
        factors = np.full(N, 1 / targets.positives.sum())
    else:
        factors = np.full(N, 1 / (0.9 * MOVING_START + 0.1 * targets.positives.sum()))
    weights, _ = image_weights(config, targets.positives)
    np.testing.assert_allclose(weights, factors, rtol=1e-15)

    got = loss(Tensor(xp.asarray(logits)), Tensor(xp.asarray(deltas)), targets, weights, config, coder)
    classification, box = in_words(logits, deltas, targets, config, coder)
    np.testing.assert_allclose(got.classification, (factors * classification).sum(), rtol=1e-12)
    np.testing.assert_allclose(got.box, (factors * box).sum(), rtol=1e-6)
    np.testing.assert_allclose(float(got.total), got.classification + got.box, rtol=1e-15)
    assert targets.positives.sum() == len(targets.rows) > 0


@pytest.mark.parametrize("box", ["l1", "smooth_l1", "giou"])
def test_the_gradient_of_the_loss_along_random_directions(box, rng):
    logits, deltas, targets = a_batch(rng)
    config, coder = LossConfig(box=box), CoderConfig()
    weights, _ = image_weights(config, targets.positives)

    def value(x, d):
        return loss(x, d, targets, weights, config, coder)

    x, d = Tensor(logits, requires_grad=True), Tensor(deltas, requires_grad=True)
    value(x, d).total.backward()
    for _ in range(5):
        u, v = rng.normal(size=logits.shape), rng.normal(size=deltas.shape)
        step = 1e-6
        up, down = (float(value(Tensor(logits + s * u), Tensor(deltas + s * v)).total) for s in (step, -step))
        np.testing.assert_allclose((up - down) / (2 * step), np.sum(x.grad * u) + np.sum(d.grad * v), rtol=1e-6)


def test_only_positive_anchors_have_a_box_loss_and_ignored_ones_none(rng):
    logits, deltas, targets = a_batch(rng)
    weights, _ = image_weights(LossConfig(), targets.positives)
    x, d = Tensor(logits, requires_grad=True), Tensor(deltas, requires_grad=True)
    loss(x, d, targets, weights, LossConfig(), CoderConfig()).total.backward()
    touched = np.flatnonzero((d.grad != 0).any(axis=2))
    np.testing.assert_array_equal(touched, targets.rows)
    np.testing.assert_array_equal((x.grad != 0).all(axis=2), targets.labels != IGNORE)
    assert (targets.labels == IGNORE).any()


@pytest.mark.parametrize("normaliser", ["batch", "image", "moving"])
@pytest.mark.parametrize("box", ["smooth_l1", "giou"])
def test_a_batch_without_objects_still_teaches_background(box, normaliser, rng):
    logits, deltas, targets = a_batch(rng, objects=(0, 0))
    config = LossConfig(box=box, normaliser=normaliser)
    weights, moving = image_weights(config, targets.positives)
    x, d = Tensor(logits, requires_grad=True), Tensor(deltas, requires_grad=True)
    got = loss(x, d, targets, weights, config, CoderConfig())
    got.total.backward()
    assert got.box == 0.0
    assert got.classification > 0
    assert (x.grad > 0).all()
    assert (d.grad == 0).all()
    assert moving == (90.1 if normaliser == "moving" else MOVING_START)


@pytest.mark.parametrize("normaliser", ["batch", "image", "moving"])
def test_micro_batches_add_up_to_the_batch(normaliser, rng):
    logits, deltas, whole = a_batch(rng, objects=(3, 0, 5, 1))
    config, coder = LossConfig(normaliser=normaliser), CoderConfig()
    R, weights = deltas.shape[1], image_weights(config, whole.positives)[0]
    x, d = Tensor(logits, requires_grad=True), Tensor(deltas, requires_grad=True)
    total = loss(x, d, whole, weights, config, coder)
    total.total.backward()
    parts = []
    for half in (slice(0, 2), slice(2, 4)):
        mine = (whole.rows // R >= half.start) & (whole.rows // R < half.stop)
        part = replace(
            whole,
            labels=whole.labels[half],
            rows=whole.rows[mine] - half.start * R,
            boxes=whole.boxes[mine],
            anchors=whole.anchors[mine],
            positives=whole.positives[half],
        )
        xs, ds = Tensor(logits[half], requires_grad=True), Tensor(deltas[half], requires_grad=True)
        parts.append(loss(xs, ds, part, weights[half], config, coder))
        parts[-1].total.backward()
        np.testing.assert_allclose(xs.grad, x.grad[half], rtol=1e-12)
        np.testing.assert_allclose(ds.grad, d.grad[half], rtol=1e-12)
    np.testing.assert_allclose(sum(p.classification for p in parts), total.classification, rtol=1e-12)
    np.testing.assert_allclose(sum(p.box for p in parts), total.box, rtol=1e-12)


def test_the_moving_normaliser_is_detectron2s():
    config, moving = LossConfig(normaliser="moving"), MOVING_START
    seen = []
    for _ in range(3):
        weights, moving = image_weights(config, np.asarray([30, 37]), moving)
        seen.append(moving)
        np.testing.assert_allclose(weights, 1 / moving)
    np.testing.assert_allclose(seen, [96.7, 93.73, 91.057], rtol=1e-12)


PRIOR = -math.log((1 - 0.01) / 0.01)


@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="ten million turns of a Python loop")
@pytest.mark.parametrize(("size", "classes", "sum_of_loss"), [(800, 80, 7.241), (256, 80, 0.7403)])
def test_the_loss_at_step_0_is_known_beforehand(size, classes, sum_of_loss):
    """With prior .01 background costs 7.53775e-7 per anchor and class, and every positive about 1.12838."""
    R = len(anchors_for(PAPER, (size, size), grids(size, size)))
    logits = Tensor(np.full((1, R, classes), PRIOR, np.float32))
    deltas = Tensor(np.zeros((1, R, 4), np.float32))
    targets = build_targets(np.zeros((R, 4), np.float32), [np.zeros((0, 4))], [np.zeros(0)], MatcherConfig())
    start = loss(logits, deltas, targets, np.ones(1), LossConfig(), CoderConfig())
    np.testing.assert_allclose(start.classification, R * classes * 7.53775e-7, rtol=2e-6)
    np.testing.assert_allclose(start.classification, sum_of_loss, rtol=1e-4)

    targets.labels[0, :10] = 3
    more = loss(logits, deltas, targets, np.ones(1), LossConfig(), CoderConfig()).classification
    np.testing.assert_allclose(more - start.classification, 10 * 1.12838, rtol=1e-5)


def test_what_the_prior_and_the_focusing_save_at_step_0():
    R, K = 120_087, 80
    one = lambda x, gamma, alpha: float(  # noqa: E731
        kernels.focal_terms(np.full(1, x), np.zeros(1), alpha, gamma)[0][0] * R * K
    )
    np.testing.assert_allclose(one(0.0, 2.0, 0.25), 1.2486e6, rtol=1e-4)
    np.testing.assert_allclose(one(0.0, 2.0, 0.25) / one(PRIOR, 2.0, 0.25), 172_000, rtol=5e-3)
    np.testing.assert_allclose(one(PRIOR, 0.0, None), 9.66e4, rtol=1e-3)
    np.testing.assert_allclose(one(0.0, 0.0, None), 6.66e6, rtol=1e-3)


def test_without_focusing_the_focal_loss_is_cross_entropy(rng):
    logits, deltas, targets = a_batch(rng, objects=(3,))
    config = LossConfig(alpha=None, gamma=0.0)
    got = loss(Tensor(logits), Tensor(deltas), targets, np.ones(1), config, CoderConfig()).classification
    one_hot = (targets.labels[0, :, None] == np.arange(4)).astype(float)
    plain = bce_with_logits(Tensor(logits[0]), one_hot).data
    np.testing.assert_allclose(got, plain[targets.labels[0] != IGNORE].sum(), rtol=1e-12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"box": "l2"}, "box must be one of l1, smooth_l1, giou, got 'l2'"),
        ({"normaliser": "none"}, "normaliser must be one of batch, image, moving, got 'none'"),
        ({"alpha": -1.0}, r"alpha must lie in \[0, 1\] or be None, got -1.0"),
        ({"gamma": -0.5}, "must not be negative"),
    ],
)
def test_impossible_losses_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**fields)


def test_targets_must_fit_the_logits(rng):
    logits, deltas, targets = a_batch(rng, objects=(3,))
    fits = (LossConfig(), CoderConfig())
    few = logits[:, :, : targets.labels.max()]
    with pytest.raises(ValueError, match=rf"targets name class {few.shape[2]}, the model has {few.shape[2]}"):
        loss(Tensor(few), Tensor(deltas), targets, np.ones(1), *fits)
    with pytest.raises(ValueError, match="logits are for 1 x 5 anchors, targets for"):
        loss(Tensor(logits[:, :5]), Tensor(deltas[:, :5]), targets, np.ones(1), *fits)


# --- detections --------------------------------------------------------------------------------------------


def one_by_one(logits, deltas, anchors, level_counts, size, config, coder):
    """What `postprocess` does to one image, without its short cuts."""
    candidates, start = [], 0
    for count in level_counts:
        level = []
        for r in range(start, start + count):
            for k, x in enumerate(logits[r]):
                score = 1 / (1 + np.exp(-x, dtype=logits.dtype))
                if score > config.score_threshold:
                    level.append((score, r, k))
        level.sort(key=lambda found: -found[0])  # stable
        candidates += level[: config.top_k]
        start += count
    rows = [r for _, r, _ in candidates]
    scores = np.asarray([s for s, _, _ in candidates], logits.dtype)
    labels = np.asarray([k for _, _, k in candidates], np.int64)
    found = decode_boxes(deltas[rows], anchors[rows], coder)
    height, width = size
    cut = np.stack([np.clip(found[:, 0], 0, width), np.clip(found[:, 1], 0, height),
                    np.clip(found[:, 2], 0, width), np.clip(found[:, 3], 0, height)], axis=1)  # fmt: skip
    seen = cut if config.clip == "before_nms" else found
    keep = []
    for n in np.argsort(-scores, kind="stable"):
        rivals = [m for m in keep if labels[m] == labels[n]]
        if not rivals or kernels.pairwise_iou(seen[[n]], seen[rivals]).max() <= config.nms_threshold:
            keep.append(n)
    keep = keep[: config.max_detections]
    result = found if config.clip == "never" else cut
    if config.drop_empty:
        keep = [n for n in keep if (result[n, 2:] > result[n, :2]).all()]
    return Detections(result[keep], scores[keep], labels[keep])


@pytest.mark.parametrize(
    "config",
    [
        PostprocessConfig(),
        PostprocessConfig(score_threshold=0.0, top_k=7, max_detections=9),
        PostprocessConfig(clip="after_nms", drop_empty=True, nms_threshold=0.3),
        PostprocessConfig(clip="never", score_threshold=0.3),
    ],
    ids=["default", "few", "after", "never"],
)
def test_postprocess_does_what_it_says(config, rng):
    anchors = anchors_for(PAPER, (48, 64), grids(48, 64))
    counts = [9 * h * w for h, w in grids(48, 64)]
    logits = np.round(rng.normal(-3, 2, (2, len(anchors), 3)) * 4).astype(np.float32) / 4  # many ties
    deltas = rng.normal(0, 0.7, (2, len(anchors), 4)).astype(np.float32)
    sizes = [(48, 64), (40, 50)]
    got = postprocess(logits, deltas, anchors, counts, sizes, config, CoderConfig())
    for n in range(2):
        want = one_by_one(logits[n], deltas[n], anchors, counts, sizes[n], config, CoderConfig())
        assert len(got[n]) == len(want) > 0
        np.testing.assert_array_equal(got[n].labels, want.labels)
        np.testing.assert_allclose(got[n].scores, want.scores, rtol=1e-6)
        np.testing.assert_array_equal(got[n].boxes, want.boxes)
        assert (got[n].boxes.dtype, got[n].scores.dtype, got[n].labels.dtype) == (np.float32, np.float32, np.int64)


def a_grid_of_boxes(count):
    """Anchors that do not overlap, and deltas that leave them alone."""
    x = 20.0 * np.arange(count, dtype=np.float32)
    return np.stack([x, 0 * x, x + 10, 0 * x + 10], axis=1), np.zeros((1, count, 4), np.float32)


def test_a_score_on_the_threshold_is_not_enough():
    anchors, deltas = a_grid_of_boxes(3)
    logits = np.asarray([[[0.0], [1e-6], [-1e-6]]], np.float32)
    config = PostprocessConfig(score_threshold=0.5)
    (found,) = postprocess(logits, deltas, anchors, [3], [(99, 99)], config, CoderConfig())
    assert found.boxes[:, 0].tolist() == [20]


def test_every_level_sends_its_own_best_and_ties_go_to_the_first():
    anchors, deltas = a_grid_of_boxes(6)
    logits = np.asarray([[[2.0], [2.0], [2.0], [1.0], [0.5], [1.0]]], np.float32)
    config = PostprocessConfig(top_k=2)
    (found,) = postprocess(logits, deltas, anchors, [3, 3], [(99, 999)], config, CoderConfig())
    assert found.boxes[:, 0].tolist() == [0, 20, 60, 100]


def test_classes_do_not_suppress_each_other():
    anchors = np.asarray([[0, 0, 10, 10]], np.float32)
    logits = np.asarray([[[1.0, 3.0, -9.0]]], np.float32)
    zero = np.zeros((1, 1, 4), np.float32)
    (found,) = postprocess(logits, zero, anchors, [1], [(9, 9)], PostprocessConfig(), CoderConfig())
    assert found.labels.tolist() == [1, 0]
    assert found.boxes.tolist() == [[0, 0, 9, 9]] * 2


def test_clipping_before_nms_can_make_rivals_of_boxes():
    anchors = np.asarray([[-10, 0, 10, 10], [0, 0, 10, 10]], np.float32)  # IoU .5 outside, 1 inside of the image
    logits, zero = np.asarray([[[2.0], [1.0]]], np.float32), np.zeros((1, 2, 4), np.float32)
    counts = {}
    for clip in ("before_nms", "after_nms", "never"):
        config = PostprocessConfig(clip=clip)
        (found,) = postprocess(logits, zero, anchors, [2], [(20, 20)], config, CoderConfig())
        counts[clip] = (len(found), float(found.boxes[0, 0]))
    assert counts == {"before_nms": (1, 0.0), "after_nms": (2, 0.0), "never": (2, -10.0)}


def test_boxes_without_area_are_dropped_only_on_request():
    anchors = np.asarray([[30, 0, 40, 10], [0, 0, 10, 10]], np.float32)
    logits, zero = np.asarray([[[2.0], [1.0]]], np.float32), np.zeros((1, 2, 4), np.float32)
    for drop, count in ((False, 2), (True, 1)):
        config = PostprocessConfig(drop_empty=drop)
        (found,) = postprocess(logits, zero, anchors, [2], [(20, 20)], config, CoderConfig())
        assert len(found) == count


def test_an_image_may_have_no_detections():
    anchors, deltas = a_grid_of_boxes(3)
    logits = np.full((1, 3, 4), -9, np.float32)
    (found,) = postprocess(logits, deltas, anchors, [3], [(9, 9)], PostprocessConfig(), CoderConfig())
    assert (len(found), found.boxes.shape, found.scores.dtype) == (0, (0, 4), np.float32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clip": "sometimes"}, "clip must be one of before_nms, after_nms, never, got 'sometimes'"),
        ({"score_threshold": 1.0}, r"thresholds must lie in \[0, 1\]"),
        ({"nms_threshold": -0.1}, r"thresholds must lie in \[0, 1\]"),
        ({"top_k": 0}, "must be at least 1"),
        ({"max_detections": 0}, "must be at least 1"),
    ],
)
def test_impossible_postprocessing_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PostprocessConfig(**fields)
