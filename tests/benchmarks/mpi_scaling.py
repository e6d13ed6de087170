"""What several processes gain, on as many cores with one thread each: python -m tests.benchmarks.mpi_scaling

The same training, batches of 16 of the built-in images through the small preset, by one process and by several,
which take turns.  Efficiency is the time of a step by one process over that by n processes, divided by n.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import numpy as np

import minidet as md
from minidet.training import SHAPES
from minidet.training.communicator import find_communicator
from tests.processes import MPIEXEC

WARMED_UP = 2  # steps that are not counted
PARTS = ("data_ms", "match_ms", "forward_ms", "backward_ms", "update_ms")


def one_process(steps: int, batch_size: int) -> None:
    """What mpiexec starts: a few steps; the first process prints every counted step's milliseconds by part."""
    data = md.shapes("train")
    model = md.RetinaNet(md.presets.small(data.classes), seed=0)
    images = (WARMED_UP + steps) * batch_size
    config = md.TrainConfig(images=images, batch_size=batch_size, validations=0, augment=SHAPES.augment)
    history = md.train(model, data, config=config, quiet=True).history
    if find_communicator().rank == 0:
        print(json.dumps({part: history[part][WARMED_UP:] for part in PARTS}))


def run(size: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """The steps of so many processes."""
    command = [MPIEXEC, "-n", str(size), sys.executable, "-m", "tests.benchmarks.mpi_scaling", "--inside"]
    command += ["--steps", str(options.steps), "--batch-size", str(options.batch_size)]
    environment = os.environ | {"NUMBA_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    """Measure in turns, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--inside", action="store_true", help="this is one of the processes")
    options = parser.parse_args()
    if options.inside:
        one_process(options.steps, options.batch_size)
        return
    if MPIEXEC is None:
        raise SystemExit("no mpiexec: pip install -e '.[mpi]'")
    steps: dict[int, list[dict]] = {size: [] for size in options.processes}
    for _ in range(options.repeats):
        for size, found in steps.items():
            found.append(run(size, options))
    print(f"milliseconds a step of {options.batch_size} images, one thread a process: median of all steps,")
    print("and of the quickest run's; update includes summing the gradients and waiting for the others")
    print("processes    step   quick  efficiency  " + "".join(f"{part[:-3]:>9}" for part in PARTS))
    alone = None
    for size, found in steps.items():
        totals = [np.sum([one[part] for part in PARTS], axis=0) for one in found]
        quick = min(float(np.median(total)) for total in totals)
        alone = alone or quick * size
        parts = [float(np.median(np.concatenate([one[part] for one in found]))) for part in PARTS]
        print(
            f"{size:9} {np.median(np.concatenate(totals)):7.0f} {quick:7.0f} {alone / (size * quick):11.0%}  "
            + "".join(f"{part:9.1f}" for part in parts)
        )


if __name__ == "__main__":
    main()
