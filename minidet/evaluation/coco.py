"""The same numbers from pycocotools, the reference everyone compares with."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from time import perf_counter

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from minidet.evaluation.inputs import Boxes, Case, checked
from minidet.evaluation.report import NUMBERS, Evaluation, by_class


def with_pycocotools(ground_truth: dict, results: Sequence[dict]) -> Evaluation:
    """Judge detections with pycocotools: what `accumulate` computes, computed by the original.

    Prints nothing, changes neither argument, and accepts an empty list of results.

    Raises:
        ValueError: if an entry names an unknown image or category, or holds impossible numbers.
    """
    started = perf_counter()
    case = checked(ground_truth, results)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(_coco(case, case.objects), _coco(case, case.detections), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    precision = np.asarray(evaluator.eval["precision"])[:, :, :, 0, 2]
    return Evaluation(
        numbers=dict(zip(NUMBERS, evaluator.stats.tolist(), strict=True)),
        per_class=by_class(precision, case.names),
        precision=precision,
        images=len(case.image_ids),
        objects=int(np.sum(~case.objects.crowd)),
        detections=len(case.detections),
        seconds=perf_counter() - started,
    )


def _coco(case: Case, boxes: Boxes) -> COCO:
    """A COCO object of our own: `COCO.loadRes` fails on no results and writes into the caller's."""
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i} for i in case.image_ids],
        "categories": [{"id": i} for i in case.category_ids],
        "annotations": [
            {
                "id": n + 1,  # never 0, which pycocotools takes for "no match"
                "image_id": case.image_ids[boxes.images[n]],
                "category_id": case.category_ids[boxes.classes[n]],
                "bbox": boxes.boxes_xywh[n].tolist(),
                "area": boxes.areas[n].item(),
                "iscrowd": int(boxes.crowd[n]),
                "score": boxes.scores[n].item(),
            }
            for n in range(len(boxes))
        ],
    }
    coco.createIndex()
    return coco
