"""How a kernel in CUDA starts: the file beside a Python file, compiled for a type of number, on so many threads."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from minidet import backend
from minidet.backend import Array
from minidet.kernels.precision import sums_in

THREADS = 256
"""Threads of a block."""
NUMBERS = Path(__file__).with_name("numbers.cuh")
"""What comes before every file."""
OPTIONS = ("--std=c++17", "--fmad=false")
"""No product is merged with a sum: what is decided by comparing then rounds as in the definition.

CuPy adds -ftz=true: a float32 below 1.2e-38 counts as zero.  So small an overlap is none, and so small a probability
passes no threshold; a maximum or a rectifier changes by no more than such a number.
"""


def launch(source: str, name: str, threads: int, *args: Array | int | float, real: Any) -> None:
    """Run a kernel of the CUDA file beside the Python file `source` on at least so many threads.

    REAL is the type `real` there, and Wide the one to compute in (numbers.cuh).  Arrays are passed as pointers: they
    have to be contiguous; an int is a long long, a float a double.
    """
    blocks = -(-threads // THREADS)
    if blocks:
        kind = {"float64": "double", "bfloat16": "Bfloat16"}.get(str(real), "float")
        _kernel(source, name, kind, device())((blocks,), (THREADS,), args)


def device() -> int:
    """The number of the current device."""
    return backend.cuda().cuda.runtime.getDevice()


@cache
def _kernel(source: str, name: str, kind: str, device: int):
    """A kernel, looked up once for every device: CuPy would ask the driver for it again."""
    module = backend.cuda_module((NUMBERS, Path(source).with_suffix(".cu")), *OPTIONS, f"-DREAL={kind}")
    return module.get_function(name)


def contiguous(x: Array) -> Array:
    """`x`, or a copy of it, with its elements one after the other in memory."""
    return x if x.flags.c_contiguous else x.copy()


def elementwise(source: str, name: str, *arrays: Array) -> Array:
    """What a kernel makes of each element of arrays of one shape and type."""
    y = backend.namespace(arrays[0]).empty(arrays[0].shape, dtype=arrays[0].dtype)
    launch(source, name, y.size, *map(contiguous, arrays), y, y.size, real=y.dtype)
    return y


def sum_columns(source: str, name: str, g: Array, *arguments: Array) -> Array:
    """What a kernel sums over all but the last axis of g: in shares, and these in a fixed order; never bfloat16."""
    xp, F = backend.namespace(g), g.shape[-1]
    rows = g.size // max(1, F)
    chunks = min(rows, max(1, _SHARES // max(1, F)))
    sums = xp.empty((chunks, F), dtype=sums_in(g))
    launch(source, name, chunks * F, *arguments, sums, rows, F, chunks, real=g.dtype)
    return xp.astype(xp.sum(sums, axis=0, dtype=xp.float64), sums.dtype)


_SHARES = 1 << 17  # enough threads for any GPU, few enough for their sums to be small
