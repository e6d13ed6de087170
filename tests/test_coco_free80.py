"""Photos of COCO: classes, crowds and empty images are read, eight photos are learned by heart, all are judged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from minidet.data import CocoDataset, Sample, coco
from minidet.data.augment import NONE
from minidet.evaluation.average_precision import accumulate
from minidet.evaluation.coco import with_pycocotools
from minidet.evaluation.evaluate import detections_of
from minidet.evaluation.report import NUMBERS
from minidet.images import pad_batch
from minidet.kernels import best_matches
from minidet.models import RetinaNet, presets
from minidet.training import TrainConfig, train

SIDE = 256
"""Pixels of the shorter side; the longer one at most half as much again."""
STEPS = 100


class Some:
    """A few rows of another data set, which is all that a data set of one's own has to be."""

    def __init__(self, dataset: CocoDataset, rows: list[int]):
        self.dataset, self.rows = dataset, rows
        self.classes, self.category_ids = dataset.classes, dataset.category_ids

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[self.rows[index]]

    def size(self, index: int) -> tuple[int, int]:
        return self.dataset.size(self.rows[index])

    def ground_truth(self) -> dict:
        truth = self.dataset.ground_truth()
        images = [truth["images"][row] for row in self.rows]
        ids = {image["id"] for image in images}
        return {**truth, "images": images, "annotations": [a for a in truth["annotations"] if a["image_id"] in ids]}


def within_reach(model: RetinaNet, sample: Sample) -> bool:
    """Whether every object has an anchor of IoU 0.5: the network then has a place from which to answer for it."""
    preprocess = model.config.preprocess
    image = preprocess.prepare(sample.image)
    boxes = preprocess.boxes(sample.boxes, sample.image.shape[:2], image.shape[:2])
    batch, _ = pad_batch([image], preprocess.pad_multiple)
    best = best_matches(model.anchors(*batch.shape[1:3]), boxes)[2]
    return len(boxes) > 0 and bool(best.min() >= 0.5)


@pytest.mark.slow
def test_coco_free80(data_folder, tmp_path):
    """The eight photos: of those whose objects are all within reach at this size, the ones with most objects."""
    training, validation = (coco(data_folder("coco_free80"), split) for split in ("train", "val"))
    assert training.category_ids == validation.category_ids and len(training.classes) == 80
    config = presets.small(training.classes)
    config = replace(config, preprocess=replace(config.preprocess, min_size=SIDE, max_size=SIDE * 3 // 2))
    model = RetinaNet(config, seed=0)

    samples = list(training)
    reached = [row for row, sample in enumerate(samples) if within_reach(model, sample)]
    rows = sorted(reached, key=lambda row: -len(samples[row].boxes))[:8]
    eight = Some(training, rows)
    truth = eight.ground_truth()["annotations"]
    objects = sum(not entry["iscrowd"] for entry in truth)
    print(f"\nimages {[samples[row].image_id for row in rows]}: {objects} objects, {len(truth) - objects} crowds")
    assert len(reached) > 40 and objects >= 70 and any(entry["iscrowd"] for entry in truth)

    recipe = TrainConfig(images=8 * STEPS, batch_size=8, augment=NONE, validations=1, samples=8)
    done = train(model, eight, validate=eight, out=tmp_path, config=recipe, quiet=True)
    numbers = done.evaluation.numbers
    print(f"after {STEPS} steps of these 8: AP {numbers['AP']:.3f}, AP50 {numbers['AP50']:.3f}")
    assert numbers["AP50"] >= 0.95

    # Photos it never saw: eight examples teach next to nothing about them, but all of them are judged.
    results = detections_of(model, validation)
    unseen, again = (judge(validation.ground_truth(), results) for judge in (accumulate, with_pycocotools))
    print(f"on val: AP {unseen['AP']:.3f}, AP50 {unseen['AP50']:.3f}, {unseen.detections:,} detections")
    assert (unseen.images, unseen.objects) == (66, 552) and unseen.detections > 1000
    np.testing.assert_allclose([unseen[name] for name in NUMBERS], [again[name] for name in NUMBERS], atol=1e-9)
