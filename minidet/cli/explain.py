"""`minidet explain`: a model and a picture in, where every number comes from out."""

from __future__ import annotations

import argparse
from pathlib import Path

from minidet.cli.options import results_folder
from minidet.inspection.explain import explain

EXAMPLES = """\
examples:
  minidet explain runs/bccd photo.jpg
  minidet explain runs/bccd BCCD/images/a.jpg --annotations BCCD/annotations/instances_val.json --out explained

Of every annotated object: its best anchor, whether training makes it positive, low-quality, ignored or none,
and its share of the loss.  Of every detection: the level and the anchor it comes from, its logit, the deltas
that made the box, and how many boxes gave way to it.  NAME_explained.png shows it, NAME_explained.json has it all.
"""


def add(commands) -> None:
    """Add the subcommand to the command's parser."""
    command = commands.add_parser(
        "explain",
        help="show where objects and detections of a picture come from",
        description="Explain what a model makes of one picture.",
        epilog=EXAMPLES,
    )
    command.add_argument("model", metavar="RUN", help="a run's folder, or a checkpoint")
    command.add_argument("picture", metavar="IMAGE", type=Path)
    command.add_argument("--annotations", metavar="JSON", type=Path, help="COCO's, with the objects of the picture")
    command.add_argument("--out", metavar="DIR", type=Path, default=Path("."), help="where the results go (here)")
    command.add_argument("--threshold", type=float, default=0.3, metavar="SCORE", help="show what scores more (0.3)")
    command.set_defaults(run=_explain, parser=command)


def _explain(options: argparse.Namespace) -> None:
    out = results_folder(options.out)
    explanation = explain(options.model, options.picture, annotations=options.annotations)
    print(explanation.table(options.threshold))
    print(f"\nin {out}: {', '.join(path.name for path in explanation.save(out, options.threshold))}")
