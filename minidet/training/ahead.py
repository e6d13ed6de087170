"""On a first run, another process compiles what the way back needs while this one draws images and goes forward.

Numba compiles one function at a time, however many cores there are.  But whatever a process has compiled it keeps on
disk, and there another finds it that needs it later.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numba
import numpy as np

from minidet.autograd import Tensor
from minidet.kernels import only
from minidet.models import RetinaNet, RetinaNetConfig
from minidet.ops import concat
from minidet.training.settings import from_json, to_json

COMMAND = ("-P", "-c", "from minidet.training.ahead import main; main()")
"""Of Python, which is given this process's search path: no file in the current folder may come in between."""

IMAGES, SIDE = 16, 128
"""Of what the helper goes back through: enough for the kernels that larger images and batches run."""


@contextmanager
def compiling_ahead(config: RetinaNetConfig) -> Iterator[subprocess.Popen | None]:
    """Inside, another process compiles backward kernels for such a network; afterwards it is at an end.

    Should it not start, or fail, this one compiles everything by itself as it would have, and a warning says why.
    """
    with tempfile.TemporaryFile() as model, tempfile.TemporaryFile() as messages:
        model.write(json.dumps(to_json(config)).encode())
        model.seek(0)
        helper = _start(model, messages)
        try:
            yield helper
        finally:
            failed = helper is not None and helper.poll()
            if helper is not None:
                helper.kill()
                helper.wait()
            if failed:
                messages.seek(0)
                *_, last = [f"it ended with {failed}".encode(), *messages.read().splitlines()]
                _warn(last.decode(errors="replace"))


def _start(model, messages) -> subprocess.Popen | None:
    """The helper, in a group of its own, for Ctrl-C is the training's to answer."""
    if not sys.executable or getattr(sys, "frozen", False):  # that is no Python which could be asked
        return None
    places = {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    places["NUMBA_CACHE_DIR"] = numba.config.CACHE_DIR
    try:
        return subprocess.Popen(
            (sys.executable, *COMMAND), stdin=model, stdout=messages, stderr=messages, env=os.environ | places,
            start_new_session=True, creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )  # fmt: skip
    except OSError as error:
        _warn(str(error))
        return None


def _warn(why: str) -> None:
    warnings.warn(f"compiling ahead failed: {why}", RuntimeWarning, stacklevel=4)


def main() -> None:
    """What the helper does: it runs every backward kernel of the network that it is told, after a way forward that
    compiles nothing, by definitions.
    """
    config = from_json(RetinaNetConfig, json.load(sys.stdin))
    model, rng = RetinaNet(config, seed=0, xp=np), np.random.default_rng(0)
    model.train()
    with only("textbook"):
        outputs = concat(model(Tensor(rng.random((IMAGES, SIDE, SIDE, 3), np.float32))), axis=2)
    outputs.backward(rng.random(outputs.shape, np.float32))
