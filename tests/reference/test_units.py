"""Ops, losses, matching, detections and optimizers, case by case, beside torch, torchvision and detectron2."""

from __future__ import annotations

from pathlib import Path

import boxes
import layers
import pytest
import steps
import test_resnet50
import test_tiny
from compare import load

PREFIX = ("unit_",)
"""What the files of this module's tests begin with."""

LEFT_OUT = {
    "iou: diou": "a loss that RetinaNet does not use",
    "iou: ciou": "a loss that RetinaNet does not use",
    "nnops: conv_transpose2d": "a layer that RetinaNet does not have",
    "nnops: max_pool2d, ceil_mode": "our pooling rounds down, as every ResNet's does",
    "nnops: max_pool2d, dilation": "no network dilates its pooling",
    "nnops: interpolate_bilinear": "images are resized as bytes and normalised in one: `transform` has that",
    "nnops: interpolate_bilinear_scale": "as above",
    "nnops: interpolate_nearest_scale": "maps are stretched to a size; `interpolate_nearest` has that",
    "optim: SGD, dampening": "an option that RetinaNet's trainings do not use",
    "optim: SGD, maximize": "an option that RetinaNet's trainings do not use",
    "optim: AdamW, amsgrad": "an option that RetinaNet's trainings do not use",
    "optim: AdamW, maximize": "an option that RetinaNet's trainings do not use",
    "optim: Adam": "AdamW decays weights apart from the gradient; Adam does not",
    "schedule: torch CosineAnnealingLR, eta_min": "our cosine falls to 0",
}
"""Kinds of cases without a check, and why.  Parts of other kinds, said where they are checked: the gradient of
`encode` by the boxes (targets are constants), torchvision's remove_small_boxes (we drop only empty ones)
and the positions of max pooling (its gradient shows them)."""

CHECKS = {
    "anchors": boxes.anchors,
    "boxcoder": boxes.boxcoder,
    "clip": boxes.clip_boxes,
    "focal": layers.focal,
    "iou": boxes.iou,
    "l1": layers.l1_losses,
    "matcher": boxes.matcher,
    "nms": boxes.suppression,
    "nnops": layers.layer,
    "optim": steps.optimizer,
    "postprocess": boxes.outputs,
    "schedule": steps.schedule,
    "transform": boxes.transform,
}
"""By what follows "unit_" in the file's name: a function of a case and its arrays."""

OPTIONS = {
    "max_pool2d": {"ceil_mode": False, "dilation": 1},
    "SGD": {"dampening": 0, "maximize": False},
    "AdamW": {"amsgrad": False, "maximize": False},
    "torch CosineAnnealingLR": {"eta_min": 0},
}
"""Options that make another kind of a case where they differ from this."""


def test_cases(vectors: Path):
    topic = next((topic for topic in CHECKS if vectors.stem.startswith(f"unit_{topic}")), None)
    assert topic, f"{vectors.name}: no check is called so; there are {', '.join(CHECKS)}"
    meta, arrays = load(vectors)
    failures, checked = [], 0
    for i, case in enumerate(meta["cases"]):
        if kind(topic, case) in LEFT_OUT:
            continue
        try:
            CHECKS[topic](case, {name: arrays[f"{i}.{name}"] for name in case["arrays"]})
        except Exception as error:  # every case has its turn, and its line in the report
            told = {key: value for key, value in case.items() if key != "arrays"}
            failures.append(f"case {i} {told}:\n{type(error).__name__}: {error}")
        checked += 1
    assert not failures, f"{len(failures)} of {checked} cases differ\n\n" + "\n\n".join(failures)
    assert checked, f"{vectors.name}: every case is left out"


def kind(topic: str, case: dict) -> str:
    """What LEFT_OUT calls a case: its op, and whichever option is unusual."""
    name = next((case[key] for key in ("op", "optimizer", "kind", "what") if key in case), "")
    settings = case | case.get("args", {})
    unusual = [o for o, usual in OPTIONS.get(name, {}).items() if settings.get(o, usual) != usual]
    return ", ".join([f"{topic}: {name}", *unusual[:1]])


def test_every_file_has_a_test(oracle_files: list[Path]):
    known = (*PREFIX, *test_tiny.PREFIX, *test_resnet50.PREFIX)
    unknown = [path.name for path in oracle_files if not path.name.startswith(known)]
    assert not unknown, f"no test reads {', '.join(unknown)}"


def test_a_kind_nobody_knows_fails():
    with pytest.raises(NotImplementedError, match="no check for the op 'fft'"):
        layers.layer({"op": "fft"}, {})
