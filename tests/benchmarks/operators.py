"""Focal loss, suppression and matching, each written for every library that has a say: the workers of detection.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.benchmarks.worker import serve

ANCHORS, CLASSES, BOXES, OBJECTS = 49_000, 80, 5_000, 50
MATCHED = 100_000


@dataclass
class Job:
    """`function(*arguments)`, and its results as arrays."""

    function: object
    arguments: tuple
    names: tuple[str, ...]

    def run(self) -> None:
        """Once."""
        found = self.function(*self.arguments)
        self.found = found if isinstance(found, tuple) else (found,)

    def results(self) -> dict[str, np.ndarray]:
        """What came out, by name."""
        self.run()
        return {name: np.asarray(a) for name, a in zip(self.names, self.found, strict=True)}


def focal_inputs():
    """Logits and labels; a hundred anchors are positive."""
    rng = np.random.default_rng(0)
    logits = rng.normal(-4, 1, (1, ANCHORS, CLASSES)).astype(np.float32)
    labels = np.full((1, ANCHORS), -1)
    labels[0, rng.choice(ANCHORS, 100, replace=False)] = rng.integers(0, CLASSES, 100)
    return logits, labels


def scored_boxes(clustered: bool):
    """Boxes all over the image, or around fifty places."""
    rng = np.random.default_rng(0)
    centre = rng.uniform(0, 1000, (BOXES, 2))
    if clustered:
        centre = rng.uniform(0, 1000, (50, 2))[rng.integers(0, 50, BOXES)] + rng.normal(0, 5, (BOXES, 2))
    half = rng.uniform(10, 40, (BOXES, 2))
    boxes = np.concatenate([centre - half, centre + half], axis=1).astype(np.float32)
    labels = rng.integers(0, CLASSES, BOXES)
    if clustered:
        labels %= 5
    return boxes, rng.permutation(BOXES).astype(np.float32) / BOXES, labels


def matching_inputs():
    """Anchors and objects, all over the image."""
    rng = np.random.default_rng(0)
    corners = [rng.uniform(0, 900, (count, 2)) for count in (MATCHED, OBJECTS)]
    sides = [rng.uniform(20, 200, (count, 2)) for count in (MATCHED, OBJECTS)]
    return tuple(
        np.concatenate([c, c + s], axis=1).astype(np.float32) for c, s in zip(corners, sides, strict=True)
    )


# NumPy, vectorised.


def focal_numpy(x, targets):
    """Loss and gradient in the closed form."""
    sign = 2 * targets - 1
    z = sign * x
    tail = np.exp(-np.abs(z))
    p = np.where(z >= 0, 1, tail) / (1 + tail)
    log_p = np.minimum(z, 0) - np.log1p(tail)
    weight = np.where(targets > 0, np.float32(0.25), np.float32(0.75))
    q = 1 - p
    return -(weight * q * q * log_p).sum(), weight * sign * q * q * (2 * p * log_p + p - 1)


def iou_numpy(a, b):
    """(A, 4), (B, 4) -> (A, B)."""
    sides = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    inside = np.maximum(sides, 0).prod(axis=2)
    areas = [(c[:, 2:] - c[:, :2]).prod(axis=1) for c in (a, b)]
    return inside / (areas[0][:, None] + areas[1] - inside)


def nms_loop(boxes, scores, labels):
    """Class by class; the best box against all that are left, again and again."""
    keep = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        rows = rows[np.argsort(-scores[rows], kind="stable")]
        while len(rows):
            keep.append(rows[0])
            rows = rows[1:][iou_numpy(boxes[rows[:1]], boxes[rows[1:]])[0] <= 0.5]
    keep = np.asarray(keep)
    return keep[np.argsort(-scores[keep], kind="stable")]


def nms_matrix(boxes, scores, labels):
    """All overlaps of the boxes of a class first, then a row of the matrix per box that is kept."""
    keep = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        rows = rows[np.argsort(-scores[rows], kind="stable")]
        over = iou_numpy(boxes[rows], boxes[rows]) > 0.5
        alive = np.ones(len(rows), bool)
        for i in range(len(rows)):
            if alive[i]:
                keep.append(rows[i])
                alive &= ~over[i]
    keep = np.asarray(keep)
    return keep[np.argsort(-scores[keep], kind="stable")]


def best_numpy(iou):
    """Of (G, R): each anchor's best overlap and object, each object's best overlap."""
    best = iou.argmax(axis=0)
    return iou.max(axis=0), np.where(iou.max(axis=0) > 0, best, 0), iou.max(axis=1)


def numpy_job(task: str) -> Job:
    """NumPy."""
    if task == "focal":
        logits, labels = focal_inputs()
        return Job(focal_numpy, (logits[0], one_hot(labels)), ("loss", "gradient"))
    if task == "match":
        anchors, boxes = matching_inputs()
        return Job(lambda: best_numpy(iou_numpy(boxes, anchors)), (), ("iou", "object", "claim"))
    way, _, where = task.partition(" ")
    return Job({"nms": nms_loop, "matrix": nms_matrix}[way], scored_boxes(where == "clustered"), ("keep",))


def one_hot(labels):
    """(1, R) -> (R, K) float32."""
    return (labels[0][:, None] == np.arange(CLASSES)).astype(np.float32)


# minidet.


def ours_job(task: str) -> Job:
    """minidet's kernels; the focal loss as the op that training uses, forward and backward."""
    from minidet import Tensor, kernels
    from minidet.ops import sigmoid_focal_loss_sum

    def focal(x, labels):
        loss = sigmoid_focal_loss_sum(x, labels)
        return loss.data[0], loss.node.backward(np.ones(1, np.float32))[0][0]

    if task == "focal":
        logits, labels = focal_inputs()
        return Job(focal, (Tensor(logits, requires_grad=True), labels), ("loss", "gradient"))
    if task == "match":
        return Job(kernels.best_matches, matching_inputs(), ("iou", "object", "claim"))
    return Job(kernels.batched_nms, (*scored_boxes("clustered" in task), 0.5), ("keep",))


# torch, eager: torchvision's formulas.


def torch_job(task: str) -> Job:
    """torch."""
    import torch

    from tests.benchmarks.torch_retinanet import focal_loss, pairwise_iou
    from tests.benchmarks.turns import THREADS

    torch.set_num_threads(THREADS)

    def focal(x, targets):
        x.grad = None
        loss = focal_loss(x, targets)
        loss.backward()
        return loss.detach(), x.grad

    def nms(boxes, scores, labels):
        # torchvision's "coordinate trick": classes are moved apart, then one matrix serves all.
        order = torch.argsort(scores, descending=True)
        shifted = (boxes + (labels * (boxes.max() + 1))[:, None].to(boxes))[order]
        over, alive, keep = pairwise_iou(shifted, shifted) > 0.5, torch.ones(len(boxes), dtype=torch.bool), []
        for i in range(len(boxes)):
            if alive[i]:
                keep.append(i)
                alive &= ~over[i]
        return order[keep]

    def match(anchors, boxes):
        iou = pairwise_iou(boxes, anchors)
        values, best = iou.max(dim=0)
        return values, torch.where(values > 0, best, 0), iou.max(dim=1).values

    if task == "focal":
        logits, labels = focal_inputs()
        arrays = torch.from_numpy(logits[0]).requires_grad_(), torch.from_numpy(one_hot(labels))
        return Job(focal, arrays, ("loss", "gradient"))
    if task == "match":
        return Job(match, tuple(map(torch.from_numpy, matching_inputs())), ("iou", "object", "claim"))
    return Job(nms, tuple(map(torch.from_numpy, scored_boxes("clustered" in task))), ("keep",))


def pycocotools_job(task: str) -> Job:
    """pycocotools, which has overlaps only: NumPy finds their maxima."""
    from pycocotools import mask

    assert task == "match"
    anchors, boxes = (
        np.concatenate([b[:, :2], b[:, 2:] - b[:, :2]], axis=1).astype(float) for b in matching_inputs()
    )
    crowd = [0] * len(boxes)
    return Job(lambda: best_numpy(mask.iou(anchors, boxes, crowd).T), (), ("iou", "object", "claim"))


if __name__ == "__main__":
    serve({"ours": ours_job, "numpy": numpy_job, "torch": torch_job, "pycocotools": pycocotools_job})
