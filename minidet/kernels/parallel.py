"""A loop over independent units of work, on all cores; and several such loops, one after the other.

Numba's own parallel loop would do, but it compiles what is inside again and again: alone, as the function that a
thread runs, in that function's wrapper, and once more in the caller.  Here a unit is compiled alone; threads call it by
its address, each its own share of them first and then what is left of the others', so a slow core does less.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import get_num_threads, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

COMPILE, DONE, FAILED = range(3)
"""What became of loops: nothing yet, for a unit was not compiled for such arguments; all well; a unit raised."""


class Parallel:
    """A function of a unit's number and more arguments, called with how many units there are and those arguments.

    Units run in any order and at the same time: what one writes, no other may read or write.
    """

    def __init__(self, unit: Callable, **options) -> None:
        self.__name__, self.__doc__, self.py_func = unit.__name__, unit.__doc__, unit
        self._compiled = njit(unit, cache=True, **options)
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
            signature = (types.int64, *kinds)
            self._compiled.compile(signature)
            result = self._compiled.overloads[signature]
            self._addresses[kinds] = result.library.get_pointer_to_function(result.fndesc.llvm_func_name)
        return self._addresses[kinds]


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
"""For units whose loops follow each other: for which arguments they were last run, and the addresses of the units."""


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
        _entries[units] = entry = np.array([_number(kinds), *(unit.address(kinds) for unit in units)], np.int64)
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


@njit(cache=True)
def _launch(entry, ranges, most, *args):
    if entry[0] != _kinds(args):
        return COMPILE
    if most < 1:
        return DONE
    return DONE if _share(entry, ranges, most, args) == 0 else FAILED


@intrinsic
def _kinds(typing, args):
    """The number of the arguments' types, a constant in compiled code."""
    number = _number(tuple(args.types))
    return types.int64(args), lambda context, builder, signature, values: ir.Constant(ir.IntType(64), number)


SHORT, INT, POINTER = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
ADDRESSES, BEGINS, ENDS, LOOPS, THREADS, COUNTERS, RAISED, ARGUMENTS = range(8)
"""What all threads share: where the units of every loop are, where loops begin and end, how many loops and threads
there are, counters, how many units raised, and the arguments.

Every loop has a counter for each thread, of the units of its share that are taken, and one of the units that are done,
LINE numbers apart: no two in one cache line."""

LINE = 8
PAUSE = "llvm.x86.sse2.pause" if llvm.get_process_triple().startswith(("x86", "i686")) else None
"""How a waiting thread leaves the core to another one that shares it."""

# "numba_parallel_for" and "get_num_threads" are what Numba calls the functions of its thread pool, once it has one.


@intrinsic
def _share(typing, entry, ranges, most, args):
    """Have threads run the loops whose units are in `entry`, their numbers in `ranges`; how many units raised."""

    def generate(context, builder, signature, values):
        entry, ranges, most, packed = values
        entry, ranges = (
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(signature.args, (entry, ranges), strict=False)
        )
        nothing, one, numbers = ir.Constant(INT, 0), ir.Constant(INT, 1), INT.as_pointer()
        loops = builder.sub(entry.nitems, one)
        asked = cgutils.get_or_insert_function(builder.module, ir.FunctionType(SHORT, []), "get_num_threads")
        threads = builder.sext(builder.call(asked, []), INT)
        threads = builder.select(builder.icmp_signed("<", threads, most), threads, most)
        kind = ir.LiteralStructType([numbers, numbers, numbers, INT, INT, numbers, INT, context.get_value_type(args)])
        shared = cgutils.alloca_once(builder, kind)
        many = builder.mul(loops, builder.add(threads, one))
        counters = builder.alloca(INT, size=builder.mul(many, ir.Constant(INT, LINE)))
        with cgutils.for_range(builder, many) as counter:
            builder.store(nothing, _counter(builder, counters, counter.index))
        addresses, ends = builder.gep(entry.data, [one]), builder.gep(ranges.data, [loops])
        fields = addresses, ranges.data, ends, loops, threads, counters, nothing, packed
        for place, value in enumerate(fields):
            builder.store(value, cgutils.gep_inbounds(builder, shared, 0, place))
        worker, data = _worker(context, builder.module, kind, args), builder.bitcast(shared, POINTER)
        with builder.if_else(builder.icmp_signed(">", threads, one)) as (several, alone):
            with several:
                _fork(builder, worker, threads, data)
            with alone:
                first = cgutils.alloca_once_value(builder, ir.Constant(POINTER, None))
                none = ir.Constant(numbers, None)
                builder.call(worker, [first, none, none, data])
        return builder.load(cgutils.gep_inbounds(builder, shared, 0, RAISED))

    return types.int64(entry, ranges, most, args), generate


def _counter(builder, counters, number):
    """Where that counter is."""
    return builder.gep(counters, [builder.mul(number, ir.Constant(INT, LINE))])


def _worker(context, module, shared, args):
    """What a thread runs: of every loop all of its own share that is left, then of the next thread's, and so on.

    A share is a run of neighbours, so that a thread often finds in its cache what it wrote in the loop before.  What
    is not taken yet, any thread takes, and only for units that others are at does one wait: so it does not matter
    whether there really are as many threads as were asked for.
    """
    kind = ir.FunctionType(ir.VoidType(), [POINTER.as_pointer(), INT.as_pointer(), INT.as_pointer(), POINTER])
    worker = ir.Function(module, kind, module.get_unique_name("worker"))
    worker.linkage = "internal"
    builder, one = ir.IRBuilder(worker.append_basic_block()), ir.Constant(INT, 1)
    data = builder.bitcast(worker.args[3], shared.as_pointer())

    def field(place):
        return cgutils.gep_inbounds(builder, data, 0, place)

    addresses, begins, ends, loops, threads, counters = (builder.load(field(place)) for place in range(RAISED))
    kinds = (types.int64, *args.types)
    unit_type = context.call_conv.get_function_type(types.none, kinds).as_pointer()
    values = cgutils.unpack_tuple(builder, builder.load(field(ARGUMENTS)))
    here = builder.ptrtoint(builder.load(worker.args[0]), INT)
    ran = cgutils.alloca_once(builder, INT)
    with cgutils.for_range(builder, loops) as loop:
        unit = builder.inttoptr(builder.load(builder.gep(addresses, [loop.index])), unit_type)
        begin, end = (builder.load(builder.gep(limits, [loop.index])) for limits in (begins, ends))
        failed = builder.icmp_signed(">", builder.load_atomic(field(RAISED), "acquire", 8), ir.Constant(INT, 0))
        units = builder.select(failed, ir.Constant(INT, 0), builder.sub(end, begin))
        mine = builder.mul(loop.index, builder.add(threads, one))
        done = _counter(builder, counters, builder.add(mine, threads))
        with cgutils.for_range(builder, threads) as turn:
            owner = builder.urem(builder.add(here, turn.index), threads)
            first = builder.udiv(builder.mul(owner, units), threads)
            stop = builder.udiv(builder.mul(builder.add(owner, one), units), threads)
            taken = _counter(builder, counters, builder.add(mine, owner))
            take, run, over = (builder.append_basic_block() for _ in range(3))
            builder.store(ir.Constant(INT, 0), ran)
            builder.branch(take)
            builder.position_at_end(take)
            number = builder.add(first, builder.atomic_rmw("add", taken, one, "monotonic"))
            builder.cbranch(builder.icmp_signed("<", number, stop), run, over)
            builder.position_at_end(run)
            number = builder.add(begin, number)
            status, _ = context.call_conv.call_function(builder, unit, types.none, kinds, [number, *values])
            with builder.if_then(status.is_error, likely=False):
                builder.atomic_rmw("add", field(RAISED), one, "release")
            builder.store(builder.add(builder.load(ran), one), ran)
            builder.branch(take)
            builder.position_at_end(over)
            # Not after every unit: the line would go back and forth between the cores.
            builder.atomic_rmw("add", done, builder.load(ran), "release")
        last = builder.icmp_signed("==", builder.add(loop.index, one), loops)
        awaited = builder.select(last, ir.Constant(INT, 0), units)
        look, wait, on = (builder.append_basic_block() for _ in range(3))
        builder.branch(look)
        builder.position_at_end(look)
        builder.cbranch(builder.icmp_signed("<", builder.load_atomic(done, "acquire", 8), awaited), wait, on)
        builder.position_at_end(wait)
        if PAUSE:
            builder.call(cgutils.get_or_insert_function(module, ir.FunctionType(ir.VoidType(), []), PAUSE), [])
        builder.branch(look)
        builder.position_at_end(on)
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
