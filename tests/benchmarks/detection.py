"""Focal loss, suppression and matching beside NumPy, torch and pycocotools.

    python -m tests.benchmarks.detection [--json FILE] [--quick]

Every library is a process of its own; they take turns as in against_torch.py.  The results are compared before
anything is timed: indices must be equal, numbers to rounding.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from tests.benchmarks.report import heading
from tests.benchmarks.turns import Worker, disturbance, milliseconds, take_turns

TASKS = {
    "focal": ("focal loss, forward and backward, 49,000 x 80", ("numpy focal", "torch focal")),
    "nms uniform": (
        "NMS per class, 5,000 boxes everywhere",
        ("numpy nms uniform", "numpy matrix uniform", "torch nms uniform"),
    ),
    "nms clustered": (
        "NMS per class, 5,000 boxes in clusters",
        ("numpy nms clustered", "numpy matrix clustered", "torch nms clustered"),
    ),
    "match": ("matching, 100,000 anchors x 50 objects", ("numpy match", "torch match", "pycocotools match")),
}
"""What minidet does -> (in words, what the others do)."""


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--quick", action="store_true", help="few windows: to see that it works")
    options = parser.parse_args()
    print(heading("Operators"))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for what in TASKS:
            rows.append(measure(what, 2 if options.quick else 9, Path(folder)))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def measure(what: str, rounds: int, folder: Path) -> dict:
    """One task: who needs how long, printed and returned."""
    words, others = TASKS[what]
    workers = []
    for side in (f"ours {what}", *others):
        worker = Worker("operators", side)
        library, _, task = side.partition(" ")
        worker.ask("build", what=library, task=task)
        worker.ask("results", file=str(folder / f"{len(workers)}.npz"))
        workers.append(worker)
    error = max(agreement(folder / "0.npz", folder / f"{n}.npz") for n in range(1, len(workers)))
    for worker in workers:
        worker.warm_up()
    take_turns(workers, rounds, what)
    ours, *theirs = map(milliseconds, workers)
    print(f"{words}: {ours:.2f} ms; {disturbance(workers)}; results differ by {error:.0e}")
    for side, ms in zip(others, theirs, strict=True):
        print(f"    {side:24}{ms:9.2f} ms   ours / theirs {ours / ms:.4f}")
    for worker in workers:
        worker.close()
    return {"name": what, "ours_ms": ours, **dict(zip(others, theirs, strict=True)), "max_error": error}


def agreement(ours: Path, theirs: Path) -> float:
    """The largest relative error of any number; indices and kept boxes must be the same."""
    a, b = np.load(ours), np.load(theirs)
    assert set(a) == set(b)
    worst = 0.0
    for name in a:
        if a[name].dtype.kind == "i":
            if a[name].shape != b[name].shape or np.mean(a[name] != b[name]) > 1e-3:
                raise RuntimeError(f"{theirs.stem}: {name} is something else: {a[name]} and {b[name]}")
        else:
            worst = max(worst, float(np.abs(a[name] - b[name]).max() / np.abs(b[name]).max()))
    return worst


if __name__ == "__main__":
    main()
