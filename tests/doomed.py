"""The command, in a process that tells its id, and that can be made to kill itself within its N-th checkpoint.

    python doomed.py FOLDER N WHEN train ...

WHEN is the part of the file that is written by then; "synced": all of it, under its temporary name; "named": it
has its name.  N = 0: never.
"""

import os
import signal
import sys
from pathlib import Path

folder, nth, when = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
(folder / os.environ.get("PMI_RANK", "0")).write_text(str(os.getpid()))

from minidet import cli  # noqa: E402  it takes its time, in which the process may be killed too
from minidet.training import checkpoint  # noqa: E402


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Doomed:
    """A file that is written in part."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content: bytes) -> None:
        self.file.write(content[: int(len(content) * float(when))])
        self.file.flush()
        die()


class Os:
    """`os`, but for the moment around renaming."""

    def __getattr__(self, name):
        return getattr(os, name)

    def replace(self, old, new):
        if nth == count and when == "synced":
            die()
        os.replace(old, new)
        if nth == count and when == "named":
            die()


def counting(path, mode):
    global count
    count += mode == "wb"
    file = open(path, mode)
    return Doomed(file) if (mode, count) == ("wb", nth) and when not in ("synced", "named") else file


count = 0
checkpoint.open, checkpoint.os = counting, Os()
sys.exit(cli.main(sys.argv[4:]))
