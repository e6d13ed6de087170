"""The command: its parser, and what an error looks like from outside."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

from minidet.cli import convert, detect, doctor, download, eval, explain, train
from minidet.training import NonFiniteError
from minidet.training.communicator import find_communicator
from minidet.training.interrupt import Stopped

SUBCOMMANDS = (train, eval, detect, convert, download, doctor, explain)

EXAMPLES = """\
examples:
  minidet train --data shapes --out runs/shapes          learn on 28,800 of the built-in images
  minidet train --data BCCD --epochs 16 --out runs/bccd  a folder with annotations/instances_{train,val}.json
  minidet train --data BCCD --out runs/bccd --resume     go on after Ctrl-C, exactly
  minidet doctor --data BCCD                             what is wrong, and what training will cost, beforehand
  minidet eval runs/bccd --data BCCD --split test        COCO's twelve numbers and AP per class
  minidet detect runs/bccd photo.jpg --out found         found/photo.png and found/photo.json
  minidet convert weights.pth --out coco.safetensors     start from what torchvision or detectron2 trained
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
    """Run the command; returns its exit status: 0, 2 after a user's mistake, 130 after Ctrl-C, or what it says.

    Of the processes that mpiexec started the first one speaks; an error in any of them ends all.
    """
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:  # the subcommand's parser knows the options that could have been meant
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        communicator = find_communicator()
    except RuntimeError as error:
        print(f"minidet: {error}", file=sys.stderr)
        return 2
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if communicator.rank else sys.stdout):
            return options.run(options) or 0
    except Stopped as stop:
        if communicator.rank == 0:
            print(f"minidet: {stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        return communicator.fail("minidet: interrupted", 130)
    except MemoryError as error:
        return communicator.fail(
            f"minidet: out of memory: {str(error) or 'no details'}; try a smaller --batch-size", 2
        )
    except (ValueError, OSError, NonFiniteError, RuntimeError) as error:
        return communicator.fail(f"minidet: {error}", 2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="minidet", description="RetinaNet on NumPy: train, evaluate, detect.", epilog=EXAMPLES)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    for subcommand in SUBCOMMANDS:
        subcommand.add(commands)
    return parser
