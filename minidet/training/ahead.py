"""On a first run, another process compiles what the way back needs while this one draws images and goes forward.

    python -m minidet.training.ahead < model.json

Numba compiles one function at a time, however many cores there are.  But whatever a process has compiled it keeps on
disk, and there another finds it that needs it later.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from minidet.autograd import Tensor
from minidet.kernels import only
from minidet.models import RetinaNet, RetinaNetConfig
from minidet.ops import concat
from minidet.training.settings import from_json, to_json

COMMAND = (sys.executable, "-m", "minidet.training.ahead")

IMAGES, SIDE = 16, 128
"""Of what the helper goes back through: enough for the kernels that larger images and batches run."""


@contextmanager
def compiling_ahead(config: RetinaNetConfig) -> Iterator[None]:
    """Inside, another process compiles backward kernels for such a network; afterwards it is at an end.

    Should it fail, this one compiles everything by itself as it would have, and a warning says why.
    """
    with tempfile.TemporaryFile() as model, tempfile.TemporaryFile() as messages:
        model.write(json.dumps(to_json(config)).encode())
        model.seek(0)
        # A group of its own: Ctrl-C is for the training to answer.
        helper = subprocess.Popen(COMMAND, stdin=model, stdout=messages, stderr=messages, start_new_session=True)
        try:
            yield
        finally:
            failed = helper.poll()
            helper.kill()
            helper.wait()
            if failed:
                messages.seek(0)
                *_, last = [b"no message", *messages.read().splitlines()]
                warnings.warn(f"compiling ahead failed: {last.decode(errors='replace')}", RuntimeWarning, stacklevel=3)


def go_back(config: RetinaNetConfig) -> None:
    """Run every backward kernel of the network, after a way forward that compiles nothing: by definitions."""
    model, rng = RetinaNet(config, seed=0, xp=np), np.random.default_rng(0)
    model.train()
    with only("textbook"):
        outputs = concat(model(Tensor(rng.random((IMAGES, SIDE, SIDE, 3), np.float32))), axis=2)
    outputs.backward(rng.random(outputs.shape, np.float32))


if __name__ == "__main__":
    go_back(from_json(RetinaNetConfig, json.load(sys.stdin)))
