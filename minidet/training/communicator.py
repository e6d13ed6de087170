"""Processes that train one model together: who this one is, and sums over all of them.

`mpiexec -n 2 minidet train ...` starts the same program twice; the launcher's variables say so
(minidet/launcher.py).  Without them nothing here imports mpi4py.
"""

from __future__ import annotations

import io
import os
import sys
import time
from functools import lru_cache
from typing import Protocol

import numpy as np

from minidet import backend
from minidet.backend import Array
from minidet.launcher import SIZES, told

Arrays = dict[str, np.ndarray]

IDENTITY = 128
"""Bytes by which processes that use NCCL together know each other (NCCL_UNIQUE_ID_BYTES of nccl.h)."""


class Communicator(Protocol):
    """This process, `rank`, among `size` of them; but for `fail`, all have to call each method, in the same order."""

    rank: int
    size: int

    def all_sum(self, values: Array) -> None:
        """Replace `values` by their sum over all processes, bitwise the same in each."""

    def all_max(self, values: np.ndarray) -> None:
        """Replace `values` by their maximum over all processes."""

    def broadcast(self, values: np.ndarray) -> None:
        """Replace `values` by those of process 0."""

    def gather(self, arrays: Arrays) -> list[Arrays] | None:
        """Everybody's arrays, by name, in order of rank; in processes other than 0, None."""

    def fail(self, message: str, status: int) -> int:
        """Say why this process ends, and end all others too; a process alone gets its exit status back."""


class Alone:
    """One process: every sum is there already."""

    rank, size = 0, 1

    def all_sum(self, values: Array) -> None:
        """Nothing to add."""

    def all_max(self, values: np.ndarray) -> None:
        """Nothing to compare with."""

    def broadcast(self, values: np.ndarray) -> None:
        """Nobody to tell."""

    def gather(self, arrays: Arrays) -> list[Arrays]:
        """The arrays of the one."""
        return [arrays]

    def fail(self, message: str, status: int) -> int:
        """Say why, and leave ending to the caller."""
        print(message, file=sys.stderr)
        return status


class Mpi:
    """The processes of one mpiexec.

    Arrays on a GPU are summed by NCCL (not yet run on GPUs), everything else by MPI.  An exception that nobody
    catches ends all processes: mpi4py alone would leave the others waiting for this one forever.
    """

    def __init__(self):
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py without an MPI library
            raise RuntimeError(
                f"mpiexec started this process, but mpi4py cannot be used ({error}): pip install 'minidet[mpi]', "
                "or run without mpiexec"
            ) from error
        self._mpi, self._world, self._sum_over_gpus = MPI, MPI.COMM_WORLD, None
        self.rank, self.size = self._world.rank, self._world.size
        expected = told(SIZES, os.environ, self.size)
        if self.size != expected:
            raise RuntimeError(
                f"mpiexec started {expected} processes, but mpi4py sees {self.size}: it uses another MPI library "
                f"({MPI.Get_library_version().splitlines()[0]}).  Start with the mpiexec of that library"
            )
        self._show, sys.excepthook = sys.excepthook, self._uncaught

    def all_sum(self, values: Array) -> None:
        """Replace `values` by their sum over all processes, bitwise the same in each."""
        if backend.library(values) != "cupy":
            self._world.Allreduce(self._mpi.IN_PLACE, values)
            return
        if self._sum_over_gpus is None:
            identity = bytearray(backend.nccl_identity() if self.rank == 0 else IDENTITY)
            self._world.Bcast(identity)
            self._sum_over_gpus = backend.sums_over_gpus(self.size, self.rank, bytes(identity))
        self._sum_over_gpus(values)

    def all_max(self, values: np.ndarray) -> None:
        """Replace `values` by their maximum over all processes."""
        self._world.Allreduce(self._mpi.IN_PLACE, values, self._mpi.MAX)

    def broadcast(self, values: np.ndarray) -> None:
        """Replace `values` by those of process 0."""
        self._world.Bcast(values)

    def gather(self, arrays: Arrays) -> list[Arrays] | None:
        """Everybody's arrays, by name, in order of rank; in processes other than 0, None."""
        packed = io.BytesIO()
        np.savez(packed, **arrays)
        mine = np.frombuffer(packed.getbuffer(), np.uint8)
        lengths = np.empty(self.size, np.int64)
        self._world.Allgather(np.array([mine.size]), lengths)
        everything = np.empty(lengths.sum() if self.rank == 0 else 0, np.uint8)
        self._world.Gatherv(mine, (everything, lengths))
        if self.rank:
            return None
        return [dict(np.load(io.BytesIO(one))) for one in np.split(everything, np.cumsum(lengths)[:-1])]

    def fail(self, message: str, status: int) -> int:
        """Say why this process ends, and end all others too."""
        time.sleep(self.rank and 0.5)  # what goes wrong in all of them is told once, by process 0
        print(f"{message}\n(process {self.rank} of {self.size}; it ends the others)", file=sys.stderr, flush=True)
        self._world.Abort(status)
        return status

    def _uncaught(self, kind: type[BaseException], error: BaseException, trace) -> None:
        time.sleep(self.rank and 0.5)
        self._show(kind, error, trace)
        self.fail(f"minidet: {kind.__name__}, see above", 1)


@lru_cache(maxsize=1)
def find_communicator() -> Communicator:
    """The processes that mpiexec started, or this one alone.

    Raises:
        RuntimeError: if mpiexec started several, but mpi4py is not installed or belongs to another MPI.
    """
    return Mpi() if told(SIZES, os.environ, 1) > 1 else Alone()
