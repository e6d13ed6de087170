"""The only file that names array libraries: every other one asks the arrays it was given.

An op asks once, `xp = namespace(x)`, and then speaks the Array API standard (https://data-apis.org/array-api),
so the same source runs on NumPy, on CuPy, and on array-api-strict, which refuses whatever the
standard does not promise and so finds portability bugs without a GPU.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
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
            "or pip install 'cupy-cuda12x[ctk]' ml_dtypes for CUDA 12"
        ) from error
    if not _cupy_checked:
        try:
            square = cupy.ones((2, 2))  # memory, a kernel of CuPy's, a product of cuBLAS: everything that ops need
            (square @ square).sum().item()
        except Exception as error:  # whatever CUDA raises, the user gets one sentence and no traceback maze
            raise RuntimeError(
                f"the cupy backend found no usable GPU ({type(error).__name__}: {error}). Check nvidia-smi, that the "
                "CuPy package matches the driver's CUDA version (cupy-cuda13x or cupy-cuda12x), and that CUDA's "
                "libraries are installed too (pip install 'cupy-cuda13x[ctk]'); "
                "MINIDET_BACKEND=numpy runs everything on the CPU"
            ) from error
        _cupy_checked = True
        _tell_cupy()
    return xp


def cuda():
    """CuPy itself, for what lies below arrays: kernels from source, and cuBLAS.  Only asked where arrays are CuPy's."""
    return importlib.import_module("cupy")


_tf32: bool | None = None  # until somebody asks


def tf32() -> bool:
    """Whether GPUs may round the factors of float32 matrix products to TF32's ten bits of fraction.

    They do unless MINIDET_TF32 is 0: tensor cores multiply such numbers about eight times as fast.  Sums stay
    float32.  This is the only place that reads the variable.
    """
    global _tf32
    if _tf32 is None:
        value = os.environ.get("MINIDET_TF32", "") or "1"
        if value not in ("0", "1"):
            raise ValueError(f"MINIDET_TF32={value!r} is unknown: choose 0 or 1")
        _tf32 = value == "1"
    return _tf32


def use_tf32(allowed: bool) -> None:
    """From now on, GPUs may round to TF32 or may not, in the whole process."""
    global _tf32
    _tf32 = allowed
    if _cupy_checked:
        _tell_cupy()


def _tell_cupy() -> None:
    """CuPy's own matrix products of two axes follow `tf32`; those of more axes never use it."""
    ordinary, rounded = 1, 7  # COMPUTE_TYPE_DEFAULT and COMPUTE_TYPE_TF32 in cupy/_core/_routines_linalg
    with warnings.catch_warnings(action="ignore"):  # that GPUs before Ampere have none
        cuda()._core.set_compute_type("float32", rounded if tf32() else ordinary)


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


def read(numbers: Sequence[Array | float]) -> list[float]:
    """Numbers that an array library computed, as Python's: in one copy, and so one wait, for all of them."""
    there = [x for x in numbers if not isinstance(x, int | float | np.generic | np.ndarray)]
    if not there:
        return [float(x) for x in numbers]
    xp = namespace(there[0])
    values = iter(to_numpy(xp.stack([xp.astype(x, xp.float64) for x in there])).tolist())
    return [next(values) if any(x is y for y in there) else float(x) for x in numbers]


def name_of(xp) -> str:
    """The name in LIBRARIES of a namespace that `load` returned."""
    return "cupy" if "cupy" in xp.__name__ else xp.__name__.partition(".")[0]


def nccl_identity() -> bytes:
    """What one of several processes makes up and all of them hand to `sums_over_gpus`."""
    return _nccl().get_unique_id()


def _nccl():
    nccl = importlib.import_module("cupy.cuda.nccl")
    if not nccl.available:  # CuPy has said why, in a warning
        raise RuntimeError("training on several GPUs needs NCCL: pip install nvidia-nccl-cu13, or -cu12 with CUDA 12")
    return nccl


def sums_over_gpus(processes: int, rank: int, identity: bytes) -> Callable[[Array], None]:
    """NCCL between so many processes, one GPU each: a function that replaces an array by the sum of everybody's.

    It orders the sum in the current stream and does not wait.
    """
    nccl = _nccl()
    communicator = nccl.NcclCommunicator(processes, identity, rank)
    kinds = {"float32": nccl.NCCL_FLOAT32, "float64": nccl.NCCL_FLOAT64, "int64": nccl.NCCL_INT64}

    def all_sum(values: Array) -> None:
        where, stream = values.data.ptr, cuda().cuda.get_current_stream()
        communicator.allReduce(where, where, values.size, kinds[str(values.dtype)], nccl.NCCL_SUM, stream.ptr)

    return all_sum


def pool_bytes(xp) -> tuple[int, int] | None:
    """What arrays take of CuPy's memory pool, and what the pool holds of the GPU's memory; None elsewhere.

    The host knows both by itself: nothing waits.
    """
    if name_of(xp) != "cupy":
        return None
    pool = cuda().get_default_memory_pool()
    return pool.used_bytes(), pool.total_bytes()


@cache
def cuda_module(paths: tuple[Path, ...], *options: str):
    """The kernels in files of CUDA, compiled as one when the first is asked for; CuPy keeps them on disk."""
    # CuPy would not see that a file has changed which the code includes.
    code = "\n".join(path.read_text() for path in paths)
    return importlib.import_module("cupy").RawModule(code=code, options=options)
