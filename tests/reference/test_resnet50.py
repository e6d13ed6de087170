"""Whole ResNet-50 RetinaNets of torchvision's and detectron2's, in double and in single precision.

The big arrays are digested: some of their values, and three sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from compare import close, equal, here, load, same_matches, there, unmatched
from layers import nchw
from networks import (
    Inputs,
    build,
    detect,
    detect_in_originals,
    forward,
    losses_of,
    prepare,
    targets_of,
    whole_model,
)

from minidet.autograd import Tensor, no_grad
from minidet.detection import Detections
from minidet.detection.postprocess import clip, drop_empty
from minidet.models import RetinaNet
from minidet.weights import to_torchvision
from minidet.weights.detectron2 import OURS

PREFIX = ("v1_", "v2_", "d2_")

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Tolerance:
    """How far a run may be from the reference, which is a float64 run of torch's unless said otherwise."""

    maps: float
    """Of a value, relative to the largest of its map."""
    losses: float
    """Relative."""
    gradients: float
    """Of a gradient's length, relative, in the median of all parameters; ten times that for any one."""
    scores: float
    boxes: float
    """Of a detection; absolute, in pixels for boxes."""


# torch's float32 and float64 differ by 2e-5 in maps of values to 18, 6e-6 in logits to 11, 4e-6 in losses, and
# 5e-4 in gradients.  Ten times that: our convolutions add up in another order, and where a ReLU decides otherwise
# on a rounding, a gradient moves by up to a hundredth.
TOLERANCES = {
    np.float64: Tolerance(maps=1e-10, losses=1e-10, gradients=1e-9, scores=1e-9, boxes=1e-6),
    np.float32: Tolerance(maps=1e-5, losses=4e-5, gradients=5e-3, scores=3e-5, boxes=1e-2),
}

DETECTRON2 = {"c3": "res3", "c4": "res4", "c5": "res5", "cls_logits": "logits", "bbox_regression": "deltas"}
"""What files of detectron2 call the maps."""
MISSED = 0.01  # of a float32 run's detections: those at the edge of suppression, or the last


@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
def test_model(vectors: Path, dtype):
    meta, a = load(vectors)
    detectron2 = meta["kind"].startswith("detectron2")
    if dtype == np.float64 and (detectron2 or meta.get("float32_only")):
        pytest.skip("the reference is a float32 run")
    config, state = whole_model(meta)
    model = build(config, state, dtype)
    inputs = prepare(model, a, dtype)
    tolerance = TOLERANCES[dtype]
    if meta["mode"] == "infer":
        inference(model.eval(), inputs, meta, a, tolerance)
    elif detectron2:
        detectron2_training(model.train(), inputs, meta, a, tolerance)
    else:
        training(model.train(), inputs, meta, a, tolerance)


def inference(model: RetinaNet, inputs: Inputs, meta: dict, a, tolerance: Tolerance) -> None:
    detectron2 = meta["kind"].startswith("detectron2")
    equal(inputs.sizes, a["image_sizes"], "sizes")
    with no_grad():
        maps = forward(model, inputs.images)
    for name, array in maps.items():
        digest(array, a, DETECTRON2.get(name, name) if detectron2 else name, tolerance.maps)
    if detectron2:
        for n, found in enumerate(detect(model, inputs, maps)):
            matching((found.boxes, found.scores, found.labels), a, f"rawdet{n}", tolerance, MISSED)
            scaled = in_asked_size(found, inputs.originals[n], meta["out_scale"])
            matching((scaled.boxes, scaled.scores, scaled.labels), a, f"det{n}", tolerance, MISSED)
        return
    for n, found in enumerate(detect_in_originals(model, inputs, maps)):
        double = inputs.images.dtype == np.float64
        matching(found, a, f"det64_{n}" if double else f"det_{n}", tolerance, 0 if double else MISSED)


def in_asked_size(found: Detections, image: tuple[int, int], scale: float) -> Detections:
    """detectron2's last steps: to the size the caller asks for, clipped there, without what became empty."""
    scaled = Detections(found.boxes * np.float32(scale), found.scores, found.labels)
    return drop_empty(clip(scaled, (image[0] * scale, image[1] * scale)))


def matching(found: tuple, a, name: str, tolerance: Tolerance, missed: float) -> None:
    want = [a[f"{name}.{part}"] for part in ("boxes", "scores", "labels")]
    allowed = int(np.ceil(missed * len(want[1])))
    assert abs(len(found[1]) - len(want[1])) <= allowed, f"{name}: {len(found[1])} of {len(want[1])} detections"
    alone = unmatched(found, want, boxes=tolerance.boxes, scores=tolerance.scores)
    assert len(alone) <= allowed, f"{name}: no partner for detections {alone}"


def training(model: RetinaNet, inputs: Inputs, meta: dict, a, tolerance: Tolerance) -> None:
    digest(nchw(inputs.images), a, "batch", tolerance.maps)
    targets = targets_of(model, inputs)
    for n, boxes in enumerate(inputs.boxes):
        close(boxes, a[f"gt_resized{n}"], f"objects of image {n}", tolerance=1e-6)
    same_matches(targets, inputs.boxes, inputs.labels, [a[f"matched{n}"] for n in range(len(inputs.boxes))])
    logits, deltas = model(Tensor(there(inputs.images)))
    digest(logits.data, a, "cls_logits", tolerance.maps)
    digest(deltas.data, a, "bbox_regression", tolerance.maps)
    digest(model.anchors(*inputs.images.shape[1:3]), a, "anchors", 1e-7)
    losses, _ = losses_of(model, logits, deltas, targets)
    want = meta["losses"]["float64"]
    close(losses.classification, want["classification"], "classification", tolerance=tolerance.losses)
    close(losses.box, want["bbox_regression"], "box", tolerance=tolerance.losses)
    losses.total.backward()
    found = to_torchvision({name: here(p.grad) for name, p in model.named_parameters() if p.grad is not None})
    gradients(found, meta, a, tolerance)
    state = to_torchvision(model.state_dict())
    for name in (name.removeprefix("after:") for name in a if name.startswith("after:")):
        close(state[name], a[f"after:{name}"], name, tolerance=10 * tolerance.maps)


def detectron2_training(model: RetinaNet, inputs: Inputs, meta: dict, a, tolerance: Tolerance) -> None:
    """Three passes, between which only the normaliser moves; the gradients are the first one's."""
    targets = targets_of(model, inputs)
    close(here(targets.positives).mean(), meta["num_pos_per_image_mean"], "positives of an image")
    moving = None
    for step, want in enumerate(a["losses"]):
        losses, moving = losses_of(model, *model(Tensor(there(inputs.images))), targets, moving)
        close([losses.classification, losses.box], want[:2], f"losses, pass {step}", tolerance=tolerance.losses)
        close(moving, want[2], f"normaliser, pass {step}")
        if step == 0:
            losses.total.backward()
            theirs = {ours: name for name, ours in OURS.items()}
            found, frozen = {}, []
            for name, parameter in model.named_parameters():
                path, _, leaf = name.rpartition(".")
                if parameter.grad is None:
                    frozen.append(f"{theirs[path]}.{leaf}")
                else:
                    found[f"{theirs[path]}.{leaf}"] = nchw(parameter.grad)
            equal(sorted(frozen), sorted(meta["frozen"]), "frozen")
            gradients(found, meta, a, tolerance)


def gradients(found: dict[str, np.ndarray], meta: dict, a, tolerance: Tolerance) -> None:
    """Of every parameter the length, sum and largest value; of some parameters some values."""
    equal(sorted(found), sorted(meta["grad_names"]), "parameters with a gradient")
    errors = {}
    for name, (length, total, largest) in zip(meta["grad_names"], a["grad_stats"], strict=True):
        g = found[name].astype(np.float64)
        # A sum of n numbers of both signs is as uncertain as sqrt(n) times their error.
        errors[f"{name}: length"] = abs(np.linalg.norm(g) - length) / length
        errors[f"{name}: sum"] = abs(g.sum() - total) / (length * np.sqrt(g.size))
        errors[f"{name}: largest"] = abs(np.abs(g).max() - largest) / largest
    for name in (name.removesuffix(".idx") for name in a if name.startswith("grad:") and name.endswith(".idx")):
        values, want = flat(found[name.removeprefix("grad:")])[a[f"{name}.idx"]], a[f"{name}.val"]
        errors[f"{name}: values"] = np.linalg.norm(values - want) / np.linalg.norm(want)
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= 10 * tolerance.gradients, f"{worst} is off by {errors[worst]:.1e}"
    for what in ("length", "sum", "largest", "values"):
        middle = np.median([error for name, error in errors.items() if name.endswith(what)])
        assert middle <= tolerance.gradients, f"in the median of all gradients {what} is off by {middle:.1e}"


def digest(array: np.ndarray, a, name: str, tolerance: float) -> None:
    """Equal to an array, or to what was kept of one: its shape, some values, and sum x, |x| and x^2."""
    if name in a:
        close(array, a[name], name, tolerance=10 * tolerance)  # `close` takes a tenth at the largest value
        return
    equal(array.shape, a[f"{name}.shape"], f"{name}: shape")
    want, values = a[f"{name}.val"], flat(array)
    largest = float(np.max(np.abs(want)))
    np.testing.assert_allclose(values[a[f"{name}.idx"]], want, rtol=0, atol=tolerance * largest, err_msg=name)
    values, (_, absolute, squares) = values.astype(np.float64), a[f"{name}.sums"]
    sums = [values.sum(), np.abs(values).sum(), (values * values).sum()]
    error = np.abs(np.subtract(sums, a[f"{name}.sums"])) / [absolute, absolute, squares]
    assert error.max() <= tolerance, f"{name}: sums are off by {error}"


def flat(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(here(array)).reshape(-1)
