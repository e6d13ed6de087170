"""Complete small RetinaNets of torchvision's: every map, loss and gradient, steps of SGD, and the detections."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from compare import close, equal, here, load, same_matches, there, unmatched
from networks import build, detect_in_originals, forward, losses_of, prepare, targets_of, tiny_config

from minidet.autograd import Tensor
from minidet.models import RetinaNet
from minidet.optim import SGD, Optimizer, ParameterGroup
from minidet.weights import from_torchvision, to_torchvision

PREFIX = ("tiny_",)

TOLERANCE = 1e-6  # the arrays are stored in float32
FLOAT32 = 1e-5  # of a float32 run


def network(path: Path, dtype) -> tuple[RetinaNet, dict, dict[str, np.ndarray]]:
    meta, a = load(path)
    state = {name.removeprefix("param:"): array for name, array in a.items() if name.startswith("param:")}
    config = tiny_config(meta, {name: array.shape for name, array in state.items()})
    return build(config, from_torchvision(state), dtype), meta, a


def same(got: np.ndarray, a: dict[str, np.ndarray], name: str) -> None:
    close(got, a[name], name, tolerance=TOLERANCE)


def test_maps(vectors: Path):
    model, _, a = network(vectors, np.float64)
    inputs = prepare(model, a, np.float64)
    equal(inputs.sizes, a["image_sizes"], "sizes")
    maps = forward(model.eval(), inputs.images)
    same(maps.pop("anchors"), a, "anchors")
    for name, array in maps.items():
        same(array, a, f"eval.{name}")


def test_detections(vectors: Path):
    for dtype, prefix, tolerance in ((np.float32, "det_", FLOAT32), (np.float64, "det64_", TOLERANCE)):
        model, _, a = network(vectors, dtype)
        inputs = prepare(model, a, dtype)
        for n, got in enumerate(detect_in_originals(model, inputs, forward(model.eval(), inputs.images))):
            want = [a[f"{prefix}{n}.{part}"] for part in ("boxes", "scores", "labels")]
            assert len(got[1]) == len(want[1]), f"{prefix}{n}"
            alone = unmatched(got, want, boxes=100 * tolerance, scores=tolerance)
            assert not alone, f"{prefix}{n}: no partner for detections {alone}"


def test_training(vectors: Path):
    """Matching, losses, the gradient of everything, and where some steps of SGD lead."""
    model, meta, a = network(vectors, np.float64)
    inputs = prepare(model, a, np.float64)
    targets = targets_of(model, inputs)
    for n, boxes in enumerate(inputs.boxes):
        close(boxes, a[f"gt_resized{n}"], "resized boxes", tolerance=1e-10)
    same_matches(targets, inputs.boxes, inputs.labels, [a[f"matched{n}"] for n in range(len(inputs.boxes))])

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    equal(sorted(to_torchvision({n: here(p.data) for n, p in trained.items()})), sorted(meta["parameters"]), "trained")
    sgd = dict(meta["sgd"])
    lr, decay = sgd.pop("lr"), sgd.pop("weight_decay")
    optimizer = Optimizer(SGD(**sgd), [ParameterGroup(trained, weight_decay=decay)])
    for step in range(meta["steps"]):
        logits, deltas = model.train()(Tensor(there(inputs.images)))
        losses, _ = losses_of(model, logits, deltas, targets)
        close([losses.classification, losses.box], a["sgd_losses"][step], f"losses, step {step}", tolerance=TOLERANCE)
        if step == 0:
            close([losses.classification, losses.box], a["losses"], "losses", tolerance=TOLERANCE)
            check_outputs(model, logits.data, deltas.data, targets, a)
        losses.total.backward()
        if step == 0:
            gradients = to_torchvision({name: here(p.grad) for name, p in trained.items()})
            for name in meta["parameters"]:
                same(gradients[name], a, f"grad:{name}")
        optimizer.step(lr)
        optimizer.clear_gradients()
    for name, array in to_torchvision(model.state_dict()).items():
        same(array, a, f"final:{name}")


def check_outputs(model: RetinaNet, logits, deltas, targets, a: dict[str, np.ndarray]) -> None:
    """The outputs in training, and the gradient of the loss by them."""
    outputs = {"cls_logits": logits, "bbox_regression": deltas}
    leaves = {name: Tensor(array, requires_grad=True) for name, array in outputs.items()}
    losses_of(model, *leaves.values(), targets)[0].total.backward()
    for name, leaf in leaves.items():
        if f"train.{name}" in a:  # only where training differs from evaluation
            same(leaf.data, a, f"train.{name}")
        same(leaf.grad, a, f"train.grad_{name}")
