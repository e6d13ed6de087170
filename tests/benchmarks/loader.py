"""How fast images come: where the time of one goes, threads beside processes, and what a training step waits.

    python -m tests.benchmarks.loader                 # 96 JPEGs drawn here, of COCO's sizes
    python -m tests.benchmarks.loader --no-training   # without the ResNet-50
    MINIDET_TEST_DATA=... python -m tests.benchmarks.loader --photos

Costs are in CPU time of one thread, which others on the machine disturb least; rates are by the clock.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import perf_counter, thread_time

import numpy as np
from PIL import Image

import minidet as md
from minidet.data import Augment, Loader, Sample
from minidet.images import Preprocess, open_image, pad_batch
from minidet.models.presets import PRESETS

IMAGES, BATCH = 96, 2
SIZES = ((480, 640), (640, 480), (427, 640), (640, 427), (375, 500), (500, 333))
"""H, W: what most of COCO's images have."""


def draw(folder: Path) -> Path:
    """A data set of pictures as large as COCO's, in pixels and in bytes."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    (folder / "images").mkdir()
    for n in range(IMAGES):
        h, w = SIZES[n % len(SIZES)]
        coarse = Image.fromarray(rng.integers(0, 256, (h // 24, w // 24, 3), np.uint8)).resize(
            (w, h), Image.BICUBIC
        )
        pixels = np.asarray(coarse, np.float32) + rng.normal(0, 9, (h, w, 1))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{n}.jpg", quality=90)
        images.append({"id": n, "file_name": f"{n}.jpg", "height": h, "width": w})
        for x, y in rng.integers(0, 180, (7, 2)).tolist():
            box = {"id": len(annotations), "image_id": n, "category_id": len(annotations) % 80 + 1}
            annotations.append({**box, "bbox": [x, y, 60 + x // 3, 60 + y // 3]})
    categories = [{"id": k + 1, "name": f"class {k}"} for k in range(80)]
    (folder / "annotations").mkdir()
    data = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / "instances_train.json").write_text(json.dumps(data))
    return folder


def stages(dataset, preprocess: Preprocess, rounds: int) -> dict[str, float]:
    """Milliseconds of CPU an image, by what is done."""
    costs = dict.fromkeys(("read and decode", "flip", "resize and normalise", "pad into the batch"), 0.0)
    augment, rng = Augment(), np.random.default_rng(0)
    preprocess.prepare(dataset[0].image)  # compiled
    nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    for _ in range(rounds):
        prepared = []
        for name in dataset.annotations.names:
            clocks = [thread_time()]
            image = open_image(dataset.folder / name)
            clocks.append(thread_time())
            image = augment(Sample(image, *nothing, 0, ""), rng).image
            clocks.append(thread_time())
            prepared.append(preprocess.prepare(image))
            clocks.append(thread_time())
            if len(prepared) == BATCH:
                pad_batch(prepared, preprocess.pad_multiple)
                prepared = []
            clocks.append(thread_time())
            for stage, seconds in zip(costs, np.diff(clocks), strict=True):
                costs[stage] += 1000 * seconds / (rounds * len(dataset))
    return costs


_loader: Loader | None = None


def _begin(folder: str, images: int) -> None:
    global _loader
    dataset = md.coco(folder)
    _loader = Loader(dataset, Preprocess(), batch_size=BATCH, images=images, augment=Augment())


def _batch(position: int):
    return _loader._batch(position)


def rate_of_processes(folder: Path, workers: int, images: int) -> float:
    """Images a second from spawned processes, whose batches are sent through pipes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(str(folder), images)) as pool:
        list(pool.map(_batch, range(0, 4 * workers, BATCH)))  # started and compiled
        began = perf_counter()
        for _ in pool.map(_batch, range(0, images, BATCH)):
            pass
        return images / (perf_counter() - began)


def rate(dataset, workers: int, images: int) -> float:
    """Images a second from the loader."""
    began = perf_counter()
    for _ in Loader(dataset, Preprocess(), batch_size=BATCH, images=images, augment=Augment(), workers=workers):
        pass
    return images / (perf_counter() - began)


def waiting(dataset, workers: int, steps: int) -> tuple[float, float]:
    """Seconds a ResNet-50 step takes at 800 px, once all is compiled, and the part in which it waits for its batch."""
    config = PRESETS["paper"](dataset.classes)
    model = md.RetinaNet(replace(config, preprocess=Preprocess()), seed=0)
    recipe = md.TrainConfig(images=BATCH * (steps + 2), batch_size=BATCH, workers=workers, validations=0, lr=1e-5)
    rows = md.train(model, dataset, config=recipe, quiet=True).history
    names = ("data_ms", "match_ms", "forward_ms", "backward_ms", "update_ms")
    spent = np.array([rows[name] for name in names])[:, 2:]
    return spent.sum() / 1000 / steps, spent[0].sum() / spent.sum()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--photos", action="store_true", help="the photos of MINIDET_TEST_DATA/coco_free80 instead"
    )
    parser.add_argument("--no-training", action="store_true")
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        photos = options.photos and Path(os.environ["MINIDET_TEST_DATA"]) / "coco_free80"
        folder = photos or draw(Path(temporary))
        dataset = md.coco(folder)
        files = [(dataset.folder / name).stat().st_size for name in dataset.annotations.names]
        kind = "photos of coco_free80" if photos else "drawn JPEGs"
        print(f"{len(dataset)} {kind}, {np.mean(files) / 1000:.0f} kB each; {os.cpu_count()} cores; 800 px")
        costs = stages(dataset, Preprocess(), 2)
        whole = sum(costs.values())
        for name, ms in costs.items():
            print(f"  {name:22} {ms:6.2f} ms  {ms / whole:4.0%}")
        print(f"  {'in all':22} {whole:6.2f} ms, {1000 / whole:.0f} images/s a core")
        images = len(dataset) // BATCH * BATCH
        for workers in (0, 1, 2):
            print(f"  {workers} threads   {rate(dataset, workers, images):5.0f} images/s")
        for workers in (1, 2):
            print(f"  {workers} processes {rate_of_processes(folder, workers, images):5.0f} images/s")
        for workers in () if options.no_training else (0, 1):
            seconds, part = waiting(dataset, workers, options.steps)
            print(
                f"  ResNet-50, {BATCH} images, {workers} threads: {seconds:.2f} s a step, {part:.2%} of it waiting"
            )


if __name__ == "__main__":
    main()
