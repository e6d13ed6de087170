"""All that the convolutions ask of CuPy below the level of arrays: kernels from source, and cuBLAS.

Tests put an emulator and NumPy in the place of `launch` and `multiply`, and then run everything else here as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from minidet import backend
from minidet.backend import Array
from minidet.kernels.cuda import device

FLOAT32, BFLOAT16 = 0, 14  # cudaDataType_t
PLAIN, TF32 = 68, 77  # cublasComputeType_t: float32 sums of exact products, and of operands rounded to TF32
AS_IT_IS, TRANSPOSED = 0, 1  # cublasOperation_t
DEFAULT_ALGORITHM = -1  # cublasGemmAlgo_t


@cache
def capability(device: int) -> int:
    """The compute capability of a device: 80 for Ampere, 90 for Hopper."""
    return int(backend.cuda().cuda.Device(device).compute_capability)


@cache
def _kernel(file: str, name: str, device: int):
    """A kernel of a .cu file beside this one, looked up once for every device."""
    return backend.cuda_module((Path(__file__).with_name(file),), "-std=c++17").get_function(name)


def launch(file: str, name: str, blocks: tuple[int, int], threads: int, shared_bytes: int, args: tuple) -> None:
    """Run the kernel `name` of a .cu file beside this one.

    An argument is an array, an int for a 32-bit int, or None for a null pointer.
    """
    passed = tuple(np.int64(0) if a is None else np.int32(a) if isinstance(a, int) else a for a in args)
    _kernel(file, name, device())(blocks, (threads,), passed, shared_mem=shared_bytes)


@dataclass(frozen=True)
class Stack:
    """Matrices of equal shape in one array: the first begins at element `start`, the next `step` elements further.

    Rows lie `pitch` elements apart; matrices and rows may interleave, and with step 0 all are the same.
    """

    array: Array
    start: int
    pitch: int
    step: int


def multiply(
    c: Stack, a: Stack, b: Stack, shape: tuple[int, int, int], count: int, *,
    a_transposed: bool = False, b_transposed: bool = False, add: bool = False,
) -> None:  # fmt: skip
    """C = A B, or C += A B, for `count` matrices at once; A and B may be stored transposed.

    Shapes, of each matrix, with `shape` = (m, n, k):
        a: (m, k), or stored as (k, m)
        b: (k, n), or stored as (n, k)
        c: (m, n)
    """
    m, n, k = shape
    cublas = backend.cuda().cuda.cublas
    one, zero = np.ones(1, np.float32), np.full(1, float(add), np.float32)
    # cuBLAS thinks in columns: what it takes for C, A and B are our C', A' and B', and C' = B' A'.
    cublas.gemmStridedBatchedEx(
        backend.cuda().cuda.device.get_cublas_handle(),
        TRANSPOSED if b_transposed else AS_IT_IS, TRANSPOSED if a_transposed else AS_IT_IS, n, m, k,
        one.ctypes.data, _address(b), _kind(b), b.pitch, b.step, _address(a), _kind(a), a.pitch, a.step,
        zero.ctypes.data, _address(c), _kind(c), c.pitch, c.step, count, _precision(a), DEFAULT_ALGORITHM,
    )  # fmt: skip


def _address(stack: Stack) -> int:
    return stack.array.data.ptr + stack.start * stack.array.dtype.itemsize


def _kind(stack: Stack) -> int:
    return BFLOAT16 if is_bfloat16(stack.array) else FLOAT32


def _precision(stack: Stack) -> int:
    return TF32 if not is_bfloat16(stack.array) and backend.tf32() else PLAIN


def numbers(x: Array) -> str:
    """What the array holds, as the kernels are called: bfloat16 is a type that NumPy learns from ml_dtypes."""
    return x.dtype.name


def is_bfloat16(x: Array) -> bool:
    """Whether the array holds numbers of 16 bits, whose sums are of 32."""
    return numbers(x) == "bfloat16"


def ready(x: Array) -> Array:
    """`x` itself where its elements lie in order, else a copy: kernels get no strides."""
    return x if x.flags.c_contiguous else x.copy()


def single(x: Array | None) -> Array | None:
    """A scale, bias or sum, of bfloat16 widened to float32: that is what the kernels take."""
    return x if x is None or x.dtype.itemsize > 2 else x.astype(np.float32)
