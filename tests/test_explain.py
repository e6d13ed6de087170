"""One picture explained: every number is what training and detection make of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
from sabotage import edited

import minidet as md
from minidet import cli
from minidet.autograd import Tensor, no_grad
from minidet.cli.train import _with
from minidet.data import coco
from minidet.detection import MatcherConfig, assign, build_targets, image_weights, loss
from minidet.detection.mining import MiningConfig
from minidet.images import ImageError, open_image
from minidet.kernels.boxes import pairwise_iou
from minidet.models import RetinaNet, presets
from minidet.training import SCRATCH, Checkpoint, write_checkpoint
from minidet.training.settings import to_json

SIDE = 96  # pixels that pictures of 64 are enlarged to


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.coco_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def model():
    """The tiny network with class outputs that differ, so that scores do."""
    config, _ = _with([f"{k}={v}" for k, v in tiny.SETTINGS.items()], presets.small(md.shapes().classes), SCRATCH)
    config = replace(config, preprocess=replace(config.preprocess, min_size=SIDE, max_size=2 * SIDE))
    model = RetinaNet(config, seed=1)
    final = model.head.class_subnet.final.weight
    final.data = 40 * final.data
    return model


@pytest.fixture(scope="module")
def run(model, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    names = model.config.classes
    saved = Checkpoint(to_json(model.config), names, tuple(range(1, len(names) + 1)), model.state_dict())
    write_checkpoint(out / "last.safetensors", saved)
    return out


@pytest.fixture(scope="module")
def explained(model, folder):
    """A picture with several objects: its explanation, and its row in the data."""
    data = coco(folder)
    row = max(range(len(data)), key=lambda n: len(data[n].boxes))
    path = folder / "images" / data[row].name
    return md.explain(model, path, annotations=data.path), data[row], path


def test_detections_are_those_of_detect(explained, model):
    explanation, _, path = explained
    found = md.detect(model, path)
    assert len(found) == len(explanation.detections) > 20
    np.testing.assert_allclose([d.box for d in explanation.detections], found.boxes, atol=1e-4)
    np.testing.assert_array_equal([d.score for d in explanation.detections], found.scores)
    assert [d.label for d in explanation.detections] == [found.classes[label] for label in found.labels]


def test_a_detection_can_be_computed_by_hand(explained):
    """Logit to score, anchor and deltas to the decoded box, that to the picture's pixels."""
    explanation, _, _ = explained
    assert explanation.scale == (SIDE / 64, SIDE / 64)
    for d in explanation.detections:
        assert d.score == pytest.approx(1 / (1 + math.exp(-d.logit)), rel=1e-5)
        (x1, y1, x2, y2), (dx, dy, dw, dh) = d.anchor, d.deltas
        assert {3: 8, 4: 16}[d.level] * 1.9 < math.sqrt((x2 - x1) * (y2 - y1)) < {3: 26, 4: 51}[d.level]
        x, y = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
        w, h = (x2 - x1) * math.exp(dw), (y2 - y1) * math.exp(dh)
        decoded = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
        np.testing.assert_allclose(d.decoded, decoded, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(d.box, np.clip(decoded, 0, SIDE) * 64 / SIDE, rtol=1e-4, atol=1e-3)


def test_who_gave_way_to_whom(explained, model):
    """Everything that was suppressed overlaps its suppressor too much, scores no more, and is there once."""
    explanation, _, _ = explained
    threshold = model.config.postprocess.nms_threshold
    gone = []
    for d in explanation.detections:
        for s in d.suppressed:
            iou = pairwise_iou(np.array([d.box], np.float32), np.array([s.box], np.float32))[0, 0]
            assert s.iou == pytest.approx(iou, abs=1e-4) and iou > threshold and s.score <= d.score
            gone.append((d.label, s.box))
    assert len(gone) == len(set(gone)) > 50
    kept = [(d.label, d.box) for d in explanation.detections]
    assert not set(gone) & set(kept)


def test_the_objects_are_what_training_makes_of_them(explained, model):
    explanation, sample, _ = explained
    anchors = model.anchors(SIDE, SIDE)
    boxes = sample.boxes * np.float32(SIDE / 64)
    matches, iou = assign(anchors, boxes, model.config.matcher), pairwise_iou(anchors, boxes)
    assert len(explanation.objects) == len(boxes) > 2
    for n, o in enumerate(explanation.objects):
        assert o.label == model.config.classes[sample.labels[n]]
        np.testing.assert_allclose(o.box, sample.boxes[n], atol=1e-3)
        assert o.iou == iou[:, n].max() and o.anchors == (matches == n).sum()
        np.testing.assert_allclose(np.array(o.anchor) * SIDE / 64, anchors[iou[:, n].argmax()], atol=1e-3)
        assert o.level == (3 if iou[:, n].argmax() < model.level_counts(SIDE, SIDE)[0] else 4)
        assert o.status == ("positive" if (iou[matches == n, n] >= 0.5).any() else "low-quality")


@pytest.mark.parametrize("settings", [{}, {"box": "giou", "normaliser": "image"}, {"mining": MiningConfig(32)}])
def test_the_shares_are_of_the_criterions_loss(model, explained, settings):
    explanation, sample, path = explained
    criterion = replace(model.config.loss, **settings)
    other = RetinaNet(replace(model.config, loss=criterion))
    other.load_state_dict(model.state_dict())
    explanation = md.explain(other, path, boxes=sample.boxes, labels=sample.labels)
    image = other.config.preprocess.prepare(open_image(path))
    targets = build_targets(
        other.anchors(SIDE, SIDE), [sample.boxes * np.float32(SIDE / 64)], [sample.labels], other.config.matcher
    )
    weights, _ = image_weights(criterion, targets.positives)
    with no_grad():
        whole = loss(*other(Tensor(image[None])), targets, weights, criterion, other.config.coder)
    assert explanation.loss == pytest.approx(float(whole.total.data), rel=1e-5)
    shares = [o.share for o in explanation.objects]
    assert sum(shares) + explanation.background / explanation.loss == pytest.approx(1)
    assert all(share > 0 for share in shares)


def test_every_status(model):
    """By the paper's rule and with low-quality matches; the last object is the first one again."""
    image = np.full((SIDE, SIDE, 3), 90, np.uint8)
    strict = RetinaNet(replace(model.config, matcher=MatcherConfig()))
    between = np.array([[64, 8, 64 + side, 8 + side] for side in np.linspace(4, 16, 49)], np.float32)
    best = pairwise_iou(model.anchors(SIDE, SIDE), between).max(axis=0)
    ignored = between[np.flatnonzero((best > 0.41) & (best < 0.49))[0]]
    boxes = np.array([[32, 32, 48, 48], ignored, [60, 60, 63, 63], [32, 32, 48, 48]], np.float32)
    labels = np.zeros(4, np.int64)
    statuses = [o.status for o in md.explain(strict, image, boxes=boxes, labels=labels).objects]
    assert statuses == ["positive", "ignored", "none", "taken"]
    lost = md.explain(strict, image, boxes=boxes, labels=labels).objects[2]
    assert lost.anchors == 0 and lost.loss == lost.share == 0
    statuses = [o.status for o in md.explain(model, image, boxes=boxes, labels=labels).objects]
    assert statuses[:3] == ["positive", "low-quality", "low-quality"]


def test_a_picture_without_objects(model, explained):
    _, _, path = explained
    explanation = md.explain(model, path)
    assert explanation.objects == () and explanation.loss == explanation.background > 0
    assert "0 objects" in explanation.table()


def test_the_command(run, explained, tmp_path, capsys):
    explanation, sample, path = explained
    annotations = path.parents[1] / "annotations" / "instances_train.json"
    flags = ["--annotations", str(annotations), "--out", str(tmp_path), "--threshold", "0.02"]
    assert cli.main(["explain", str(run), str(path), *flags]) == 0
    printed = capsys.readouterr().out
    assert explanation.table(0.02) in printed and "background" in printed
    name = f"{path.stem}_explained"
    assert f"{name}.png, {name}.json" in printed
    drawn = open_image(tmp_path / f"{name}.png")
    assert drawn.shape[1] > 3 * 640 and drawn.shape[0] > 640
    saved = json.loads((tmp_path / f"{name}.json").read_text())
    assert len(saved["objects"]) == len(sample.boxes) and saved["detections"][0]["suppressed"][0].keys() == {
        "score", "iou", "box"
    }  # fmt: skip
    assert saved == json.loads(json.dumps(explanation.to_json()))


def test_what_cannot_be_explained(model, folder, tmp_path, explained):
    _, _, path = explained
    annotations = folder / "annotations" / "instances_train.json"
    with pytest.raises(ImageError, match=r"nowhere.png: no such file"):
        md.explain(model, tmp_path / "nowhere.png")
    copy = tmp_path / "other.png"
    copy.write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"0 images are called other.png; needs one"):
        md.explain(model, copy, annotations=annotations)
    for content in (b"{", b"[]", b"\x89PNG"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.json: no json of annotations in COCO's layout: "):
            md.explain(model, path, annotations=tmp_path / "bad.json")
    data = tiny.coco_folder(tmp_path / "data", train=1)
    with edited(data) as changed:
        changed.classes[:] = [entry | {"name": f"{entry['name']} 2"} for entry in changed.classes]
        changed.boxes[:] = changed.boxes or [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}]
        picture = changed.picture(0)
    with pytest.raises(ValueError, match=r"the model does not know \w+ 2"):
        md.explain(model, picture, annotations=changed.file)
    with edited(data) as changed:
        changed.boxes.clear()
        changed.images[0]["width"] = 63
    with pytest.raises(ImageError, match=r"is 64 x 64, but .* says 63 x 64"):
        md.explain(model, picture, annotations=changed.file)
