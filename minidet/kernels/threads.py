"""How threads share the units of loops: machine code that Numba's pool of threads runs, compiled once for all loops.

It is written in LLVM's intermediate language, for a unit is called by its address, which Numba's own language cannot.
"""

from __future__ import annotations

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from minidet.kernels.compiler import compiled

SHORT, INT, POINTER = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
CALL = ir.FunctionType(SHORT, [INT, INT, INT])
"""A function that calls a unit, given its address, its number, and the address of its arguments: whether it raised."""

SHARE_OUT = types.int64[::1], types.int64[:, ::1], types.int64, types.int64, types.int64
"""What `share_out` takes: the entry, the ranges, how many units the longest loop has, the address of a CALL, and that
of the arguments."""


@intrinsic
def hand_over(typing, entry, ranges, most, args):
    """Call `share_out`, which knows neither how many arguments a unit has nor of what types.

    So they stay here, packed, in the memory of this call, which ends after all threads have; and a small function,
    made here, unpacks them and calls a unit in the way of Numba's functions.
    """

    def generate(context, builder, signature, values):
        *same, packed = values
        call = ir.Function(builder.module, CALL, builder.module.get_unique_name("call"))
        call.linkage = "internal"
        inside = ir.IRBuilder(call.append_basic_block())
        unit, number, where = call.args
        kinds = (types.int64, *args.types)
        unit = inside.inttoptr(unit, context.call_conv.get_function_type(types.none, kinds).as_pointer())
        unpacked = cgutils.unpack_tuple(inside, inside.load(inside.inttoptr(where, packed.type.as_pointer())))
        status, _ = context.call_conv.call_function(inside, unit, types.none, kinds, [number, *unpacked])
        inside.ret(inside.zext(status.is_error, SHORT))
        places = builder.ptrtoint(call, INT), builder.ptrtoint(cgutils.alloca_once_value(builder, packed), INT)
        addresses = context.make_array(entry)(context, builder, same[0]).data
        entered = builder.load(builder.gep(addresses, [ir.Constant(INT, 1)]))
        entered = builder.inttoptr(entered, context.call_conv.get_function_type(types.int64, SHARE_OUT).as_pointer())
        return context.call_conv.call_function(builder, entered, types.int64, SHARE_OUT, [*same, *places])[1]

    return types.int64(entry, ranges, most, args), generate


@compiled(no_cpython_wrapper=True)
def share_out(entry, ranges, most, caller, where):
    """Have threads run all loops; how many units raised."""
    return _threads(entry, ranges, most, caller, where)


ADDRESSES, BEGINS, ENDS, LOOPS, THREADS, COUNTERS, RAISED, CALLER, ARGUMENTS = range(9)
"""What all threads share: where the units of every loop are, where loops begin and end, how many loops and threads
there are, counters, how many units raised, and where the function that calls a unit is, and the arguments.

Every loop has a counter for each thread, of the units of its share that are taken, one of the units that are done, and
one of those that raised, LINE numbers apart: no two in one cache line."""

LINE = 8
PAUSE = "llvm.x86.sse2.pause" if llvm.get_process_triple().startswith(("x86", "i686")) else None
"""How a waiting thread leaves the core to another one that shares it."""

# "numba_parallel_for" and "get_num_threads" are what Numba calls the functions of its thread pool, once it has one.


@intrinsic
def _threads(typing, entry, ranges, most, caller, where):
    """Have threads run the loops whose units are in `entry`, their numbers in `ranges`; how many units raised."""

    def generate(context, builder, signature, values):
        entry, ranges, most, caller, where = values
        entry, ranges = (
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(signature.args, (entry, ranges), strict=False)
        )
        nothing, one, two, numbers = *(ir.Constant(INT, number) for number in range(3)), INT.as_pointer()
        loops = builder.sub(entry.nitems, two)
        asked = cgutils.get_or_insert_function(builder.module, ir.FunctionType(SHORT, []), "get_num_threads")
        threads = builder.sext(builder.call(asked, []), INT)
        threads = builder.select(builder.icmp_signed("<", threads, most), threads, most)
        kind = ir.LiteralStructType([numbers, numbers, numbers, INT, INT, numbers, INT, INT, INT])
        shared = cgutils.alloca_once(builder, kind)
        many = builder.mul(loops, builder.add(threads, two))
        counters = builder.alloca(INT, size=builder.mul(many, ir.Constant(INT, LINE)))
        with cgutils.for_range(builder, many) as counter:
            builder.store(nothing, _counter(builder, counters, counter.index))
        addresses, ends = builder.gep(entry.data, [two]), builder.gep(ranges.data, [loops])
        fields = addresses, ranges.data, ends, loops, threads, counters, nothing, caller, where
        for place, value in enumerate(fields):
            builder.store(value, cgutils.gep_inbounds(builder, shared, 0, place))
        worker, data = _worker(builder.module, kind), builder.bitcast(shared, POINTER)
        with builder.if_else(builder.icmp_signed(">", threads, one)) as (several, alone):
            with several:
                _fork(builder, worker, threads, data)
            with alone:
                first = cgutils.alloca_once_value(builder, ir.Constant(POINTER, None))
                none = ir.Constant(numbers, None)
                builder.call(worker, [first, none, none, data])
        return builder.load(cgutils.gep_inbounds(builder, shared, 0, RAISED))

    return types.int64(entry, ranges, most, caller, where), generate


def _counter(builder, counters, number):
    """Where that counter is."""
    return builder.gep(counters, [builder.mul(number, ir.Constant(INT, LINE))])


def _worker(module, shared):
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
    call = builder.inttoptr(builder.load(field(CALLER)), CALL.as_pointer())
    args = builder.load(field(ARGUMENTS))
    here = builder.ptrtoint(builder.load(worker.args[0]), INT)
    ran = cgutils.alloca_once(builder, INT)
    failed = cgutils.alloca_once_value(builder, ir.Constant(INT, 0))  # units of the loops before
    with cgutils.for_range(builder, loops) as loop:
        unit, begin, end = (builder.load(builder.gep(each, [loop.index])) for each in (addresses, begins, ends))
        # What raises in this loop does not end it, or threads that come late would take units and not run them.
        well = builder.icmp_signed("==", builder.load(failed), ir.Constant(INT, 0))
        units = builder.select(well, builder.sub(end, begin), ir.Constant(INT, 0))
        mine = builder.mul(loop.index, builder.add(threads, ir.Constant(INT, 2)))
        done = _counter(builder, counters, builder.add(mine, threads))
        raised = _counter(builder, counters, builder.add(builder.add(mine, threads), one))
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
            error = builder.call(call, [unit, builder.add(begin, number), args])
            with builder.if_then(builder.trunc(error, ir.IntType(1)), likely=False):
                for counter in (raised, field(RAISED)):
                    builder.atomic_rmw("add", counter, one, "release")
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
        builder.store(builder.add(builder.load(failed), builder.load(raised)), failed)
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
