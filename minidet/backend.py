"""The only file that names array libraries: every other one asks the arrays it was given.

An op asks once, `xp = namespace(x)`, and then speaks the Array API standard (https://data-apis.org/array-api),
so the same source runs on NumPy, on CuPy, and on array-api-strict, which refuses whatever the
standard does not promise and so finds portability bugs without a GPU.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np

Array = Any
"""An array of any library in LIBRARIES."""

LIBRARIES = ("numpy", "cupy", "array_api_strict")


def library(x: Array) -> str:
    """The name of the library that owns `x`, one of LIBRARIES.

    Raises:
        TypeError: if no supported library owns it.
    """
    if isinstance(x, np.ndarray):
        return "numpy"
    owner = type(x).__module__.partition(".")[0]
    if owner in LIBRARIES:
        return owner
    raise TypeError(
        f"expected an array of {', '.join(LIBRARIES)}, got {type(x).__module__}.{type(x).__qualname__}"
    )


def namespace(x: Array):
    """The Array API namespace `xp` of the library that owns `x`."""
    # NumPy 2 is its own standard namespace; asked for in every op, so answered first.
    return np if isinstance(x, np.ndarray) else load(library(x))


def load(name: str):
    """The Array API namespace called `name`.

    Raises:
        ValueError: for a name that is not one of LIBRARIES.
        RuntimeError: if the library is not installed, or CuPy finds no usable GPU.
    """
    if name == "numpy":
        return np
    if name == "array_api_strict":
        try:
            return importlib.import_module("array_api_strict")
        except ImportError as error:
            raise RuntimeError(
                "the array_api_strict backend needs a package: pip install array-api-strict"
            ) from error
    if name == "cupy":
        return _load_cupy()
    raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(LIBRARIES)}")


_cupy_checked = False


def _load_cupy():
    global _cupy_checked
    try:
        cupy = importlib.import_module("cupy")
        xp = importlib.import_module("array_api_compat.cupy")
    except ImportError as error:
        raise RuntimeError(
            f"the cupy backend needs CuPy ({error}): pip install 'minidet[cupy]' for CUDA 13, "
            "or pip install cupy-cuda12x for CUDA 12"
        ) from error
    if not _cupy_checked:
        try:
            cupy.zeros(1).sum().item()  # one allocation, one kernel: everything a first op needs
        except Exception as error:  # whatever CUDA raises, the user gets one sentence and no traceback maze
            raise RuntimeError(
                f"the cupy backend found no usable GPU ({type(error).__name__}: {error}). Check nvidia-smi, and "
                "that the CuPy package matches the driver's CUDA version (cupy-cuda13x or cupy-cuda12x); "
                "MINIDET_BACKEND=numpy runs everything on the CPU"
            ) from error
        _cupy_checked = True
    return xp


def default():
    """The namespace new models use: MINIDET_BACKEND, or NumPy.

    This is the only place that reads the variable; ops never do.
    """
    name = os.environ.get("MINIDET_BACKEND", "") or "numpy"
    if name not in LIBRARIES:
        raise ValueError(f"MINIDET_BACKEND={name!r} is unknown: choose one of {', '.join(LIBRARIES)}")
    return load(name)


def to_numpy(x: Array) -> np.ndarray:
    """`x` as a NumPy array: the only copy from device to host."""
    owner = library(x)
    if owner == "cupy":
        return x.get()
    return np.asarray(x)  # NumPy's own arrays as they are; a sum, which NumPy makes a scalar, as an array


def name_of(xp) -> str:
    """The name in LIBRARIES of a namespace that `load` returned."""
    return "cupy" if "cupy" in xp.__name__ else xp.__name__.partition(".")[0]


def sums_over_gpus(processes: int, rank: int):
    """NCCL between so many processes, one GPU each: its `all_reduce(x, y)` writes the sum of everybody's `x` to `y`."""
    return importlib.import_module("cupyx.distributed").NCCLBackend(processes, rank, use_mpi=True)
