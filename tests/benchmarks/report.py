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


def row_of(name: str, ours: float, torch: float, error: float, ours_mib=None, torch_mib=None) -> dict:
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


def difference(ours: Path, torch: Path) -> float:
    """The largest error of any array, relative to the array's largest value: outputs, or losses and gradients."""
    a, b = np.load(ours), np.load(torch)
    if set(a) != set(b):
        raise RuntimeError(f"the sides disagree about what there is: {sorted(set(a) ^ set(b))}")
    return max(float(np.abs(a[name] - b[name]).max() / np.abs(b[name]).max()) for name in a)
