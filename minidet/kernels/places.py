"""One parallel loop over many arrays, wherever in memory each of them lies: to launch a loop for each costs more."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, lru_cache

import numpy as np

from minidet.kernels.pointwise import BLOCK

ORIGIN = 64
"""Where `memory` begins: NumPy takes 0 for no place at all."""


def over_all(unit: Callable, columns: Sequence[Sequence[np.ndarray]], *args) -> list[None] | None:
    """Run unit(block, table, memory, *args) for every block of BLOCK elements of every row's arrays: of one array of
    each column.

    Returns what as many calls return that write in place; nothing runs, and it is None, without a table.
    """
    table = tabulate(columns)
    if table is None:
        return None
    unit(len(table), table, memory(columns[0][0].dtype), *args)
    return [None] * len(columns[0])


def tabulate(columns: Sequence[Sequence[np.ndarray]]) -> np.ndarray | None:
    """For every block the number of its row, its size, and where in `memory` its part of each of the row's arrays is.

    None if the arrays are not all float32 or all float64, if those of a row differ in size, or if there is one that
    nobody can write to from its first element to its last.
    """
    dtype, sizes = columns[0][0].dtype, {tuple([a.size for a in column]) for column in columns}
    dtypes = [a.dtype for column in columns for a in column]
    if len(sizes) > 1 or dtype.char not in "fd" or dtypes.count(dtype) < len(dtypes):
        return None
    try:
        places = [[ctypes.addressof(ctypes.c_char.from_buffer(a)) for a in column] for column in columns]
    except (TypeError, ValueError):  # not contiguous, not to be written to; empty
        return None
    places, row, first, size = np.array(places) - ORIGIN, *blocks(sizes.pop())
    if (places % dtype.itemsize).any():
        return None
    return np.column_stack([row, size, *(places[:, row] // dtype.itemsize + first)])


def writable(*args) -> bool:
    """Whether the arrays among the arguments have a table, as one row: asked without making it, which takes longer."""
    kind, arrays = (args[0].dtype, args[0].size), [a for a in args if isinstance(a, np.ndarray)]
    return kind[0].char in "fd" and kind[1] > 0 and all((a.dtype, a.size) == kind and a.flags.carray for a in arrays)


@cache
def memory(dtype: np.dtype) -> np.ndarray:
    """All the memory of this process as one array, in which every other one is a slice."""
    return np.frombuffer((ctypes.c_char * (1 << 62)).from_address(ORIGIN), dtype)


@lru_cache(maxsize=16)
def blocks(sizes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All blocks of arrays of these sizes: of which array, its first element, and how many it has."""
    row = np.repeat(np.arange(len(sizes)), [-(-size // BLOCK) for size in sizes])
    first = BLOCK * (np.arange(len(row)) - np.searchsorted(row, row))
    return row, first, np.minimum(np.array(sizes)[row] - first, BLOCK)
