"""`minidet doctor`: data and settings in, before hours are spent; what is wrong out, with the cure."""

from __future__ import annotations

import argparse
from pathlib import Path

from minidet.cli.options import dataset_named, results_folder
from minidet.cli.train import add_settings, settings_of
from minidet.inspection.doctor import doctor

EXAMPLES = """\
examples:
  minidet doctor --data BCCD
  minidet doctor --data BCCD --init resnet18.npz --out checked
  minidet doctor --data BCCD --preset paper --images 90000 --quick
  minidet doctor --data shapes --set model.preprocess.min_size=256 --set model.preprocess.max_size=512

Takes the settings of `minidet train`, and looks at all of annotations and pictures, at what the anchors can
overlap, at the first loss, at whether two images can be learned by heart, and at what a step costs here: time
of the whole training, and its peak memory.

Every finding comes with its places, its most likely cause and a fix.  Status for scripts: 0 go, 1 warnings,
2 must not train (or the command could not run).  DIR receives doctor.png, doctor.txt and doctor.json.
"""


def add(commands) -> None:
    """Add the subcommand to the command's parser."""
    command = commands.add_parser(
        "doctor",
        help="check data and settings, predict time and memory",
        description="Check data, settings and this machine before training.",
        epilog=EXAMPLES,
    )
    add_settings(command)
    command.add_argument("--split", default="train", help="which instances_SPLIT.json is trained on (train)")
    command.add_argument("--out", metavar="DIR", type=Path, help="for doctor.png, doctor.txt and doctor.json")
    command.add_argument("--quick", action="store_true", help="open 300 pictures of each split, try for 15 seconds")
    command.set_defaults(run=_doctor, parser=command, resume=False)


def _doctor(options: argparse.Namespace) -> int:
    shapes = options.data == "shapes"
    data = dataset_named("shapes", options.split) if shapes else options.data
    diagnosis = doctor(
        data,
        split=options.split,
        validate=dataset_named("shapes", "val") if shapes else "val",
        settings=lambda classes, images: settings_of(options, Path(), classes, images),
        init=options.init,
        quick=options.quick,
        progress=True,
    )
    print(diagnosis.table())
    if options.out is not None:
        diagnosis.save(results_folder(options.out))
        print(f"\nin {options.out}: doctor.png, doctor.txt, doctor.json")
    return diagnosis.status
