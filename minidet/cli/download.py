"""`minidet download`: a data set from the network to a folder, gone on with where it was cut."""

from __future__ import annotations

import argparse
from pathlib import Path

from minidet.cli.options import results_folder
from minidet.data.download import download_bccd, download_coco

EXAMPLES = """\
examples:
  minidet download bccd
  minidet download coco --split val --out data/coco
  minidet download coco --split train --out data/coco

COCO 2017: val takes 2 GB of disk in passing, 1 GB in the end; train 40 GB and 20 GB.  The same command again
goes on where the last one stopped, and does nothing where all is there.  DIR/downloads.json receives size and
sha256 of what was got; COCO's are compared with known ones, BCCD's archive has none to compare with.
"""


def add(commands) -> None:
    """Add the subcommand to the command's parser."""
    command = commands.add_parser(
        "download",
        help="get COCO or BCCD from the network",
        description="Get a data set from the network: the only command that uses it.",
        epilog=EXAMPLES,
    )
    command.add_argument("data", choices=("coco", "bccd"), help="which data set")
    command.add_argument("--split", choices=("val", "train"), default="val", help="of COCO (val); BCCD comes whole")
    command.add_argument("--out", metavar="DIR", type=Path, help="folder for the data (coco or BCCD)")
    command.add_argument("--keep", action="store_true", help="keep the archives")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.set_defaults(run=_download, parser=command)


def _download(options: argparse.Namespace) -> None:
    out = results_folder(options.out or Path("BCCD" if options.data == "bccd" else "coco"))
    how = {"keep": options.keep, "progress": not options.quiet}
    done = download_bccd(out, **how) if options.data == "bccd" else download_coco(options.split, out, **how)
    print("\n".join(done))
