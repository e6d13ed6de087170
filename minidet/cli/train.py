"""`minidet train`: a data set and settings in, a run's folder out."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import wrap

from minidet.cli.options import dataset_named, results_folder
from minidet.models import RetinaNet, RetinaNetConfig
from minidet.models.presets import PRESETS
from minidet.training import FINE_TUNE, RECIPES, SCRATCH, SHAPES, TrainConfig, read_checkpoint, train
from minidet.training.checkpoint import BEST, LAST, find_checkpoint, is_checkpoint
from minidet.training.settings import assign, from_json, to_json
from minidet.weights import config_for, find_weights, load_initial

RESULTS = ("metrics.json", "metrics.csv", "curves.png", "samples.png", BEST, LAST)

EXAMPLES = """\
examples:
  minidet train --data shapes
  minidet train --data BCCD --epochs 16 --out runs/bccd
  minidet train --data BCCD --out runs/bccd --resume
  minidet train --data BCCD --init resnet18.npz --images 5200 --out runs/fine
  minidet train --data BCCD --init runs/shapes --out runs/bccd2
  minidet train --data BCCD --init retinanet_resnet50_fpn_coco.pth --out runs/bccd3
  minidet train --data COCO --recipe detectron2_r50_1x --init R-50.safetensors --out runs/coco

DIR holds annotations/instances_train.json and, for validation, instances_val.json, with the pictures in
images/, train2017/ or beside them: what COCO and most labelling tools export.

RUN receives last.safetensors, best.safetensors, metrics.csv (a row per step), metrics.json, curves.png and
samples.png.  Ctrl-C finishes the step and saves; --resume takes every setting from RUN, so none has to be
given again.

A recipe is a model and a training that others have published numbers for, on COCO (minidet/training/recipes.py):
RECIPE_NAMES.
--images and --epochs stretch or shrink its schedule.

Any other setting can be given as --set NAME=VALUE, with the names that RUN's checkpoint records:
  --set lr=0.002 --set cosine=true          of the training (minidet/training/config.py)
  --set model.head.depth=4                  of the model (minidet/models/retinanet.py, presets.py)
  --set model.preprocess.min_size=480 --set model.preprocess.max_size=640
""".replace("RECIPE_NAMES", "\n".join(wrap(", ".join(RECIPES), 112)))


def add(commands) -> None:
    """Add the subcommand to the command's parser."""
    command = commands.add_parser("train", help="train a detector", description="Train a detector.", epilog=EXAMPLES)
    add_settings(command)
    command.add_argument("--out", metavar="RUN", type=Path, help="folder for all results (runs/ and the data's name)")
    command.add_argument("--copy-classes", action="store_true", help="--init: equally named classes go on from there")
    command.add_argument("--resume", action="store_true", help="continue the training in RUN")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.set_defaults(run=_train, parser=command)


def add_settings(command) -> None:
    """Add the arguments that `settings_of` reads: what to train on, and how."""
    command.add_argument("--data", required=True, metavar="shapes|DIR", help="the built-in images, or a COCO folder")
    network = command.add_mutually_exclusive_group()
    network.add_argument("--recipe", choices=RECIPES, metavar="NAME", help="model and training of a paper, see below")
    network.add_argument("--preset", choices=PRESETS, help="the network (small, or what --init was made for)")
    length = command.add_mutually_exclusive_group()
    length.add_argument("--images", type=int, metavar="N", help="how many images to see in all")
    length.add_argument("--epochs", type=float, metavar="N", help="the same, as rounds through the data")
    command.add_argument("--init", metavar="WEIGHTS", type=Path, help="first weights: a run, or what convert takes")
    command.add_argument("--seed", type=int, metavar="N", help="of weights, order and augmentation (0)")
    command.add_argument("--batch-size", type=int, metavar="N", help="images per step")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="other settings, see below")


def _train(options: argparse.Namespace) -> None:
    out = results_folder(options.out or Path("runs") / Path(options.data).resolve().stem)
    data = dataset_named(options.data, "train")
    validate = dataset_named(options.data, "val", missing_ok=True)
    if validate is None:
        print(f"{options.data} has no annotations/instances_val.json: AP will not be measured", file=sys.stderr)
    config, recipe = settings_of(options, out, data.classes, len(data))
    model = RetinaNet(config, seed=recipe.seed)
    if options.recipe and not (options.init or options.resume):
        initial = RECIPES[options.recipe].initial
        print(f"{options.recipe} starts from {initial} (--init FILE), this training from random ones", file=sys.stderr)
    if options.init and options.resume:
        raise ValueError("--init gives first weights, --resume continues from a run's last ones: choose one")
    if options.copy_classes and not options.init:
        raise ValueError("--copy-classes says what to take from the weights of --init, which is not given")
    if options.init:
        init = find_checkpoint(options.init) if options.init.is_dir() else options.init
        print(load_initial(model, init, copy_classes=options.copy_classes).table())
    training = train(model, data, validate=validate, out=out, config=recipe, resume=options.resume, quiet=options.quiet)
    if training.evaluation is not None:
        print(training.evaluation.table())
    print(f"\nin {out}: {', '.join(name for name in RESULTS if (out / name).exists())}")


def settings_of(
    options: argparse.Namespace, out: Path, classes: tuple[str, ...], images: int
) -> tuple[RetinaNetConfig, TrainConfig]:
    """Model and recipe, as flags, weights and run ask for them, for data of so many images."""
    config, recipe = _settings(options, out, classes)
    flags = _flags(options, images)
    recipe = recipe.stretched(flags.pop("images", recipe.images))
    return _with(options.set, config, replace(recipe, **flags))


def _settings(options: argparse.Namespace, out: Path, classes: tuple[str, ...]) -> tuple[RetinaNetConfig, TrainConfig]:
    """What to start from: a named recipe, the settings of the run that is continued, or a preset with ours."""
    init = options.init
    if options.recipe:
        return RECIPES[options.recipe].model(classes), RECIPES[options.recipe].training
    recipe = SHAPES if options.data == "shapes" else FINE_TUNE if init else SCRATCH
    if options.resume:
        saved = read_checkpoint(out / LAST)
        config = from_json(RetinaNetConfig, saved.model, "model")
        recipe = from_json(TrainConfig, saved.training.get("config", {}), "training")
    elif init and is_checkpoint(init):
        config = replace(from_json(RetinaNetConfig, read_checkpoint(init).model, "model"), classes=classes)
    elif init and not options.preset:
        found = find_weights(init)
        config = replace(config_for(found), classes=classes) if found.foreign else PRESETS["resnet18"](classes)
    else:
        config = PRESETS["small"](classes)
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


def _with(settings: Sequence[str], config: RetinaNetConfig, recipe: TrainConfig) -> tuple[RetinaNetConfig, TrainConfig]:
    """Both with every NAME=VALUE put in; reading them back checks types and ranges."""
    tree = to_json(recipe) | {"model": to_json(config)}
    for setting in settings:
        try:
            assign(tree, setting)
        except ValueError as error:
            raise ValueError(f"--set {setting}: {error}") from error
    model = tree.pop("model")
    return from_json(RetinaNetConfig, model, "model"), from_json(TrainConfig, tree, "training")
