"""COCO's average precision, step by step: match, pool, accumulate, interpolate.

One number for a detector must reward finding every object (recall) without inventing any (precision).
Sort all detections of a class by score and walk down the list: each step adds a true or a false
positive, and so a point (recall, precision).  Average precision is the area under that curve; COCO
averages it over classes and over ten degrees of how well a box must fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import numpy as np

from minidet.evaluation.inputs import Boxes, checked
from minidet.evaluation.report import (
    AREAS,
    IOU_THRESHOLDS,
    MAX_DETECTIONS,
    RECALLS,
    UNDEFINED,
    Evaluation,
    by_class,
    twelve_numbers,
)

MOST_PAIRS = 2**20
"""Pairs of a detection and an object that are looked at together."""
SMALLEST_AREA, LARGEST_AREA = np.array(list(AREAS.values())).T[:, :, None]  # (4, 1) each


def accumulate(ground_truth: dict, results: Sequence[dict]) -> Evaluation:
    """Judge detections by COCO's rules.

    `results` are COCO's: image_id, category_id, bbox as [x, y, width, height] in pixels of the original
    image, score.  Classes and areas without any object to find are left out of the means.

    Source: cocodataset.org, "Detection evaluation", and its pycocotools/cocoeval.py, to rounding.
    Differs: an annotation with id 0 is like any other; pycocotools takes a match with it for no match.
    Raises:
        ValueError: if an entry names an unknown image or category, or holds impossible numbers.
    """
    started = perf_counter()
    case = checked(ground_truth, results)
    K = len(case.names)
    precision = np.full((10, 101, K, 4, 3), UNDEFINED)
    recall = np.full((10, K, 4, 3), UNDEFINED)
    objects, detections = case.objects.by_class(K), case.detections.by_class(K)
    for k in range(K):
        if len(objects[k]) or len(detections[k]):
            judged = judge_class(case.objects, objects[k], case.detections, detections[k])
            precision[:, :, k], recall[:, k] = curves(*judged)
    return Evaluation(
        numbers=twelve_numbers(precision, recall),
        per_class=by_class(precision[:, :, :, 0, 2], case.names),
        precision=precision[:, :, :, 0, 2],
        images=len(case.image_ids),
        objects=int(np.sum(~case.objects.crowd)),
        detections=len(case.detections),
        seconds=perf_counter() - started,
    )


def judge_class(objects: Boxes, of_objects, detections: Boxes, of_detections) -> tuple:
    """What became of the detections of one class in all images, for every area range and threshold.

    `of_objects` and `of_detections` are the rows of this class.  Crowds are ignored, and whatever lies outside
    the area range: neither finding nor missing an ignored object counts.

    Shapes:
        returns: scores (D,) of at most 100 detections an image, image by image and best first; rank (D,) of each
            in its image; true (4, 10, D) and false (4, 10, D) positives, neither where a detection is ignored;
            wanted (4,), the number of objects to find
    """
    of_objects = of_objects[np.argsort(objects.images[of_objects], kind="stable")]
    of_detections = of_detections[np.lexsort((-detections.scores[of_detections], detections.images[of_detections]))]
    images = detections.images[of_detections]
    rank = np.arange(len(images)) - np.searchsorted(images, images)     # 0 is the best of its image
    kept = rank < MAX_DETECTIONS[-1]
    of_detections, images, rank = of_detections[kept], images[kept], rank[kept]
    crowd, areas = objects.crowd[of_objects], objects.areas[of_objects]
    ignored = crowd | (areas < SMALLEST_AREA) | (areas > LARGEST_AREA)                        # (4, G)
    rows, columns, iou = near_pairs(objects, of_objects, detections, of_detections)
    found, excused = match(rows, columns, iou, images, crowd, ignored)
    # A detection that found nothing is no mistake if its own size is outside the range.
    areas = detections.areas[of_detections]
    outside = (areas < SMALLEST_AREA) | (areas > LARGEST_AREA)                                # (4, D)
    excused |= ~found & outside[:, None, :]
    return detections.scores[of_detections], rank, found & ~excused, ~found & ~excused, np.sum(~ignored, axis=1)


def near_pairs(objects: Boxes, of_objects, detections: Boxes, of_detections) -> tuple:
    """The detections and objects in the same image whose IoU reaches the lowest threshold.

    Shapes:
        returns: rows (P,), into of_detections; columns (P,), into of_objects; iou (P,)
    """
    images, own = objects.images[of_objects], detections.images[of_detections]
    first = np.searchsorted(images, own)
    counts = np.searchsorted(images, own, side="right") - first
    pairs: list[tuple[np.ndarray, ...]] = []
    for part in np.array_split(np.arange(len(own)), 1 + counts.sum() // MOST_PAIRS):
        rows = np.repeat(part, counts[part])
        columns = np.arange(len(rows)) - np.repeat(np.cumsum(counts[part]) - counts[part] - first[part], counts[part])
        boxes_xywh, near_xywh = detections.boxes_xywh[of_detections[rows]], objects.boxes_xywh[of_objects[columns]]
        iou = iou_with_crowds(boxes_xywh, near_xywh, objects.crowd[of_objects[columns]])
        near = iou >= IOU_THRESHOLDS[0]
        pairs.append((rows[near], columns[near], iou[near]))
    return tuple(map(np.concatenate, zip(*pairs, strict=True)))


def iou_with_crowds(boxes1_xywh: np.ndarray, boxes2_xywh: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Intersection over union of pairs; over the area of the detection alone where the object is a crowd.

    A crowd's box surrounds uncounted objects, so a box well inside it is right whatever its size.

    Shapes:
        boxes1_xywh: (P, 4) detections
        boxes2_xywh: (P, 4) objects
        crowd: (P,)
        returns: (P,)
    Units: pixels, no "+ 1".
    """
    x1, y1, width1, height1 = boxes1_xywh.T
    x2, y2, width2, height2 = boxes2_xywh.T
    # The order of operations is pycocotools', so that equality at a threshold is equality there.
    width = np.minimum(width1 + x1, width2 + x2) - np.maximum(x1, x2)
    height = np.minimum(height1 + y1, height2 + y2) - np.maximum(y1, y2)
    overlap = (width > 0) & (height > 0)
    shared = width * height
    area1, area2 = width1 * height1, width2 * height2
    union = np.where(crowd, area1, area1 + area2 - shared)
    return np.divide(shared, union, out=np.zeros_like(shared), where=overlap)


def match(rows, columns, iou, images, crowd, ignored) -> tuple[np.ndarray, np.ndarray]:
    """Let each detection, best score first, take the object it fits best among those still free in its image.

    What happens in one image changes nothing in another: all images take their next detection at once.

    Shapes:
        rows: (P,) never falling, the detections of the near pairs
        columns: (P,) their objects
        iou: (P,)
        images: (D,) never falling, of detections best score first
        crowd: (G,)
        ignored: (4, G) for every area range
        returns: found (4, 10, D), True if the detection took an object at this area range and IoU
            threshold; excused (4, 10, D), True if that object is an ignored one
    Rule: IoU >= threshold is a match.  An object that counts is preferred to an ignored one of any IoU.
        An object is taken once, a crowd by any number of detections.
    Ties: of equal IoUs, the later object.
    """
    found, excused = np.zeros((2, len(images), 4, 10), bool)
    free, counts = np.ones((len(crowd), 4, 10), bool), ~ignored.T                             # (G, 4)
    mine = np.unique(rows)                                              # those that are near anything
    turn = np.arange(len(mine)) - np.searchsorted(images[mine], images[mine])
    turn = turn[np.searchsorted(mine, rows)]                                                  # (P,)
    # The last pair of a detection is the one it fits best, the later object of two.
    order = np.lexsort((columns, iou, rows, turn))
    rows, columns = rows[order], columns[order]
    # Just below 1: two equal boxes may have an IoU of 1 - 1e-16.
    fits = iou[order, None] >= np.minimum(IOU_THRESHOLDS, 1 - 1e-10)                          # (P, 10)
    pairs = np.bincount(turn)
    for start, end in zip(np.cumsum(pairs) - pairs, np.cumsum(pairs), strict=True):
        whose, objects = rows[start:end], columns[start:end]
        first = np.flatnonzero(np.diff(whose, prepend=-1))              # where a detection's pairs begin
        own = np.cumsum(np.diff(whose, prepend=whose[0]) > 0)
        choice = fits[start:end, None] & free[objects]                                        # (p, 4, 10)
        preferred = choice & counts[objects][:, :, None]
        choice = np.where(np.logical_or.reduceat(preferred, first)[own], preferred, choice)
        place = np.where(choice, np.arange(end - start)[:, None, None], -1)
        best = np.maximum.reduceat(place, first)                                              # (d, 4, 10)
        took, object_ = best >= 0, objects[best]
        found[whose[first]] = took
        excused[whose[first]] = took & ~counts[object_, np.arange(4)[:, None]]
        _, area, threshold = taken = np.nonzero(took & ~crowd[object_])
        free[object_[taken], area, threshold] = False
    return np.moveaxis(found, 0, 2), np.moveaxis(excused, 0, 2)


def curves(scores, rank, true, false, wanted) -> tuple[np.ndarray, np.ndarray]:
    """Pool the images of one class and read off precision and recall.

    Shapes:
        scores: (D,)
        rank: (D,)
        true: (4, 10, D)
        false: (4, 10, D)
        wanted: (4,)
        returns: precision (10, 101, 4, 3) at each of RECALLS; recall (10, 4, 3) at the end of the list
    Ties: equal scores keep the order of the images, then of the results.
    """
    precision = np.full((10, 101, 4, 3), UNDEFINED)
    recall = np.full((10, 4, 3), UNDEFINED)
    order = np.argsort(-scores, kind="stable")
    rank = rank[order]
    true, false = true[:, :, order], false[:, :, order]
    for area in np.flatnonzero(wanted):                                 # no object: stays undefined
        for m, most in enumerate(MAX_DETECTIONS):
            kept = rank < most
            hits = np.cumsum(true[area][:, kept], axis=1)                                     # (10, D)
            mistakes = np.cumsum(false[area][:, kept], axis=1)
            recalls = hits / wanted[area]
            # The spacing keeps 0 / 0 at 0 while every detection so far was ignored.
            precisions = hits / (hits + mistakes + np.spacing(1))
            precision[:, :, area, m] = [
                interpolate(r, p) for r, p in zip(recalls, precisions, strict=True)
            ]
            recall[:, area, m] = recalls[:, -1] if kept.any() else 0.0
    return precision, recall


def interpolate(recalls: np.ndarray, precisions: np.ndarray) -> np.ndarray:
    """The best precision still to be had at each of RECALLS, 0 where that recall is never reached.

    "At this recall or more" makes the saw-tooth curve fall monotonically: a detector may always be run at
    the lower threshold if that is better in both respects.

    Shapes:
        recalls: (D,) never falling
        precisions: (D,)
        returns: (101,)
    """
    envelope = np.maximum.accumulate(precisions[::-1])[::-1]
    first = np.searchsorted(recalls, RECALLS, side="left")
    return np.append(envelope, 0.0)[first]
