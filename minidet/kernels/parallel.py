"""A loop over independent units of work, on all cores.

Numba's own parallel loop would do, but it compiles what is inside again and again: alone, as the function that a
thread runs, in that function's wrapper, and once more in the caller.  Here a unit is compiled alone; threads call it by
its address, each its own share of them first and then what is left of the others', so a slow core does less.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numba
import numpy as np
from llvmlite import ir
from numba import get_num_threads, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

COMPILE, DONE, FAILED = range(3)
"""What became of a loop: nothing yet, for its unit was not compiled for such arguments; all well; a unit raised."""


class Parallel:
    """A function of a unit's number and more arguments, called with how many units there are and those arguments.

    Units run in any order and at the same time: what one writes, no other may read or write.
    """

    def __init__(self, unit: Callable, **options) -> None:
        self.__name__, self.__doc__, self.py_func = unit.__name__, unit.__doc__, unit
        self._compiled = njit(unit, cache=True, **options)
        self._entries: dict[tuple, np.ndarray] = {}
        self._entry = None  # of the last call: address of the compiled unit, and for which arguments it is

    def __call__(self, units: int, *args) -> None:
        """Run unit(i, *args) for every i below `units`."""
        if numba.config.DISABLE_JIT:
            self.one_by_one(units, *args)
            return
        entry = self._entry  # another thread may replace it meanwhile
        outcome = COMPILE if entry is None else _launch(entry, units, *args)
        if outcome == COMPILE:
            self._entry = entry = self._entry_for(args)
            outcome = _launch(entry, units, *args)
            assert outcome != COMPILE, f"{self.__name__}: Numba has two opinions on the types of its arguments"
        if outcome == FAILED:
            raise RuntimeError(f"{self.__name__}: a unit of this parallel loop raised an exception")

    def one_by_one(self, units: int, *args) -> None:
        """What calling means, in Python: slow, and every line can be stepped through."""
        for i in range(units):
            self.py_func(i, *args)

    def _entry_for(self, args: tuple) -> np.ndarray:
        get_num_threads()  # makes the pool of threads, which compiled code cannot
        kinds = tuple(numba.typeof(arg) for arg in args)
        if kinds not in self._entries:
            signature = (types.int64, *kinds)
            self._compiled.compile(signature)
            result = self._compiled.overloads[signature]
            address = result.library.get_pointer_to_function(result.fndesc.llvm_func_name)
            self._entries[kinds] = np.array([address, _number(kinds)], np.int64)
        return self._entries[kinds]


def parallel(unit: Callable | None = None, **options):
    """Decorate the unit of a parallel loop; options are those of `numba.njit`."""
    return Parallel(unit, **options) if unit else lambda unit: Parallel(unit, **options)


def _number(kinds: tuple) -> int:
    """A number that stands for the types of some arguments."""
    return int.from_bytes(hashlib.sha256(str(kinds).encode()).digest()[:7], "big")


@njit(cache=True)
def _launch(entry, units, *args):
    if entry[1] != _kinds(args):
        return COMPILE
    if units < 1:
        return DONE
    return DONE if _share(entry[0], units, args) == 0 else FAILED


@intrinsic
def _kinds(typing, args):
    """The number of the arguments' types, a constant in compiled code."""
    number = _number(tuple(args.types))
    return types.int64(args), lambda context, builder, signature, values: ir.Constant(ir.IntType(64), number)


SHORT, INT, POINTER = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
ADDRESS, UNITS, THREADS, TAKEN, RAISED, ARGUMENTS = range(6)
"""What all threads of a loop share: where the unit is, how many units and threads there are, how many units of every
thread's share are taken (LINE numbers apart: no two in one cache line), how many raised, and the arguments."""

LINE = 8

# "numba_parallel_for" and "get_num_threads" are what Numba calls the functions of its thread pool, once it has one.


@intrinsic
def _share(typing, address, units, args):
    """Have threads run the unit at `address` for 0, 1, ... units - 1; how many units raised."""

    def generate(context, builder, signature, values):
        address, units, packed = values
        asked = cgutils.get_or_insert_function(builder.module, ir.FunctionType(SHORT, []), "get_num_threads")
        threads = builder.sext(builder.call(asked, []), INT)
        threads = builder.select(builder.icmp_signed("<", threads, units), threads, units)
        kind = ir.LiteralStructType([INT, INT, INT, INT.as_pointer(), INT, context.get_value_type(args)])
        shared, nothing = cgutils.alloca_once(builder, kind), ir.Constant(INT, 0)
        taken = builder.alloca(INT, size=builder.mul(threads, ir.Constant(INT, LINE)))
        with cgutils.for_range(builder, threads) as thread:
            builder.store(nothing, _counter(builder, taken, thread.index))
        for place, value in enumerate((address, units, threads, taken, nothing, packed)):
            builder.store(value, cgutils.gep_inbounds(builder, shared, 0, place))
        worker, data = _worker(context, builder.module, kind, args), builder.bitcast(shared, POINTER)
        with builder.if_else(builder.icmp_signed(">", threads, ir.Constant(INT, 1))) as (several, one):
            with several:
                _fork(builder, worker, threads, data)
            with one:
                first = cgutils.alloca_once_value(builder, ir.Constant(POINTER, None))
                numbers = ir.Constant(INT.as_pointer(), None)
                builder.call(worker, [first, numbers, numbers, data])
        return builder.load(cgutils.gep_inbounds(builder, shared, 0, RAISED))

    return types.int64(address, units, args), generate


def _counter(builder, taken, thread):
    """Where it says how much of that thread's share is taken."""
    return builder.gep(taken, [builder.mul(thread, ir.Constant(INT, LINE))])


def _worker(context, module, shared, args):
    """What a thread runs: all of its own share that is left, then of the next thread's, and so on.

    A share is a run of neighbours, so that a thread often finds in its cache what it wrote in the loop before.
    """
    kind = ir.FunctionType(ir.VoidType(), [POINTER.as_pointer(), INT.as_pointer(), INT.as_pointer(), POINTER])
    worker = ir.Function(module, kind, module.get_unique_name("worker"))
    worker.linkage = "internal"
    builder, one = ir.IRBuilder(worker.append_basic_block()), ir.Constant(INT, 1)
    data = builder.bitcast(worker.args[3], shared.as_pointer())

    def field(place):
        return cgutils.gep_inbounds(builder, data, 0, place)

    kinds = (types.int64, *args.types)
    unit = context.call_conv.get_function_type(types.none, kinds).as_pointer()
    unit = builder.inttoptr(builder.load(field(ADDRESS)), unit)
    units, threads, taken = (builder.load(field(place)) for place in (UNITS, THREADS, TAKEN))
    values = cgutils.unpack_tuple(builder, builder.load(field(ARGUMENTS)))
    here = builder.ptrtoint(builder.load(worker.args[0]), INT)
    with cgutils.for_range(builder, threads) as turn:
        owner = builder.urem(builder.add(here, turn.index), threads)
        first = builder.udiv(builder.mul(owner, units), threads)
        stop = builder.udiv(builder.mul(builder.add(owner, one), units), threads)
        take, run, end = (builder.append_basic_block() for _ in range(3))
        builder.branch(take)
        builder.position_at_end(take)
        number = builder.add(first, builder.atomic_rmw("add", _counter(builder, taken, owner), one, "monotonic"))
        builder.cbranch(builder.icmp_signed("<", number, stop), run, end)
        builder.position_at_end(run)
        status, _ = context.call_conv.call_function(builder, unit, types.none, kinds, [number, *values])
        with builder.if_then(status.is_error, likely=False):
            builder.atomic_rmw("add", field(RAISED), one, "monotonic")
        builder.branch(take)
        builder.position_at_end(end)
    builder.ret_void()
    return worker


def _fork(builder, worker, threads, data) -> None:
    """Numba's thread pool, whichever it is, runs `worker` on every thread.

    The pool passes pointers that move a step with every thread: from nothing in steps of one, the thread's number.
    """
    numbers = INT.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [POINTER, POINTER.as_pointer(), numbers, numbers, POINTER, INT, INT, SHORT])
    fork = cgutils.get_or_insert_function(builder.module, kind, "numba_parallel_for")
    none, one = ir.Constant(INT, 0), ir.Constant(INT, 1)
    pointers = cgutils.alloca_once_value(builder, ir.Constant(POINTER, None))
    count, step = cgutils.alloca_once_value(builder, threads), cgutils.alloca_once_value(builder, one)
    worker = builder.bitcast(worker, POINTER)
    builder.call(fork, [worker, pointers, count, step, data, none, one, builder.trunc(threads, SHORT)])
