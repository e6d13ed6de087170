"""What mpiexec tells a process it starts, and that process's part of the machine: its cores, and one GPU.

`minidet` imports this file first, since thread pools read their sizes when they are loaded.  Without a launcher
it changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# MPICH and Intel MPI; Open MPI.  docs.open-mpi.org, "Environment variables set for MPI applications"; MPICH's own
# are what its mpiexec was seen to set.
SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
LOCAL_SIZES = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE")
LOCAL_RANKS = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK")

POOLS = ("NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def told(names: tuple[str, ...], environment: MutableMapping[str, str], default: int) -> int:
    """The number that the launcher put into one of the variables, or the default."""
    return int(next((environment[name] for name in names if name in environment), default))


def share_machine(environment: MutableMapping[str, str], cores: int) -> None:
    """Leave the other processes of this machine their cores, and the GPUs of those before this one.

    What the user has set stays: NUMBA_NUM_THREADS, and which GPUs there are to share.
    """
    neighbours = told(LOCAL_SIZES, environment, 1)
    if neighbours == 1:
        return
    for pool in POOLS:
        environment.setdefault(pool, str(max(1, cores // neighbours)))
    rank = told(LOCAL_RANKS, environment, 0)
    gpus = environment.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(neighbours)))).split(",")
    if rank < len(gpus):
        environment["CUDA_VISIBLE_DEVICES"] = gpus[rank]


def _cores() -> int:
    """How many this process may use: on Linux a launcher or a container may have bound it to some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


share_machine(os.environ, _cores())
