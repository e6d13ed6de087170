"""A loop over independent units of work, on all cores; and several such loops, one after the other.

Numba's own parallel loop would do, but it compiles what is inside again and again: alone, as the function that a
thread runs, in that function's wrapper, and once more in the caller.  Here a unit is compiled alone; threads call it by
its address, each its own share of them first and then what is left of the others', so a slow core does less.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache

import numba
import numpy as np
from llvmlite import ir
from numba import get_num_threads, types
from numba.extending import intrinsic

from minidet.kernels.compiler import compiled
from minidet.kernels.threads import SHARE_OUT, hand_over, share_out

COMPILE, DONE, FAILED = range(3)
"""What became of loops: nothing yet, for a unit was not compiled for such arguments; all well; a unit raised."""


class Parallel:
    """A function of a unit's number and more arguments, called with how many units there are and those arguments.

    Units run in any order and at the same time: what one writes, no other may read or write.
    """

    def __init__(self, unit: Callable, **options) -> None:
        self.__name__, self.__doc__, self.py_func = unit.__name__, unit.__doc__, unit
        self._compiled = compiled(unit, no_cpython_wrapper=True, **options)
        self._addresses: dict[tuple, int] = {}

    def __call__(self, units: int, *args) -> None:
        """Run unit(i, *args) for every i below `units`."""
        _run((self,), _below(units), units, args)

    def one_by_one(self, units: int, *args) -> None:
        """What calling means, in Python: slow, and every line can be stepped through."""
        for i in range(units):
            self.py_func(i, *args)

    def address(self, kinds: tuple) -> int:
        """Where the unit is, compiled for arguments of these types."""
        if kinds not in self._addresses:
            self._addresses[kinds] = _address(self._compiled, (types.int64, *kinds))
        return self._addresses[kinds]


def _address(function, signature: tuple) -> int:
    function.compile(signature)
    result = function.overloads[signature]
    return result.library.get_pointer_to_function(result.fndesc.llvm_func_name)


def parallel(unit: Callable | None = None, **options):
    """Decorate the unit of a parallel loop; options are those of `numba.njit`."""
    return Parallel(unit, **options) if unit else lambda unit: Parallel(unit, **options)


def in_turn(loops: tuple[tuple[Parallel, int, int], ...], *args) -> None:
    """Run unit(i, *args) for every i from begin to below end, for every (unit, begin, end) of the loops.

    A loop begins when all units of the one before are done, without a way back through Python in between: there the
    threads would wait for what takes as long as a short loop.
    """
    _run(*_in_turn(loops), args)


@lru_cache(maxsize=1024)
def _in_turn(loops):
    units, begins, ends = zip(*loops, strict=True)
    ranges = np.array([begins, np.maximum(begins, ends)])
    return units, ranges, int((ranges[1] - ranges[0]).max())


_entries: dict[tuple[Parallel, ...], np.ndarray] = {}
"""For units whose loops follow each other: for which arguments they were last run, the address of `share_out`, and
those of the units."""


def _run(units: tuple[Parallel, ...], ranges: np.ndarray, most: int, args: tuple) -> None:
    if numba.config.DISABLE_JIT:
        for unit, begin, end in zip(units, *ranges.tolist(), strict=True):
            for i in range(begin, end):
                unit.py_func(i, *args)
        return
    entry = _entries.get(units)  # another thread may replace it meanwhile
    outcome = COMPILE if entry is None else _launch(entry, ranges, most, *args)
    if outcome == COMPILE:
        get_num_threads()  # makes the pool of threads, which compiled code cannot
        kinds = tuple(numba.typeof(arg) for arg in args)
        addresses = _address(share_out, SHARE_OUT), *(unit.address(kinds) for unit in units)
        _entries[units] = entry = np.array([_number(kinds), *addresses], np.int64)
        outcome = _launch(entry, ranges, most, *args)
        assert outcome != COMPILE, f"{units[0].__name__}: Numba has two opinions on the types of its arguments"
    if outcome == FAILED:
        names = ", ".join(dict.fromkeys(unit.__name__ for unit in units))
        raise RuntimeError(f"{names}: a unit of this parallel loop raised an exception")


@lru_cache(maxsize=4096)
def _below(units: int) -> np.ndarray:
    return np.array([[0], [units]])


def _number(kinds: tuple) -> int:
    """A number that stands for the types of some arguments."""
    return int.from_bytes(hashlib.sha256(str(kinds).encode()).digest()[:7], "big")


@compiled
def _launch(entry, ranges, most, *args):
    """Once for every kind of arguments, and so as little as can be: the rest is in `share_out`, compiled once."""
    if entry[0] != _kinds(args):
        return COMPILE
    if most < 1:
        return DONE
    return DONE if hand_over(entry, ranges, most, args) == 0 else FAILED


@intrinsic
def _kinds(typing, args):
    """The number of the arguments' types, a constant in compiled code."""
    number = _number(tuple(args.types))
    return types.int64(args), lambda context, builder, signature, values: ir.Constant(ir.IntType(64), number)
