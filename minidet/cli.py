"""The command: parses, calls, prints."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from minidet.data import Dataset, coco, shapes
from minidet.detect import detect
from minidet.evaluation import evaluate
from minidet.models import RetinaNet, RetinaNetConfig
from minidet.models.presets import PRESETS
from minidet.plots import precision_recall
from minidet.training import (
    FINE_TUNE,
    SCRATCH,
    SHAPES,
    NonFiniteError,
    TrainConfig,
    load_model,
    read_checkpoint,
    train,
)
from minidet.training.checkpoint import BEST, LAST, find_checkpoint, is_checkpoint
from minidet.training.settings import assign, from_json, to_json
from minidet.weights import load_initial

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
SHAPES_TRAIN, SHAPES_VAL = 28_800, 400
RESULTS = ("metrics.json", "metrics.csv", "curves.png", "samples.png", BEST, LAST)

EXAMPLES = """\
examples:
  minidet train --data shapes --out runs/shapes          learn on 28,800 of the built-in images
  minidet train --data BCCD --epochs 16 --out runs/bccd  a folder with annotations/instances_{train,val}.json
  minidet train --data BCCD --out runs/bccd --resume     go on after Ctrl-C, exactly
  minidet eval runs/bccd --data BCCD --split test        COCO's twelve numbers and AP per class
  minidet detect runs/bccd photo.jpg --out found         found/photo.png and found/photo.json
"""

TRAIN_EXAMPLES = """\
examples:
  minidet train --data shapes
  minidet train --data BCCD --epochs 16 --out runs/bccd
  minidet train --data BCCD --out runs/bccd --resume
  minidet train --data BCCD --init resnet18.npz --images 5200 --out runs/fine
  minidet train --data BCCD --init runs/shapes --out runs/bccd2

DIR holds annotations/instances_train.json and, for validation, instances_val.json, with the pictures in
images/, train2017/ or beside them: what COCO and most labelling tools export.

RUN receives last.safetensors, best.safetensors, metrics.csv (a row per step), metrics.json, curves.png and
samples.png.  Ctrl-C finishes the step and saves; --resume takes every setting from RUN, so none has to be
given again.

Any other setting can be given as --set NAME=VALUE, with the names that RUN's checkpoint records:
  --set lr=0.002 --set cosine=true          of the training (minidet/training/config.py)
  --set model.head.depth=4                  of the model (minidet/models/retinanet.py, presets.py)
  --set model.preprocess.min_size=480 --set model.preprocess.max_size=640
"""

EVAL_EXAMPLES = """\
examples:
  minidet eval runs/shapes --data shapes
  minidet eval runs/bccd --data BCCD --split test --out test_numbers
"""

DETECT_EXAMPLES = """\
examples:
  minidet detect runs/bccd photo.jpg --out found
  minidet detect runs/bccd photos/ more/photo.png --out found --threshold 0.5

Every NAME.jpg gives NAME.png, with what scores more than the threshold drawn, and NAME.json, with everything
that was found: boxes x1, y1, x2, y2 in the picture's own pixels.
"""


class _Parser(argparse.ArgumentParser):
    """Takes every option by its whole name only, and says which was probably meant."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        known = [option for action in self._actions for option in action.option_strings]
        wrong = [word.partition("=")[0] for word in message.partition("unrecognized arguments: ")[2].split()]
        if choice := re.search(r"invalid choice: '(.*?)'", message):
            known, wrong = [name for action in self._actions for name in action.choices or ()], [choice[1]]
        for word in wrong:
            close = difflib.get_close_matches(word, known, 1)
            if close:
                message += f"; did you mean {close[0]}?"
        self.exit(2, f"{self.prog}: {message}\nTry {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 2 after a user's mistake, 130 after Ctrl-C."""
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:  # the subcommand's parser knows the options that could have been meant
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        options.run(options)
    except KeyboardInterrupt as stop:
        print(f"minidet: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    except MemoryError as error:
        print(f"minidet: out of memory: {str(error) or 'no details'}; try a smaller --batch-size", file=sys.stderr)
        return 2
    except (ValueError, OSError, NonFiniteError, RuntimeError) as error:
        print(f"minidet: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="minidet", description="RetinaNet on NumPy: train, evaluate, detect.", epilog=EXAMPLES)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    command = commands.add_parser(
        "train", help="train a detector", description="Train a detector.", epilog=TRAIN_EXAMPLES
    )
    command.add_argument("--data", required=True, metavar="shapes|DIR", help="the built-in images, or a COCO folder")
    command.add_argument(
        "--preset", choices=PRESETS, help="the network (small; resnet18 for a backbone's --init)"
    )
    command.add_argument("--out", metavar="RUN", type=Path, help="folder for all results (runs/ and the data's name)")
    length = command.add_mutually_exclusive_group()
    length.add_argument("--images", type=int, metavar="N", help="how many images to see in all")
    length.add_argument("--epochs", type=float, metavar="N", help="the same, as rounds through the data")
    command.add_argument("--init", metavar="WEIGHTS", type=Path, help="first weights: a run, or a backbone's file")
    command.add_argument("--resume", action="store_true", help="continue the training in RUN")
    command.add_argument("--seed", type=int, metavar="N", help="of weights, order and augmentation (0)")
    command.add_argument("--batch-size", type=int, metavar="N", help="images per step")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="other settings, see below")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.set_defaults(run=_train, parser=command)

    command = commands.add_parser(
        "eval",
        help="measure average precision",
        description="Measure average precision on a COCO data set.",
        epilog=EVAL_EXAMPLES,
    )
    command.add_argument("model", metavar="RUN", help="a run's folder, or a checkpoint")
    command.add_argument("--data", required=True, metavar="shapes|DIR", help="the built-in images, or a COCO folder")
    command.add_argument("--split", default="val", help="which annotations/instances_SPLIT.json (val)")
    command.add_argument("--out", metavar="DIR", type=Path, help="for metrics.json and precision_recall.png (RUN)")
    command.set_defaults(run=_eval, parser=command)

    command = commands.add_parser(
        "detect",
        help="find objects in pictures",
        description="Find objects in pictures: a drawn PNG and a JSON each.",
        epilog=DETECT_EXAMPLES,
    )
    command.add_argument("model", metavar="RUN", help="a run's folder, or a checkpoint")
    command.add_argument("pictures", nargs="+", type=Path, metavar="IMAGE|FOLDER")
    command.add_argument("--out", required=True, metavar="DIR", type=Path, help="where the results go")
    command.add_argument("--threshold", type=float, default=0.3, metavar="SCORE", help="draw what scores more (0.3)")
    command.set_defaults(run=_detect, parser=command)
    return parser


def _train(options: argparse.Namespace) -> None:
    out = _folder(options.out or Path("runs") / Path(options.data).resolve().stem)
    data = _dataset(options.data, "train")
    validate = _dataset(options.data, "val", missing_ok=True)
    if validate is None:
        print(f"{options.data} has no annotations/instances_val.json: AP will not be measured", file=sys.stderr)
    config, recipe = _settings(options, out, data.classes)
    config, recipe = _with(options.set, config, replace(recipe, **_flags(options, len(data))))
    model = RetinaNet(config, seed=recipe.seed)
    if options.init and options.resume:
        raise ValueError("--init gives first weights, --resume continues from a run's last ones: choose one")
    if options.init:
        init = find_checkpoint(options.init) if options.init.is_dir() else options.init
        print(load_initial(model, init).table())
    training = train(model, data, validate=validate, out=out, config=recipe, resume=options.resume, quiet=options.quiet)
    if training.evaluation is not None:
        print(training.evaluation.table())
    print(f"\nin {out}: {', '.join(name for name in RESULTS if (out / name).exists())}")


def _settings(options: argparse.Namespace, out: Path, classes: tuple[str, ...]) -> tuple[RetinaNetConfig, TrainConfig]:
    """What to start from: the settings of the run that is continued, else of a preset and its recipe."""
    init = options.init
    recipe = SHAPES if options.data == "shapes" else FINE_TUNE if init else SCRATCH
    if options.resume:
        saved = read_checkpoint(out / LAST)
        config = from_json(RetinaNetConfig, saved.model, "model")
        recipe = from_json(TrainConfig, saved.training.get("config", {}), "training")
    elif init and is_checkpoint(init):
        config = replace(from_json(RetinaNetConfig, read_checkpoint(init).model, "model"), classes=classes)
    else:
        config = PRESETS["resnet18" if init else "small"](classes)
    return PRESETS[options.preset](classes) if options.preset else config, recipe


def _flags(options: argparse.Namespace, epoch: int) -> dict[str, int]:
    """The settings of a training that have a flag of their own and were given; an epoch has so many images."""
    images = options.images
    if options.epochs is not None:
        if not 0 < options.epochs < math.inf:
            raise ValueError(f"--epochs must be a number above 0, got {options.epochs:g}")
        images = max(1, round(options.epochs * epoch))
    chosen = {"images": images, "batch_size": options.batch_size, "seed": options.seed}
    return {name: value for name, value in chosen.items() if value is not None}


def _eval(options: argparse.Namespace) -> None:
    run = Path(options.model)
    out = _folder(options.out or (run if run.is_dir() else run.parent))
    evaluation = evaluate(load_model(run), _dataset(options.data, options.split), progress=True)
    print(evaluation.table())
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(evaluation.to_json(), indent=1))
    if curves := evaluation.curves():
        precision_recall(curves, out / "precision_recall.png")
    print(f"\nin {out}: metrics.json" + (", precision_recall.png" if curves else ""))


def _detect(options: argparse.Namespace) -> None:
    if not 0 <= options.threshold <= 1:
        raise ValueError(f"--threshold is a score from 0 to 1, got {options.threshold:g}")
    _folder(options.out)
    model, pictures = load_model(options.model), _pictures(options.pictures)
    names: dict[str, Path] = {}
    for path in pictures:
        drawn = options.out / f"{path.stem}.png"
        if path.stem in names:
            raise ValueError(f"{names[path.stem]} and {path} would both become {drawn.name}: detect them one by one")
        if drawn.exists() and any(drawn.samefile(other) for other in pictures if other.exists()):
            raise ValueError(f"--out {options.out}: {drawn.name} would overwrite the picture itself: choose another")
        names[path.stem] = path
    options.out.mkdir(parents=True, exist_ok=True)
    for name, path in names.items():
        found = detect(model, path)
        found.draw(threshold=options.threshold).save(options.out / f"{name}.png")
        (options.out / f"{name}.json").write_text(found.json_text())
        shown = int((found.scores > options.threshold).sum())
        print(f"{path}: {shown} drawn (score > {options.threshold:g}), {len(found)} in {name}.json")


def _folder(path: Path) -> Path:
    """The path, if it can be a folder; asked before the work whose results go there."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"--out {path}: this is a file; results need a folder")
    return path


def _pictures(paths: Sequence[Path]) -> list[Path]:
    """The files themselves, and the pictures directly inside of folders."""
    pictures = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES)
            if not inside:
                raise ValueError(f"{path}: no pictures in this folder ({', '.join(PICTURES)})")
            pictures += inside
        else:
            pictures.append(path)
    return pictures


def _dataset(name: str, split: str, *, missing_ok: bool = False) -> Dataset | None:
    if name == "shapes":
        return shapes(split, images=SHAPES_TRAIN if split == "train" else SHAPES_VAL)
    files = [Path(name) / "annotations" / f"instances_{split}{year}.json" for year in ("", "2017")]
    if missing_ok and not any(map(Path.is_file, files)):  # a json file by itself is one split: no second is taken
        return None
    return coco(name, split=split)


def _with(
    settings: Sequence[str], config: RetinaNetConfig, recipe: TrainConfig
) -> tuple[RetinaNetConfig, TrainConfig]:
    """Both with every NAME=VALUE put in; reading them back checks types and ranges."""
    tree = to_json(recipe) | {"model": to_json(config)}
    for setting in settings:
        try:
            assign(tree, setting)
        except ValueError as error:
            raise ValueError(f"--set {setting}: {error}") from error
    model = tree.pop("model")
    return from_json(RetinaNetConfig, model, "model"), from_json(TrainConfig, tree, "training")


if __name__ == "__main__":
    sys.exit(main())
