"""A model's average precision on a data set."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter

import numpy as np
from tqdm import tqdm

from minidet.data import Dataset, Loader
from minidet.detect import detect_batch
from minidet.evaluation.average_precision import accumulate
from minidet.evaluation.report import Evaluation
from minidet.models import RetinaNet


def evaluate(model: RetinaNet, dataset: Dataset, *, batch_size: int = 16, progress: bool = False) -> Evaluation:
    """COCO's twelve numbers, and AP per class, of the model's detections in every image of the data set.

    `seconds` of the result counts everything: loading, detecting and judging.

    Source: cocodataset.org/#detection-eval, and RetinaNet, arXiv:1708.02002, section 4.1.
    Raises:
        ValueError: if the data set's classes are not the model's.
    """
    began = perf_counter()
    results = detections_of(model, dataset, batch_size=batch_size, progress=progress)
    evaluation = accumulate(dataset.ground_truth(), results)
    if not results:  # the remark on an AP of 0 then says how far below the threshold everything was
        evaluation = replace(evaluation, top_score=top_score(model, dataset, images=batch_size))
    return evaluation.timed(perf_counter() - began)


def detections_of(
    model: RetinaNet, dataset: Dataset, *, batch_size: int = 16, progress: bool = False
) -> list[dict]:
    """The model's detections in every image, as a COCO result list.

    Units: {"image_id", "category_id", "bbox": [x, y, width, height] in pixels of the original, "score"}.
    Raises:
        ValueError: if the data set's classes are not the model's.
    """
    if tuple(dataset.classes) != tuple(model.config.classes):
        raise ValueError(
            f"the model knows the classes {', '.join(model.config.classes)}; the data set has "
            f"{', '.join(dataset.classes)}: evaluate on the classes the model was trained for"
        )
    loader = Loader(dataset, model.config.preprocess, batch_size=batch_size, shuffle=False)
    results = []
    with tqdm(total=len(dataset), desc="evaluating", unit=" images", disable=not progress, leave=False) as bar:
        for batch in loader:
            found = detect_batch(model, batch.images, batch.sizes, batch.original_sizes)
            for image_id, detections in zip(batch.image_ids, found, strict=True):
                corners = detections.boxes.astype(np.float64)
                boxes_xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
                rows = zip(boxes_xywh.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True)
                results += [
                    {"image_id": image_id, "category_id": dataset.category_ids[label], "bbox": box, "score": score}
                    for box, score, label in rows
                ]
            bar.update(len(batch.images))
    return results


def top_score(model: RetinaNet, dataset: Dataset, *, images: int) -> float:
    """The highest score, whatever the threshold, that the model gives to anything in the first `images`."""
    loader = Loader(dataset, model.config.preprocess, batch_size=images, shuffle=False)
    anything = replace(model.config.postprocess, score_threshold=0.0, max_detections=1)
    batch = next(iter(loader))
    found = detect_batch(model, batch.images, batch.sizes, batch.original_sizes, anything)
    return float(max((d.scores[0] for d in found if len(d.scores)), default=0.0))
