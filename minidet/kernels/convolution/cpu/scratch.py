"""Memory as the vectors of these kernels want it: whole cache lines, and the same again in the next call."""

from __future__ import annotations

import ctypes
import math
import threading
from functools import lru_cache

import numpy as np

from minidet.kernels.compiler import inner
from minidet.kernels.convolution.cpu.lanes import LINE

_kept = threading.local()


def aligned(*shape: int) -> np.ndarray:
    """An array of float32 numbers, undefined, that begins where a cache line does.

    NumPy's own begin 16 bytes later.  Then every vector lies in two lines: it costs two accesses, and where its
    neighbour is written at another time, each line goes to memory and back twice.
    """
    size = math.prod(shape)
    memory = np.empty(size + LINE // 4, dtype=np.float32)
    # The address, without the dozen objects of `memory.ctypes`.
    first = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % LINE // 4
    return memory[first : first + size].reshape(shape)


def scratch(purpose: str, size: int) -> np.ndarray:
    """`size` float32 numbers, undefined and aligned; until this thread asks for the same purpose again.

    Fresh memory costs more than the work on it: the system hands it out page by page, each filled with zeros at
    its first touch.  A thread keeps the largest array that it ever needed for a purpose.
    """
    arrays = _kept.__dict__
    if purpose not in arrays or arrays[purpose].size < size:
        arrays[purpose] = aligned(size)
    return arrays[purpose][:size]


@lru_cache(maxsize=256)
def row_of_zeros(numbers: int):
    """So many zeros, the same ones in every call: what is read outside of a map.  Nobody may write to them."""
    return np.zeros(numbers, dtype=np.float32)


@inner
def local(size):
    """`aligned` inside of compiled code, for a unit of a parallel loop: mostly the same memory again for its thread."""
    memory = np.empty(size + LINE // 4, dtype=np.float32)
    first = -memory.ctypes.data % LINE // 4
    return memory[first : first + size]
