"""One picture explained: what training asks of the network about every object, and where every detection is from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from minidet import backend
from minidet.autograd import Tensor, no_grad
from minidet.detection import BACKGROUND, Detections, assign, build_targets, image_weights, loss
from minidet.detection.mining import hard_labels
from minidet.detection.postprocess import candidates, clip
from minidet.images import ImageError, open_image, pad_batch
from minidet.inspection.explanation import Box, ExplainedDetection, ExplainedObject, Explanation, Suppressed
from minidet.inspection.layers import evaluating
from minidet.inspection.raw import read_raw
from minidet.kernels import batched_nms
from minidet.kernels.boxes import pairwise_iou
from minidet.models import RetinaNet
from minidet.training import load_model


def explain(
    model: RetinaNet | str | Path,
    picture: str | Path | np.ndarray,
    *,
    annotations: str | Path | None = None,
    boxes: np.ndarray | None = None,
    labels: np.ndarray | None = None,
) -> Explanation:
    """Explain what a model makes of one picture, alone in its batch and not augmented.

    The model may be a run's folder.  Objects are those of the picture in a COCO json, or `boxes` with `labels`.

    Shapes:
        boxes: (G, 4)
        labels: (G,)
    Units: boxes x1, y1, x2, y2 in pixels of the picture; labels number the model's classes.
    Raises:
        ValueError: if the json does not have the picture, or a class that the model lacks.
        ImageError: if the picture cannot be opened, or has another size than the json says.
    """
    model = model if isinstance(model, RetinaNet) else load_model(model)
    name = "" if isinstance(picture, np.ndarray) else str(picture)
    image = picture if isinstance(picture, np.ndarray) else open_image(picture)
    if annotations is not None:
        size, boxes, labels = _annotated(Path(annotations), Path(picture), model.config.classes)
        if image.shape[:2] != size:  # annotated as it is stored, without its EXIF orientation
            image = open_image(picture, upright=False)
        if image.shape[:2] != size:
            told = f"{annotations} says {size[1]} x {size[0]}"
            raise ImageError(f"{picture} is {image.shape[1]} x {image.shape[0]}, but {told}")
    if boxes is None:
        boxes, labels = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    config, original = model.config, image.shape[:2]
    prepared = config.preprocess.prepare(image)
    batch, _ = pad_batch([prepared], config.preprocess.pad_multiple)
    size, (H, W) = prepared.shape[:2], batch.shape[1:3]
    anchors, counts = model.anchors(H, W), model.level_counts(H, W)
    levels = np.repeat(np.arange(len(counts)), counts)
    with evaluating(model), no_grad():
        logits, deltas = (backend.to_numpy(x.data)[0] for x in model(Tensor(model.xp.asarray(batch))))
    inside = config.preprocess.boxes(np.asarray(boxes, np.float32), original, size)
    objects, total, background = _objects(model, anchors, levels, inside, np.asarray(labels), logits, deltas)
    found = _detections(model, anchors, levels, size, logits, deltas, inside)

    def back(box: Box) -> Box:
        return tuple(config.preprocess.boxes_back(np.array([box]), size, original)[0].tolist())

    return Explanation(
        name, image, (size[1] / original[1], size[0] / original[0]), config.classes,
        tuple(replace(o, box=back(o.box), anchor=back(o.anchor)) for o in objects),
        tuple(
            replace(d, box=back(d.box), suppressed=tuple(replace(s, box=back(s.box)) for s in d.suppressed))
            for d in found
        ),
        total, background,
    )  # fmt: skip


def _annotated(file: Path, picture: Path, classes: Sequence[str]) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
    """Height and width of the picture, boxes and labels of its objects, as a COCO json has them."""
    try:
        raw = read_raw(file, str(file))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: no json of annotations in COCO's layout: {error}") from None
    same = [n for n, name in enumerate(raw.names) if Path(name).name == picture.name]
    if len(same) > 1:  # in several folders: the longest common end decides
        same = [n for n in same if str(picture).endswith(raw.names[n])]
    if len(same) != 1:
        raise ValueError(f"{file}: {len(same)} images are called {picture.name}; needs one, with this file_name")
    rows = np.flatnonzero((raw.image_row == same[0]) & raw.usable & ~raw.crowd)
    names = [raw.categories[n][1] for n in raw.category_row[rows]]
    if unknown := sorted(set(names) - set(classes)):
        raise ValueError(f"{file}: the model does not know {', '.join(unknown)}; it knows {', '.join(classes)}")
    limits = raw.sizes[same[0]]
    corners = np.concatenate([raw.bbox[rows, :2], raw.bbox[rows, :2] + raw.bbox[rows, 2:]], axis=1)
    boxes = np.clip(corners, 0, [*limits, *limits]).astype(np.float32)
    return (int(limits[1]), int(limits[0])), boxes, np.array([classes.index(name) for name in names], np.int64)


def _objects(model, anchors, levels, boxes, labels, logits, deltas) -> tuple[list[ExplainedObject], float, float]:
    """What training would make of every object, the whole loss, and the background's part of it."""
    config = model.config
    targets = build_targets(anchors, [boxes], [labels], config.matcher)
    weights, _ = image_weights(config.loss, targets.positives)
    answers_for, learned = assign(anchors, boxes, config.matcher), targets.labels
    if config.loss.mining is not None:
        how = {"alpha": config.loss.alpha, "gamma": config.loss.gamma}
        learned = hard_labels(logits[None], learned, anchors, config.loss.mining, **how)

    def part(rows: np.ndarray, box: np.ndarray | None) -> float:
        """The loss of some anchors alone: the criterion, shown nothing else."""
        M = 0 if box is None else len(rows)
        alone = replace(
            targets, labels=learned[:, rows], rows=np.arange(M), boxes=np.broadcast_to(box, (M, 4)) if M else boxes[:0],
            anchors=anchors[rows[:M]], positives=np.array([M]), all_anchors=anchors[rows],
        )  # fmt: skip
        outputs = Tensor(logits[None, rows]), Tensor(deltas[None, rows])
        settings = replace(config.loss, mining=None)  # it has been done
        return float(loss(*outputs, alone, weights, settings, config.coder).total.data)

    background = part(np.flatnonzero(answers_for == BACKGROUND), None)
    objects = []
    for n, box in enumerate(boxes):
        iou = pairwise_iou(anchors, box[None])[:, 0]
        rows, best = np.flatnonzero(answers_for == n), int(iou.argmax())
        if len(rows):
            status = "positive" if iou[rows].max() >= config.matcher.high else "low-quality"
        else:
            reached = iou[best] >= config.matcher.low
            status = "none" if not reached else "ignored" if iou[best] < config.matcher.high else "taken"
        objects.append(ExplainedObject(
            config.classes[labels[n]], tuple(box.tolist()), status, 3 + int(levels[best]),
            tuple(anchors[best].tolist()), float(iou[best]), len(rows), part(rows, box) if len(rows) else 0.0, 0.0,
        ))  # fmt: skip
    total = background + sum(one.loss for one in objects)
    return [replace(one, share=one.loss / max(total, 1e-12)) for one in objects], total, background


def _detections(model, anchors, levels, size, logits, deltas, boxes) -> list[ExplainedDetection]:
    """What `detect` finds, with the way it came about."""
    config = model.config.postprocess
    counts, unclipped = np.bincount(levels), replace(config, clip="never")
    ((rows, whole),) = candidates(
        logits[None], deltas[None], anchors, counts.tolist(), [size], unclipped, model.config.coder
    )
    found = clip(whole, size) if config.clip == "before_nms" else whole
    keep = batched_nms(found.boxes, found.scores, found.labels, config.nms_threshold)[: config.max_detections]
    gave_way = _gave_way(found, keep, config.nms_threshold)
    shown = clip(found, size).boxes if config.clip == "after_nms" else found.boxes
    result = []
    for n in keep:
        if config.drop_empty and not np.all(shown[n, 2:] > shown[n, :2]):
            continue
        overlaps = pairwise_iou(boxes, shown[n : n + 1])[:, 0] if len(boxes) else np.zeros(1)
        best = int(overlaps.argmax())
        suppressed = tuple(
            Suppressed(float(found.scores[m]), iou, tuple(found.boxes[m].tolist())) for m, iou in gave_way[int(n)]
        )
        row, label = rows[n], found.labels[n]
        steps = (tuple(x.tolist()) for x in (anchors[row], deltas[row], whole.boxes[n], shown[n]))
        result.append(ExplainedDetection(
            model.config.classes[label], float(found.scores[n]), float(logits[row, label]), 3 + int(levels[row]),
            *steps, best if overlaps[best] > 0 else None, float(overlaps[best]), suppressed,
        ))  # fmt: skip
    return result


def _gave_way(found: Detections, keep: np.ndarray, threshold: float) -> dict[int, list[tuple[int, float]]]:
    """For each box that is kept those it suppressed, with their IoU; each gives way to the best box that can."""
    left = np.ones(len(found), bool)
    left[keep] = False
    result = {}
    for n in map(int, keep):
        others = np.flatnonzero(left & (found.labels == found.labels[n]) & (found.scores <= found.scores[n]))
        iou = pairwise_iou(found.boxes[n : n + 1], found.boxes[others])[0].astype(np.float64)
        gone = iou > threshold
        left[others[gone]] = False
        result[n] = list(zip(others[gone].tolist(), iou[gone].tolist(), strict=True))
    return result
