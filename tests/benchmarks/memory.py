"""Peak memory of every long job beside what is claimed of it; and that nothing grows.

    python -m tests.benchmarks.memory [--only NAME ...]

Every job has a process of its own, measured from after its imports on: `peak` is the most it had besides, `grown`
what it had more at the end than after a tenth, once freed memory was given back.  Status 1 if a claim does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parents[1]))  # what tests share: the smallest network, files of COCO's size

import coco_size
import tiny

import minidet as md
from minidet.data import Loader, shapes
from minidet.data.index import indexed
from minidet.data.shapes import Shapes
from minidet.images import Preprocess
from minidet.inspection.process import peak, reset_peak, settle
from minidet.models import RetinaNet, presets
from minidet.training import SHAPES, train
from minidet.weights import BY_NUMBER, to_torchvision
from minidet.weights.torch_file import write_torch
from tests.benchmarks.evaluation import streaming
from tests.benchmarks.loader import draw

MIB = 2**20
STEPS = 1_000
COCO = Path("instances_train2017.json")


@dataclass(frozen=True)
class Claim:
    """A job, and what its memory stays below, in MiB; no `grown` where nothing is repeated."""

    job: Callable[[Path, Callable[[], None]], None]
    what: str
    peak: float
    grown: float | None = None


def training(folder: Path, look: Callable[[], None]) -> None:
    """The smallest network; `look` after every hundredth step."""

    class Watched(Shapes):
        taken = 0

        def __getitem__(self, index: int):
            self.taken += 1
            if self.taken % 200 == 0:
                look()
            return super().__getitem__(index)

    data = Watched("train", 20, 0, 64, "standard")
    config = replace(SHAPES, images=2 * STEPS, batch_size=2, validations=0, checkpoints=5)
    train(tiny.model(), data, config=config, out=folder / "run", quiet=True)


def loading(folder: Path, look: Callable[[], None]) -> None:
    """Batches of two JPEGs at 400 px, with one thread ahead."""
    folder.mkdir()
    loader = Loader(md.coco(draw(folder)), Preprocess(400, 667), batch_size=2, images=2 * STEPS, workers=1)
    for n, _ in enumerate(loader, 1):
        if n % 100 == 0:
            look()


def evaluating(folder: Path, look: Callable[[], None]) -> None:
    """100 detections in each of 5,000 images."""
    streaming(5_000)


def evaluating_fewer(folder: Path, look: Callable[[], None]) -> None:
    """And of 1,000."""
    streaming(1_000)


def indexing(folder: Path, look: Callable[[], None]) -> None:
    """The json of train2017's size, with no index beside it."""
    indexed(folder.parent / COCO, 2.0)


def detecting(folder: Path, look: Callable[[], None]) -> None:
    """One picture after the other."""
    model, images = tiny.model(), shapes("val", images=20, size=128)
    for n in range(1, STEPS + 1):
        md.detect(model, images[n % 20].image)
        if n % 100 == 0:
            look()


def converting(folder: Path, look: Callable[[], None]) -> None:
    """The ResNet-50 detector of 80 classes as torch writes it: 130 MB."""
    md.convert(folder.parent / "published.pth", folder.parent / "published.safetensors")


def examining(folder: Path, look: Callable[[], None]) -> None:
    """The json of train2017's size, without a picture."""
    md.doctor(folder.parent / COCO)


def trying(folder: Path, look: Callable[[], None]) -> None:
    """With the training that is tried, of the `small` network."""
    md.doctor(shapes("train", images=64), validate=shapes("val", images=32), quick=True)


CLAIMS = {
    "train": Claim(training, f"{STEPS:,} steps of 2 images, the smallest network", 300, 4),
    "load": Claim(loading, f"{STEPS:,} batches of 2 JPEGs at 400 px", 160, 8),
    "detect": Claim(detecting, f"{STEPS:,} pictures, the smallest network", 120, 4),
    "evaluate 1,000": Claim(evaluating_fewer, "1,000 images x 100 detections", 100),
    "evaluate 5,000": Claim(evaluating, "5,000 images x 100 detections", 180),
    "index": Claim(indexing, "118,287 images and 860,001 boxes of json", 400),
    "convert": Claim(converting, "a whole ResNet-50 detector, 130 MB", 750),
    "doctor, json": Claim(examining, "the same json", 900),
    "doctor, trial": Claim(trying, "64 built-in images, training tried", 500),
}
NEEDS = {"index": "coco", "doctor, json": "coco", "convert": "published"}


def prepare(folder: Path, names: list[str]) -> None:
    """The files that jobs read, written where their memory does not count."""
    if {"index", "doctor, json"} & set(names):
        coco_size.write(folder / COCO)
    if "convert" in names:
        model = RetinaNet(presets.torchvision_v1(BY_NUMBER[91]), seed=0)
        write_torch(folder / "published.pth", to_torchvision(model.state_dict()))


def measured(name: str, folder: Path) -> tuple[float, float | None, float]:
    """What one job needs, and how it grew, in MiB; seconds."""
    seen: list[int] = []
    before, began = settle(), perf_counter()
    reset_peak()
    with contextlib.redirect_stdout(sys.stderr):
        CLAIMS[name].job(folder / name, lambda: seen.append(settle()))
    return (peak() - before) / MIB, (seen[-1] - seen[0]) / MIB if seen else None, perf_counter() - began


def main() -> int:
    """Measure, print a line a job; the status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CLAIMS, default=list(CLAIMS), metavar="NAME")
    names, broken = parser.parse_args().only, 0
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder, names)
        print(f"{'MiB':<16}{'peak':>7}{'claim':>7}{'grown':>8}{'claim':>7}{'s':>7}")
        for name in names:
            with context.Pool(1) as pool:
                most, grown, seconds = pool.apply(measured, (name, folder))
            claim = CLAIMS[name]
            fails = most >= claim.peak or (claim.grown is not None and grown >= claim.grown)
            broken += fails
            more = f"{'':8}{'':7}" if claim.grown is None else f"{grown:8.1f}{claim.grown:7.0f}"
            numbers = f"{name:<16}{most:7.0f}{claim.peak:7.0f}{more}{seconds:7.0f}"
            print(f"{numbers}  {claim.what}{'  FAILS' * fails}", flush=True)
    return min(broken, 1)


if __name__ == "__main__":
    sys.exit(main())
