"""The memory of this process and of the machine, in bytes, as far as the system tells."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path

STATUS, RESET, MACHINE = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/meminfo")
CONTAINER = Path("/sys/fs/cgroup/memory.max")


def resident() -> int:
    """What the process has now."""
    return _line(STATUS, "VmRSS") or _highest()


def settle() -> int:
    """What the process has once memory that was freed is given back, where the C library can do that."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    return resident()


def peak() -> int:
    """The most it had since `reset_peak`; where there is no /proc, since it began."""
    return _line(STATUS, "VmHWM") or _highest()


def reset_peak() -> None:
    """Let `peak` count from now on, where there is a /proc."""
    if RESET.exists():
        RESET.write_text("5")


def available() -> int:
    """What the process has and can still have, the limit of a container included."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = _line(MACHINE, "MemAvailable")
    limit = CONTAINER.read_text().strip() if CONTAINER.exists() else ""
    return min(free + resident() if free else machine, int(limit) if limit.isdecimal() else machine)


def _line(file: Path, name: str) -> int:
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _highest() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
