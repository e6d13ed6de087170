"""`minidet eval`: a model and a data set in, average precision out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from minidet.cli.options import dataset_named, results_folder
from minidet.kernels.precision import PRECISIONS
from minidet.plots import precision_recall
from minidet.training import load_model
from minidet.training.communicator import find_communicator
from minidet.training.together import evaluate_together

EXAMPLES = """\
examples:
  minidet eval runs/shapes --data shapes
  minidet eval runs/bccd --data BCCD --split test --out test_numbers
  minidet eval runs/bccd --data BCCD --check
"""


def add(commands) -> None:
    """Add the subcommand to the command's parser."""
    command = commands.add_parser(
        "eval",
        help="measure average precision",
        description="Measure average precision on a COCO data set.",
        epilog=EXAMPLES,
    )
    command.add_argument("model", metavar="RUN", help="a run's folder, or a checkpoint")
    command.add_argument("--data", required=True, metavar="shapes|DIR", help="the built-in images, or a COCO folder")
    command.add_argument("--precision", choices=PRECISIONS, default="float32", help="to compute in (float32)")
    command.add_argument("--split", default="val", help="which annotations/instances_SPLIT.json (val)")
    command.add_argument("--out", metavar="DIR", type=Path, help="for metrics.json and precision_recall.png (RUN)")
    command.add_argument("--check", action="store_true", help="let pycocotools judge the same detections, and compare")
    command.set_defaults(run=_eval, parser=command)


def _eval(options: argparse.Namespace) -> None:
    run = Path(options.model)
    out = results_folder(options.out or (run if run.is_dir() else run.parent))
    data = dataset_named(options.data, options.split)
    model = load_model(run, precision=options.precision)
    evaluation = evaluate_together(find_communicator(), model, data, progress=True, check=options.check)
    if evaluation is None:  # the first process has it
        return
    print(evaluation.table())
    if options.check:
        print(f"\npycocotools on the same detections:\n{evaluation.comparison()}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(evaluation.to_json(), indent=1))
    if curves := evaluation.curves():
        precision_recall(curves, out / "precision_recall.png")
    print(f"\nin {out}: metrics.json" + (", precision_recall.png" if curves else ""))
