"""Trainings on a GPU, held against what the CPU reached: built-in shapes, BCCD, and the first steps on COCO.

    python -m tests.benchmarks.gpu_training                        # README's 28,800 shapes, on the GPU
    python -m tests.benchmarks.gpu_training --part bccd --data DIR # DIR/bccd, and DIR/weights for its backbone
    python -m tests.benchmarks.gpu_training --part coco --data DIR # DIR/coco_free80: 500 steps at 800 px
    python -m tests.benchmarks.gpu_training --rehearse --data DIR  # how far two right answers drift apart, on a CPU
    python -m tests.benchmarks.gpu_training --dry-run --out DIR    # all of them on NumPy, tiny

DIR is else MINIDET_TEST_DATA.  The part coco takes its first 20 steps on the CPU too, from the same seed, in float32
without TF32, and demands the same losses; the overlaid curves are its picture.  The exit status is 1 where something
is not as on the CPU, 2 without a GPU.

How equal "the same" may be was measured: `--rehearse --size 128` trains twice on one CPU, by the compiled kernels and
by matrix products with the textbook's other kernels.  Both are right and sum in different orders, and their losses
differed by at most 2.1e-5 in the first ten steps and 2.7e-3 in the next ten.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np

import minidet as md
from minidet import backend
from minidet.kernels import only
from minidet.kernels.precision import PRECISIONS
from minidet.optim import SGD
from minidet.plots import lines
from minidet.training import FINE_TUNE, SHAPES
from tests.benchmarks.gpu_ours import peak_bytes
from tests.tiny import coco_folder
from tests.tiny import model as tiny_model

PARTS = ("shapes", "bccd", "coco")
REACHED = {"shapes": 0.671, "bccd": 0.572}
"""AP on the CPU, README's table: of shapes the mean of three seeds, .660 to .677."""
LESS = 0.02
TOLERANCE = (1e-3, 5e-2)
"""Relative, of each of the first ten losses and of the next ten: more than ten times what the rehearsal gave, since
larger photos have longer sums."""


class EnoughError(Exception):
    """All the images were taken that were wanted."""


def main() -> int:
    """Train, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="shapes unless given; may be given again")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the data sets (MINIDET_TEST_DATA)")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("runs/gpu"), help="for runs and pictures")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="of shapes and bccd")
    parser.add_argument("--steps", type=int, default=500, help="of coco (%(default)s)")
    parser.add_argument("--size", type=int, default=800, help="of coco's photos, the shorter side (%(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="coco's first steps on the CPU, by two orders of sums")
    parser.add_argument("--dry-run", action="store_true", help="on NumPy, tiny: the numbers mean nothing")
    options = parser.parse_args()
    on_cpu = options.dry_run or options.rehearse
    if not on_cpu:
        try:
            backend.load("cupy")
        except RuntimeError as error:
            print(f"No GPU to train on: {error}.", file=sys.stderr)
            return 2
    os.environ["MINIDET_BACKEND"] = "numpy" if on_cpu else "cupy"
    root = options.data or Path(os.environ.get("MINIDET_TEST_DATA") or ".")
    if options.dry_run:
        root = options.out / "data"
        for name in ("bccd", "coco_free80"):
            if not (root / name).exists():
                coco_folder(root / name)
    options.out.mkdir(parents=True, exist_ok=True)
    run = {"shapes": shapes, "bccd": bccd, "coco": coco}
    parts = options.part or (["coco"] if options.rehearse else PARTS if options.dry_run else PARTS[:1])
    return int(not all([run[part](options, root) for part in parts]))


def shapes(options: argparse.Namespace, root: Path) -> bool:
    """README's main job, of a fixed number of images."""
    size = {"size": 64, "images": 16} if options.dry_run else {}
    config = replace(SHAPES, precision=options.precision, images=16 if options.dry_run else SHAPES.images)
    train, val = md.shapes("train", **size), md.shapes("val", **(size or {"images": 400}))
    model = tiny_model() if options.dry_run else md.RetinaNet(md.presets.small(train.classes), seed=0)
    return judged("shapes", model, train, val, config, options)


def bccd(options: argparse.Namespace, root: Path) -> bool:
    """README's training from ImageNet weights."""
    train, val = md.coco(root / "bccd", "train"), md.coco(root / "bccd", "val")
    augment = replace(FINE_TUNE.augment, vflip=0.5, transpose=True)
    config = replace(FINE_TUNE, augment=augment, precision=options.precision)
    if options.dry_run:
        return judged("bccd", tiny_model(), train, val, replace(config, images=8, warmup=None), options)
    model = md.RetinaNet(md.presets.resnet18(train.classes), seed=0)
    print(md.load_initial(model, root / "weights" / "resnet18_imagenet_to_layer3.npz").table())
    return judged("bccd", model, train, val, config, options)


def judged(name: str, model, train, val, config, options: argparse.Namespace) -> bool:
    """Train, validate once, and compare with the CPU's AP."""
    began = perf_counter()
    config = replace(config, validations=1, checkpoints=1, samples=0 if options.dry_run else 6)
    result = md.train(model, train, validate=val, config=config, quiet=options.dry_run)
    seconds, AP = perf_counter() - began, result.evaluation["AP"]
    print(f"{name}: AP {AP:.3f} (the CPU: {REACHED[name]:.3f}) after {config.images:,} images in {seconds:.0f} s, "
          f"{np.median(result.history['forward_ms']) + np.median(result.history['backward_ms']):.1f} ms a step, "
          f"pool {peak_bytes(model.xp) / 2**20:,.0f} MiB")  # fmt: skip
    return options.dry_run or bool(AP >= REACHED[name] - LESS)


def coco(options: argparse.Namespace, root: Path) -> bool:
    """A ResNet-50 from random weights on large photos; the first steps on the CPU too."""
    backend.use_tf32(False)
    data = md.coco(root / "coco_free80", "train")
    steps, first = (3, 2) if options.dry_run else (options.steps, min(20, options.steps))
    config = md.TrainConfig(images=2 * steps, batch_size=2, rule=SGD(momentum=0.9), lr=0.01, validations=0,
                            warmup=steps // 2, checkpoints=1, samples=0)  # fmt: skip

    def losses(xp, count: int, version: str | None = None) -> np.ndarray:
        """Of the first steps of the very same training: the schedule does not know that it will be cut."""
        config_of = network(data.classes, options.size)
        model = tiny_model(xp=xp) if options.dry_run else md.RetinaNet(config_of, seed=0, xp=xp)

        class First:
            """The data set, which ends the training when the images of `count` steps were taken."""

            classes, category_ids, taken = data.classes, data.category_ids, 0

            def __len__(self):
                return len(data)

            def __getitem__(self, index):
                if self.taken == 2 * count:
                    raise EnoughError
                self.taken += 1
                return data[index]

        folder = options.out / f"coco_{version or backend.name_of(xp)}_{count}"
        for file in folder.glob("*"):
            file.unlink()
        try:
            with only(version):
                md.train(model, First(), config=config, out=folder, quiet=options.dry_run)
        except RuntimeError as error:  # the loader says which image an error came from
            if not isinstance(error.__cause__, EnoughError):
                raise
        found = [float(row.split(",")[3]) for row in (folder / "metrics.csv").read_text().splitlines()[1:]]
        return np.array(found[:count])

    began, steps = perf_counter(), first if options.rehearse else steps
    there = losses(backend.default(), steps, "blocked" if options.rehearse else None)
    seconds = perf_counter() - began
    here = losses(np, first)
    difference = np.abs(there[:first] / here - 1)
    worst = [float(part.max(initial=0)) for part in (difference[:10], difference[10:])]
    curves = {
        f"all, {backend.name_of(backend.default())}": (range(1, steps + 1), there),
        "the first, on the CPU": (range(1, first + 1), here),
    }
    path = lines(curves, options.out / "coco_loss.png", x="step", y="loss", title="One training, twice")
    print(
        f"coco: {steps} steps in {seconds:.0f} s, loss {there[:20].mean():.3f} to {there[-20:].mean():.3f}; the "
        f"first {first} differ from the CPU's by at most {worst[0]:.1e}, after ten {worst[1]:.1e} "
        f"(allowed: {TOLERANCE[0]:.0e} and {TOLERANCE[1]:.0e}); {path}"
    )
    return bool(worst[0] <= TOLERANCE[0] and worst[1] <= TOLERANCE[1] and np.isfinite(there).all())


def network(classes, size: int):
    """What the published trainings are made of, with GroupNorm, which learns from random weights."""
    config = md.presets.torchvision_v2(classes)
    preprocess = replace(config.preprocess, min_size=size, max_size=size * 5 // 3)
    return replace(config, backbone=replace(config.backbone, norm=md.nn.Norm("group")), preprocess=preprocess)


if __name__ == "__main__":
    sys.exit(main())
