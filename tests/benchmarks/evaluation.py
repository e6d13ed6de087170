"""Judging COCO's val2017 in size, 5,000 images with 100 detections each: ours beside pycocotools, and its memory.

    python -m tests.benchmarks.evaluation
    python -m tests.benchmarks.evaluation --images 500

Both get the same lists of dicts and run in a process of their own.  Times are of the CPU, which others on the
machine disturb least; pycocotools alone means COCO, loadRes, evaluate, accumulate and summarize.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import multiprocessing
from pathlib import Path
from time import process_time

import numpy as np

import minidet as md
from minidet.data import Sample
from minidet.detection import Detections
from minidet.evaluation import accumulate
from minidet.evaluation.report import NUMBERS

module = importlib.import_module("minidet.evaluation.evaluate")
DETECTIONS = 100
CLASSES = 80


def case(images: int) -> tuple[dict, list[dict]]:
    """7.4 objects an image, a hundredth of them crowds; six of ten detections are near one."""
    rng = np.random.default_rng(0)
    often = 1 / np.arange(1, CLASSES + 1)
    often /= often.sum()
    truth, results = [], []
    for image_id in range(images):
        objects = rng.geometric(1 / 7.4)
        labels = rng.choice(CLASSES, objects, p=often)
        side = np.exp(rng.uniform(np.log(8), np.log(400), (objects, 2)))
        boxes = np.hstack([rng.random((objects, 2)) * (640, 480), side]).round(2)
        of = rng.integers(objects, size=DETECTIONS)
        near = rng.random(DETECTIONS) < 0.6
        found = np.hstack([rng.random((DETECTIONS, 2)) * (640, 480), rng.uniform(8, 300, (DETECTIONS, 2))])
        found[near] = (boxes[of] * np.exp(rng.normal(0, 0.15, (DETECTIONS, 4))))[near]
        kinds = np.where(near, labels[of], rng.choice(CLASSES, DETECTIONS, p=often))
        scores = rng.random(DETECTIONS) * np.where(near, 1, 0.5)
        for box, label, crowd in zip(boxes.tolist(), labels.tolist(), rng.random(objects) < 0.01, strict=True):
            entry = {"id": len(truth) + 1, "image_id": image_id, "category_id": label + 1, "bbox": box}
            truth.append({**entry, "area": 0.6 * box[2] * box[3], "iscrowd": int(crowd)})
        results += [
            {"image_id": image_id, "category_id": label + 1, "bbox": box, "score": score}
            for box, label, score in zip(found.tolist(), kinds.tolist(), scores.tolist(), strict=True)
        ]
    categories = [{"id": k + 1, "name": f"class {k}"} for k in range(CLASSES)]
    return {"images": [{"id": n} for n in range(images)], "annotations": truth, "categories": categories}, results


def megabytes(name: str) -> float:
    """VmRSS or VmHWM of this process; the latter does not count what its parent had, as getrusage does."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def ours(truth: dict, results: list[dict]) -> list[float]:
    """Our twelve numbers."""
    return list(accumulate(truth, results).numbers.values())


def theirs(truth: dict, results: list[dict]) -> list[float]:
    """pycocotools' twelve numbers, with nothing of minidet."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats.tolist()


def measured(judge, images: int) -> tuple[list[float], float, float]:
    """The numbers, seconds of CPU, and how many megabytes the process grew."""
    given = case(images)
    before, began = megabytes("VmRSS"), process_time()
    numbers = judge(*given)
    return numbers, process_time() - began, megabytes("VmHWM") - before


class Blank:
    """So many grey images of 32 pixels."""

    classes = tuple(f"class {k}" for k in range(CLASSES))
    category_ids = tuple(range(1, CLASSES + 1))

    def __init__(self, images: int) -> None:
        self.images = images

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> Sample:
        boxes = np.array([[2, 2, 20, 20]], np.float32)
        return Sample(np.full((32, 32, 3), 128, np.uint8), boxes, np.array([index % CLASSES]), index + 1, "")

    def size(self, index: int) -> tuple[int, int]:
        """(H, W)."""
        return 32, 32

    def ground_truth(self) -> dict:
        """A box an image."""
        rows = [
            {"id": n + 1, "image_id": n + 1, "category_id": n % CLASSES + 1, "bbox": [2, 2, 18, 18]}
            for n in range(self.images)
        ]
        categories = [{"id": k + 1, "name": name} for k, name in enumerate(self.classes)]
        return {
            "images": [{"id": n + 1} for n in range(self.images)],
            "annotations": rows,
            "categories": categories,
        }


def streaming(images: int) -> list[float]:
    """Megabytes of the process after each fifth of `evaluate`, with a network that always finds 100 things; peak."""
    rng, seen, sizes = np.random.default_rng(0), [0], []

    def detect_batch(model, batch, *others):
        corners = np.sort(rng.uniform(0, 32, (len(batch), DETECTIONS, 2, 2)), axis=2).astype(np.float32)
        labels, scores = rng.integers(CLASSES, size=(len(batch), DETECTIONS)), np.linspace(1, 0.1, DETECTIONS)
        if (seen[0] + len(batch)) * 5 // images > seen[0] * 5 // images:
            sizes.append(megabytes("VmRSS"))
        seen[0] += len(batch)
        return [Detections(b.reshape(-1, 4), scores, k) for b, k in zip(corners, labels, strict=True)]

    module.detect_batch = detect_batch
    module.evaluate(md.RetinaNet(md.presets.small(Blank.classes)), Blank(images))
    return [*sizes, megabytes("VmHWM")]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    images = parser.parse_args().images
    context = multiprocessing.get_context("spawn")
    found = []
    for name, judge in (("minidet", ours), ("pycocotools", theirs)):
        with context.Pool(1) as pool:
            numbers, seconds, grown = pool.apply(measured, (judge, images))
        found.append(numbers)
        print(
            f"{name:12} {images:,} images x {DETECTIONS}: {seconds:7.2f} s, {grown:6.0f} MB more than its input",
            flush=True,
        )
    apart = max(abs(a - b) for a, b in zip(*found, strict=True))
    print(f"AP {found[0][0]:.6f} and {found[1][0]:.6f}; largest difference in {len(NUMBERS)} numbers: {apart:.0e}")
    with context.Pool(1) as pool:
        *sizes, peak = pool.apply(streaming, (images,))
    print(
        f"evaluate, MB after each fifth of the images: {', '.join(f'{size:.0f}' for size in sizes)}; peak {peak:.0f}"
    )


if __name__ == "__main__":
    main()
