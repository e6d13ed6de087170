"""The command: parses, calls, prints."""

from __future__ import annotations

import argparse
import difflib
import json
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
from minidet.training import FINE_TUNE, SCRATCH, SHAPES, NonFiniteError, TrainConfig, load_model, train
from minidet.training.settings import from_json, to_json
from minidet.weights import load_initial

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
SHAPES_TRAIN, SHAPES_VAL = 28_800, 400

EXAMPLES = """\
examples:
  minidet train --data shapes --out runs/shapes          learn on the built-in images, in about three minutes
  minidet train --data BCCD --epochs 16 --out runs/bccd  a folder with annotations/instances_{train,val}.json
  minidet train --data BCCD --out runs/bccd --resume     go on after Ctrl-C, exactly
  minidet eval runs/bccd --data BCCD --split test        COCO's twelve numbers and AP per class
  minidet detect runs/bccd photo.jpg --out found         found/photo.png and found/photo.json
"""

TRAIN_EXAMPLES = """\
DIR holds annotations/instances_train.json and, for validation, instances_val.json, with the pictures in
images/, train2017/ or beside them: what COCO and most labelling tools export.

RUN receives last.safetensors, best.safetensors, metrics.csv (a row per step), metrics.json, curves.png and
samples.png.

Any other setting can be given as --set NAME=VALUE, with the names that RUN's checkpoint records:
  --set lr=0.002 --set cosine=true          of the training (minidet/training/config.py)
  --set model.head.depth=4                  of the model (minidet/models/retinanet.py)
  --set model.preprocess.min_size=480 --set model.preprocess.max_size=640
"""


class _Parser(argparse.ArgumentParser):
    """Says which option was probably meant."""

    def error(self, message: str):
        known = [option for action in self._actions for option in action.option_strings]
        for word in message.partition("unrecognized arguments: ")[2].split():
            close = difflib.get_close_matches(word.partition("=")[0], known, 1)
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
        print(f"minidet: {stop or 'interrupted'}", file=sys.stderr)
        return 130
    except (ValueError, OSError, NonFiniteError, RuntimeError) as error:
        print(f"minidet: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="minidet", description="RetinaNet on NumPy: train, evaluate, detect.", epilog=EXAMPLES, formatter_class=form
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    command = commands.add_parser(
        "train", help="train a detector", description="Train a detector.", epilog=TRAIN_EXAMPLES, formatter_class=form
    )
    command.add_argument("--data", required=True, metavar="shapes|DIR", help="the built-in images, or a COCO folder")
    command.add_argument(
        "--preset", choices=PRESETS, help="the network (small; resnet18 with --init); minidet/models/presets.py"
    )
    command.add_argument("--out", metavar="RUN", type=Path, help="folder for checkpoints, numbers and pictures")
    length = command.add_mutually_exclusive_group()
    length.add_argument("--images", type=int, metavar="N", help="how many images to see in all")
    length.add_argument("--epochs", type=float, metavar="N", help="the same, as rounds through the data")
    command.add_argument("--init", metavar="WEIGHTS", type=Path, help="first weights, from a checkpoint or backbone")
    command.add_argument("--resume", action="store_true", help="continue the training in RUN")
    command.add_argument("--seed", type=int, help="of weights, order and augmentation (0)")
    command.add_argument("--batch-size", type=int, metavar="N", help="images per step")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any other setting; see below")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.set_defaults(run=_train, parser=command)

    command = commands.add_parser(
        "eval", help="measure average precision", description="Measure average precision on a COCO data set."
    )
    command.add_argument("model", metavar="RUN", help="a run's folder, or a checkpoint")
    command.add_argument("--data", required=True, metavar="shapes|DIR", help="the built-in images, or a COCO folder")
    command.add_argument("--split", default="val", help="which annotations/instances_SPLIT.json (val)")
    command.add_argument("--out", metavar="DIR", type=Path, help="for metrics.json and precision_recall.png (RUN)")
    command.set_defaults(run=_eval, parser=command)

    command = commands.add_parser(
        "detect", help="find objects in pictures", description="Find objects in pictures: a drawn PNG and a JSON each."
    )
    command.add_argument("model", metavar="RUN", help="a run's folder, or a checkpoint")
    command.add_argument("pictures", nargs="+", type=Path, metavar="IMAGE|FOLDER")
    command.add_argument("--out", required=True, metavar="DIR", type=Path, help="where the results go")
    command.add_argument("--threshold", type=float, default=0.3, metavar="SCORE", help="draw what scores more (0.3)")
    command.set_defaults(run=_detect, parser=command)
    return parser


def _train(options: argparse.Namespace) -> None:
    data = _dataset(options.data, "train")
    validate = _dataset(options.data, "val", missing_ok=True)
    if validate is None:
        print(f"{options.data} has no annotations/instances_val.json: AP will not be measured", file=sys.stderr)
    preset = options.preset or ("resnet18" if options.init and options.data != "shapes" else "small")
    recipe = SHAPES if options.data == "shapes" else FINE_TUNE if options.init else SCRATCH
    if options.epochs is not None:
        options.images = max(1, round(options.epochs * len(data)))
    chosen = {"images": options.images, "batch_size": options.batch_size, "seed": options.seed}
    recipe = replace(recipe, **{name: value for name, value in chosen.items() if value is not None})
    config, recipe = _with_settings(PRESETS[preset](data.classes), recipe, options.set)
    model = RetinaNet(config, seed=recipe.seed)
    if options.init and not options.resume:
        print(load_initial(model, options.init))
    training = train(
        model, data, validate=validate, out=options.out, config=recipe, resume=options.resume, quiet=options.quiet
    )
    if training.evaluation is not None:
        print(training.evaluation.table())
    if options.out is not None:
        print(f"\nin {options.out}: metrics.json, curves.png, samples.png, best.safetensors, last.safetensors")


def _eval(options: argparse.Namespace) -> None:
    evaluation = evaluate(load_model(options.model), _dataset(options.data, options.split), progress=True)
    print(evaluation.table())
    run = Path(options.model)
    out = options.out or (run if run.is_dir() else run.parent)
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(evaluation.to_json(), indent=1))
    if curves := evaluation.curves():
        precision_recall(curves, out / "precision_recall.png")
    print(f"\nin {out}: metrics.json" + (", precision_recall.png" if curves else ""))


def _detect(options: argparse.Namespace) -> None:
    model = load_model(options.model)
    options.out.mkdir(parents=True, exist_ok=True)
    names: dict[str, Path] = {}
    for path in _pictures(options.pictures):
        if path.stem in names:
            raise ValueError(f"{names[path.stem]} and {path} would both become {path.stem}.png: detect them one by one")
        names[path.stem] = path
        found = detect(model, path)
        found.draw(threshold=options.threshold).save(options.out / f"{path.stem}.png")
        (options.out / f"{path.stem}.json").write_text(json.dumps(found.to_json(), indent=1))
        shown = int((found.scores > options.threshold).sum())
        print(f"{path}: {shown} drawn (score > {options.threshold:g}), {len(found)} in {path.stem}.json")


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
    if missing_ok and not Path(name).is_file() and not (Path(name) / f"annotations/instances_{split}.json").is_file():
        return None
    return coco(name, split=split)


def _with_settings(
    config: RetinaNetConfig, recipe: TrainConfig, settings: Sequence[str]
) -> tuple[RetinaNetConfig, TrainConfig]:
    """Both with every NAME=VALUE put in; reading them back checks names, types and ranges."""
    tree = to_json(recipe) | {"model": to_json(config)}
    for setting in settings:
        name, equals, text = setting.partition("=")
        *path, last = name.split(".")
        place = tree
        for i, part in enumerate(path):
            if not isinstance(place.get(part), dict):
                raise ValueError(f"--set {setting}: there is no {'.'.join(path[: i + 1])}{_meant(part, place)}")
            place = place[part]
        if not equals or last not in place:
            raise ValueError(f"--set {setting}: expected NAME=VALUE; there is no {name!r}{_meant(last, place)}")
        try:
            place[last] = json.loads(text)
        except json.JSONDecodeError:
            place[last] = text  # a bare word is a string
    model = tree.pop("model")
    return from_json(RetinaNetConfig, model, "model"), from_json(TrainConfig, tree, "training")


def _meant(word: str, place: dict) -> str:
    close = difflib.get_close_matches(word, place, 1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(k for k in place if k != 'kind')}"


if __name__ == "__main__":
    sys.exit(main())
