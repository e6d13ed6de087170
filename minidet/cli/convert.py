"""`minidet convert`: weights of other systems in, a checkpoint out; or what was trained here, for PyTorch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from minidet.models.presets import PRESETS
from minidet.training.convert import convert, export

EXAMPLES = """\
examples:
  minidet convert retinanet_resnet50_fpn_coco-eeacb38b.pth --out coco.safetensors
  minidet convert model_final_bfca0b.pkl --out coco.safetensors
  minidet convert resnet50-11ad3fa6.pth --out start.safetensors
  minidet convert mine.pth --classes names.txt --out mine.safetensors
  minidet convert runs/bccd --to torchvision --out bccd.pth

Read without PyTorch: .pth (both containers), .pkl, .safetensors, .npz, of torchvision's RetinaNet v1 and v2,
detectron2's RetinaNet, and the ResNets of torchvision and timm.  The result is what `minidet detect`, `eval`
and `train --init` take.  Nothing in a file is executed: one that asks for more than tensors is refused.
"""


def add(commands) -> None:
    """Add the subcommand to the command's parser."""
    command = commands.add_parser(
        "convert",
        help="take over weights from PyTorch, or give them back",
        description="Turn weights of other systems into a checkpoint, or a run into torchvision's names.",
        epilog=EXAMPLES,
    )
    command.add_argument("source", metavar="FILE|RUN", type=Path, help="foreign weights; with --to a run or checkpoint")
    command.add_argument("--out", required=True, metavar="FILE", type=Path, help="the result, its suffix its kind")
    command.add_argument("--preset", choices=PRESETS, help="the network, where it is not recognised")
    command.add_argument("--classes", metavar="FILE", type=Path, help="names, one a line, or json: a list or COCO's")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="of the model, as in train")
    command.add_argument("--to", choices=["torchvision"], help="the other way: write these names (.pth, .npz too)")
    command.set_defaults(run=_convert, parser=command)


def _convert(options: argparse.Namespace) -> None:
    if options.to:
        if options.preset or options.classes or options.set:
            raise ValueError("--to writes a model as it is: --preset, --classes and --set are for the way in")
        done = export(options.source, options.out)
    else:
        names = None if options.classes is None else names_in(options.classes)
        done = convert(options.source, options.out, preset=options.preset, classes=names, settings=options.set)
    print(f"{done.table}\nin {done.path}")


def names_in(path: Path) -> list[str]:
    """The class names in a file: a line each, a json list, or the categories of COCO's json in order of their ids."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".json":
            return [line.strip() for line in text.splitlines() if line.strip()]
        names = json.loads(text)
        if isinstance(names, dict):
            names = [entry["name"] for entry in sorted(names["categories"], key=lambda entry: entry["id"])]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"--classes {path}: cannot be read: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"--classes {path}: expected a list of names, or COCO's categories")
    return names
