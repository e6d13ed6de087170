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
    rows_of_objects = case.objects.by_class_and_image()
    rows_of_detections = case.detections.by_class_and_image()
    none = np.empty(0, np.int64)
    images_of_class = [[] for _ in range(K)]
    # Sorted, because images that tie in score are pooled in the order of their ids.
    for k, image in sorted(rows_of_objects.keys() | rows_of_detections.keys()):
        objects, detections = (rows.get((k, image), none) for rows in (rows_of_objects, rows_of_detections))
        images_of_class[k].append(judge_image(case.objects, objects, case.detections, detections))
    for k, images in enumerate(images_of_class):
        if images:
            precision[:, :, k], recall[:, k] = curves_of_class(images)
    return Evaluation(
        numbers=twelve_numbers(precision, recall),
        per_class=by_class(precision[:, :, :, 0, 2], case.names),
        precision=precision[:, :, :, 0, 2],
        images=len(case.image_ids),
        objects=int(np.sum(~case.objects.crowd)),
        detections=len(case.detections),
        seconds=perf_counter() - started,
    )


def judge_image(objects: Boxes, of_objects, detections: Boxes, of_detections) -> tuple:
    """What became of the detections of one class in one image, for every area range and threshold.

    `of_objects` and `of_detections` are the rows of this image and class.  Crowds are ignored, and
    whatever lies outside the area range: neither finding nor missing an ignored object counts.

    Shapes:
        returns: scores (D,) of at most 100 detections, best first; true (4, 10, D) and false (4, 10, D)
            positives, neither where a detection is ignored; wanted (4,), the number of objects to find
    """
    best_first = np.argsort(-detections.scores[of_detections], kind="stable")
    of_detections = of_detections[best_first[: MAX_DETECTIONS[-1]]]
    crowd, areas = objects.crowd[of_objects], objects.areas[of_objects]
    ignored = crowd | (areas < SMALLEST_AREA) | (areas > LARGEST_AREA)                        # (4, G)
    iou = iou_with_crowds(detections.boxes_xywh[of_detections], objects.boxes_xywh[of_objects], crowd)
    found, excused = match(iou, crowd, ignored)
    # A detection that found nothing is no mistake if its own size is outside the range.
    areas = detections.areas[of_detections]
    outside = (areas < SMALLEST_AREA) | (areas > LARGEST_AREA)                                # (4, D)
    excused |= ~found & outside[:, None, :]
    return detections.scores[of_detections], found & ~excused, ~found & ~excused, np.sum(~ignored, axis=1)


def iou_with_crowds(boxes1_xywh: np.ndarray, boxes2_xywh: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Intersection over union; over the area of the detection alone where the object is a crowd.

    A crowd's box surrounds uncounted objects, so a box well inside it is right whatever its size.

    Shapes:
        boxes1_xywh: (D, 4) detections
        boxes2_xywh: (G, 4) objects
        crowd: (G,)
        returns: (D, G)
    Units: pixels, no "+ 1".
    """
    x1, y1, width1, height1 = boxes1_xywh.T[:, :, None]                                       # (D, 1) each
    x2, y2, width2, height2 = boxes2_xywh.T                                                   # (G,) each
    # The order of operations is pycocotools', so that equality at a threshold is equality there.
    width = np.minimum(width1 + x1, width2 + x2) - np.maximum(x1, x2)
    height = np.minimum(height1 + y1, height2 + y2) - np.maximum(y1, y2)
    overlap = (width > 0) & (height > 0)
    shared = width * height
    area1, area2 = width1 * height1, width2 * height2
    union = np.where(crowd, area1, area1 + area2 - shared)
    return np.divide(shared, union, out=np.zeros_like(shared), where=overlap)


def match(iou: np.ndarray, crowd: np.ndarray, ignored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Let each detection, best score first, take the object it fits best among those still free.

    Shapes:
        iou: (D, G) detections best score first
        crowd: (G,)
        ignored: (4, G) for every area range
        returns: found (4, 10, D), True if the detection took an object at this area range and IoU
            threshold; excused (4, 10, D), True if that object is an ignored one
    Rule: IoU >= threshold is a match.  An object that counts is preferred to an ignored one of any IoU.
        An object is taken once, a crowd by any number of detections.
    Ties: of equal IoUs, the later object.
    """
    D, G = iou.shape
    found, excused = np.zeros((2, 4, 10, D), bool)
    free = np.ones((4, 10, G), bool)
    counts = ~ignored[:, None, :]                                                             # (4, 1, G)
    # Just below 1: two equal boxes may have an IoU of 1 - 1e-16.
    fits = iou[:, None, :] >= np.minimum(IOU_THRESHOLDS, 1 - 1e-10)[:, None]                  # (D, 10, G)
    for d in np.flatnonzero(fits.any(axis=(1, 2))):
        choice = fits[d] & free                                                               # (4, 10, G)
        preferred = choice & counts
        choice = np.where(preferred.any(axis=2, keepdims=True), preferred, choice)
        # argmax returns the first maximum: reversed, it returns the last.
        best = G - 1 - np.argmax(np.where(choice, iou[d], -1)[:, :, ::-1], axis=2)            # (4, 10)
        took = choice & (np.arange(G) == best[:, :, None])
        found[:, :, d] = took.any(axis=2)
        excused[:, :, d] = (took & ~counts).any(axis=2)
        free &= ~took | crowd
    return found, excused


def curves_of_class(images: list[tuple]) -> tuple[np.ndarray, np.ndarray]:
    """Pool the images of one class and read off precision and recall.

    Shapes:
        images: list of what judge_image returns
        returns: precision (10, 101, 4, 3) at each of RECALLS; recall (10, 4, 3) at the end of the list
    Ties: equal scores keep the order of the images, then of the results.
    """
    precision = np.full((10, 101, 4, 3), UNDEFINED)
    recall = np.full((10, 4, 3), UNDEFINED)
    scores, true, false, wanted = zip(*images, strict=True)
    rank = np.concatenate([np.arange(len(s)) for s in scores])          # 0 is the best of its image
    order = np.argsort(-np.concatenate(scores), kind="stable")
    rank = rank[order]
    true = np.concatenate(true, axis=2)[:, :, order]                                          # (4, 10, D)
    false = np.concatenate(false, axis=2)[:, :, order]
    wanted = np.sum(wanted, axis=0)                                                           # (4,)
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
