"""What every table has: the machine above it, rows for the JSON, the difference of two sides."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.benchmarks.turns import THREADS


def cpu_model() -> str:
    """The processor, as the kernel calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def heading(title: str) -> str:
    """What every number below holds for."""
    return f"\n{title}: {cpu_model()}; eager, float32, {THREADS} threads"


def row_of(name: str, ours: float, torch: float, error: float | None, ours_mib=None, torch_mib=None) -> dict:
    """A row as the JSON has it; times in milliseconds."""
    return {
        "name": name,
        "ours_ms": ours,
        "torch_ms": torch,
        "ratio": ours / torch,
        "max_error": error,
        "ours_peak_mib": ours_mib,
        "torch_peak_mib": torch_mib,
    }


def difference(ours: Path, torch: Path, *, step: bool) -> float:
    """The largest relative difference of any array: of the largest values, or in a step of the Euclidean norms.

    A rectifier's slope jumps at 0.  A unit that rounding pushes across changes single elements of gradients by
    thousandths, in torch against its own float64 just as here, and says nothing about whoever computed them.
    """
    a, b = np.load(ours), np.load(torch)
    if set(a) != set(b):
        raise RuntimeError(f"the sides disagree about what there is: {sorted(set(a) ^ set(b))}")
    size = np.linalg.norm if step else np.max
    return max(float(size(np.abs(a[name] - b[name]).ravel()) / size(np.abs(b[name]).ravel())) for name in a)
