"""A model's average precision on a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter

import numpy as np
from tqdm import tqdm

from minidet.data import Dataset, Loader
from minidet.data.loader import share
from minidet.detect import detect_batch
from minidet.evaluation.average_precision import accumulate
from minidet.evaluation.coco import with_pycocotools
from minidet.evaluation.inputs import Results
from minidet.evaluation.report import Evaluation
from minidet.models import RetinaNet


def evaluate(
    model: RetinaNet, dataset: Dataset, *, batch_size: int = 16, progress: bool = False, check: bool = False
) -> Evaluation:
    """COCO's twelve numbers, and AP per class, of the model's detections in every image of the data set.

    `seconds` of the result counts everything: loading, detecting and judging.  With `check`, pycocotools judges
    the same detections again.

    Source: cocodataset.org/#detection-eval, and RetinaNet, arXiv:1708.02002, section 4.1.
    Raises:
        ValueError: if the model does not know all classes of the data set.
    """
    began = perf_counter()
    results = detections_of(model, dataset, batch_size=batch_size, progress=progress)
    return judge(model, dataset, results, batch_size=batch_size, began=began, check=check)


def judge(
    model: RetinaNet, dataset: Dataset, results: Sequence[dict], *, batch_size: int, began: float, check: bool = False
) -> Evaluation:
    """The evaluation of all results of `detections_of`, which was begun at `began` of `perf_counter`."""
    truth = dataset.ground_truth()
    evaluation = accumulate(truth, results)
    if check:
        evaluation = replace(evaluation, reference=with_pycocotools(truth, results).numbers)
    if not results:  # the remark on an AP of 0 then says how far below the threshold everything was
        evaluation = replace(evaluation, top_score=top_score(model, dataset, images=batch_size))
    return evaluation.timed(perf_counter() - began)


def detections_of(
    model: RetinaNet, dataset: Dataset, *, batch_size: int = 16, progress: bool = False, rank: int = 0, size: int = 1
) -> Results:
    """The model's detections in every image, to be read like a COCO result list.

    Process `rank` of `size` takes its share of the batches: all shares, one after the other, are the whole list.

    Units: {"image_id", "category_id", "bbox": [x, y, width, height] in pixels of the original, "score"}.
    Rule: classes are told by their names; detections of a class that the data set does not have are left out.
    Raises:
        ValueError: if the model does not know all classes of the data set.
    """
    if not set(dataset.classes) <= set(model.config.classes):
        raise ValueError(
            f"the model knows the classes {', '.join(model.config.classes)}; the data set has "
            f"{', '.join(dataset.classes)}: evaluate on the classes the model was trained for"
        )
    ids = dict(zip(dataset.classes, dataset.category_ids, strict=True))
    ids = {label: ids[name] for label, name in enumerate(model.config.classes) if name in ids}
    mine = share(-(-len(dataset) // batch_size), rank, size)
    start, stop = mine.start * batch_size, min(mine.stop * batch_size, len(dataset))
    loader = Loader(
        dataset, model.config.preprocess, batch_size=batch_size, shuffle=False, start=start, images=stop, xp=model.xp
    )
    parts = []
    with tqdm(total=stop - start, desc="evaluating", unit=" images", disable=not progress, leave=False) as bar:
        for batch in loader:
            found = detect_batch(model, batch.images, batch.sizes, batch.original_sizes)
            for image_id, detections in zip(batch.image_ids, found, strict=True):
                known = np.isin(detections.labels, list(ids))
                corners = detections.boxes[known].astype(np.float64)
                parts.append((
                    np.full(len(corners), image_id),
                    np.array([ids[label] for label in detections.labels[known].tolist()], np.int64),
                    np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1),
                    detections.scores[known].astype(np.float64),
                ))
            bar.update(len(batch.images))
    return Results.joined(parts)


def top_score(model: RetinaNet, dataset: Dataset, *, images: int) -> float:
    """The highest score, whatever the threshold, that the model gives to anything in the first `images`."""
    loader = Loader(dataset, model.config.preprocess, batch_size=images, shuffle=False)
    anything = replace(model.config.postprocess, score_threshold=0.0, max_detections=1)
    batch = next(iter(loader))
    found = detect_batch(model, batch.images, batch.sizes, batch.original_sizes, anything)
    return float(max((d.scores[0] for d in found if len(d.scores)), default=0.0))
