"""Starting several processes, where mpiexec and mpi4py are installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")

MPI = MPIEXEC is not None and importlib.util.find_spec("mpi4py") is not None
mpi = pytest.mark.skipif(not MPI, reason="needs mpiexec and mpi4py: pip install -e '.[mpi]'")


def start(size: int, *command, **kwargs) -> subprocess.Popen:
    """`mpiexec -n size python COMMAND`, one thread a process unless the environment says otherwise."""
    environment = {"NUMBA_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | os.environ | kwargs.pop("env", {})
    return subprocess.Popen(
        [MPIEXEC, "-n", str(size), sys.executable, *map(str, command)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **kwargs,
    )  # fmt: skip
