"""`minidet detect`: pictures in, drawn pictures and boxes out."""

from __future__ import annotations

import argparse
from pathlib import Path

from minidet.cli.options import pictures_in, results_folder
from minidet.detect import detect
from minidet.kernels.precision import PRECISIONS
from minidet.training import load_model

EXAMPLES = """\
examples:
  minidet detect runs/bccd photo.jpg --out found
  minidet detect runs/bccd photos/ more/photo.png --out found --threshold 0.5

Every NAME.jpg gives NAME.png, with what scores more than the threshold drawn, and NAME.json, with everything
that was found: boxes x1, y1, x2, y2 in the picture's own pixels.
"""


def add(commands) -> None:
    """Add the subcommand to the command's parser."""
    command = commands.add_parser(
        "detect",
        help="find objects in pictures",
        description="Find objects in pictures: a drawn PNG and a JSON each.",
        epilog=EXAMPLES,
    )
    command.add_argument("model", metavar="RUN", help="a run's folder, or a checkpoint")
    command.add_argument("pictures", nargs="+", type=Path, metavar="IMAGE|FOLDER")
    command.add_argument("--out", required=True, metavar="DIR", type=Path, help="where the results go")
    command.add_argument("--precision", choices=PRECISIONS, default="float32", help="to compute in (float32)")
    command.add_argument("--threshold", type=float, default=0.3, metavar="SCORE", help="draw what scores more (0.3)")
    command.set_defaults(run=_detect, parser=command)


def _detect(options: argparse.Namespace) -> None:
    if not 0 <= options.threshold <= 1:
        raise ValueError(f"--threshold is a score from 0 to 1, got {options.threshold:g}")
    results_folder(options.out)
    model, pictures = load_model(options.model, precision=options.precision), pictures_in(options.pictures)
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
