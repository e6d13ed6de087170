"""Writes vector instructions into a compiled function, where Numba's own translation would not use them well."""

from __future__ import annotations

from itertools import cycle

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError

from minidet.kernels.convolution.cpu.lanes import LANES, LINE, UNROLLED

INDEX = types.intp


class Emitter:
    """Writes vector instructions for one call of an intrinsic."""

    def __init__(self, context, builder, signature, args, lanes: int = LANES) -> None:
        self.context, self.builder, self.types, self.args = context, builder, signature.args, args
        self.vector = ir.VectorType(ir.FloatType(), lanes)
        self.lanes = lanes

    def index(self, value: int):
        """A constant for offsets."""
        return ir.Constant(ir.IntType(64), value)

    def pointer(self, argument: int, offset):
        """Where element `offset` of that array argument is."""
        return self.builder.gep(self._array(argument).data, [offset])

    def number(self, argument: int, offset):
        """Element `offset` of that array of small integers, as an index."""
        return self.builder.sext(self.builder.load(self.pointer(argument, offset)), ir.IntType(64))

    def if_any(self, argument: int, write) -> None:
        """write(True) where that array argument has elements, write(False) where it is empty."""
        some = self.builder.icmp_signed(">", self._array(argument).nitems, self.index(0))
        with self.builder.if_else(some) as (then, otherwise):
            with then:
                write(True)
            with otherwise:
                write(False)

    def epilogue(self, argument: int, column):
        """Where the scales and the shifts of the columns from `column` on are: halves of that array."""
        scales = self.pointer(argument, column)
        half = self.builder.sdiv(self._array(argument).nitems, self.index(2))
        return scales, self.builder.gep(scales, [half])

    def repeat(self, times, body, turn_begins=lambda turn: None) -> None:
        """body(0), body(1), ... body(times - 1), UNROLLED of them in a turn while there are as many."""
        builder, step = self.builder, self.index(UNROLLED)
        turns = builder.udiv(times, step)
        with cgutils.for_range(builder, turns) as turn:
            turn_begins(turn.index)
            first = builder.mul(turn.index, step)
            for i in range(UNROLLED):
                body(builder.add(first, self.index(i)))
        done = builder.mul(turns, step)
        with cgutils.for_range(builder, builder.sub(times, done)) as left:
            body(builder.add(done, left.index))

    def finish(self, value, scale, add, low):
        """max(low, add + scale * value)."""
        value = self.fma(value, scale, add)
        # An ordered comparison is false for NaN, so NaN is kept.
        return self.builder.select(self.builder.fcmp_ordered("<", value, low), low, value)

    def variable(self):
        """A vector that LLVM will keep in a register, zero at first."""
        slot = cgutils.alloca_once(self.builder, self.vector)
        self.builder.store(ir.Constant(self.vector, None), slot)
        return slot

    def load(self, pointer, v: int):
        """The v-th vector behind `pointer`, which need not be aligned."""
        return self.builder.load(self._vectors(pointer, v), align=4)

    def store(self, value, pointer, v: int) -> None:
        """Write the v-th vector behind `pointer`."""
        self.builder.store(value, self._vectors(pointer, v), align=4)

    def prefetch(self, pointer, level: int = 1, *, write: bool = False) -> None:
        """Have the cache of that level fetch the line there, which is soon read, or written."""
        short = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, short, short, short])
        fetch = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        self.builder.call(fetch, [pointer, *(ir.Constant(short, number) for number in (int(write), 4 - level, 1))])

    def prefetch_lines(self, pointer, turn, lines: int) -> None:
        """Have the second-level cache fetch the `turn`-th so many lines behind `pointer`."""
        for line in range(lines):
            place = self.builder.add(self.builder.mul(turn, self.index(lines)), self.index(line))
            self.prefetch(self.builder.gep(pointer, [self.builder.mul(place, self.index(LINE // 4))]), 2)

    def load_some(self, pointer, valid, v: int = 0):
        """The v-th vector behind `pointer`, its lanes from column `valid` on as zeros that are not read."""
        vector, mask = self._vectors(pointer, v), self._below(valid, v * self.lanes)
        align = ir.Constant(ir.IntType(32), 4)
        kind = ir.FunctionType(self.vector, [vector.type, align.type, mask.type, self.vector])
        name = f"llvm.masked.load.v{self.lanes}f32.p0"
        load = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(load, [vector, align, mask, ir.Constant(self.vector, None)])

    def store_some(self, value, pointer, v: int, valid) -> None:
        """Store those lanes of the v-th vector whose column is below `valid`."""
        first = v * self.lanes
        whole = self.builder.icmp_signed(">=", valid, self.index(first + self.lanes))
        with self.builder.if_else(whole) as (then, otherwise):
            with then:
                self.store(value, pointer, v)
            with otherwise:
                self._masked_store(value, pointer, v, self._below(valid, first))

    def broadcast(self, scalar):
        """A vector of one number."""
        empty = ir.Constant(ir.VectorType(scalar.type, self.lanes), ir.Undefined)
        one = self.builder.insert_element(empty, scalar, ir.Constant(ir.IntType(32), 0))
        first = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(one, empty, first)

    def fma(self, a, b, c):
        """a * b + c, fused where the machine can: `fma` itself would be a library call elsewhere."""
        kind = ir.FunctionType(self.vector, [self.vector] * 3)
        name = f"llvm.fmuladd.v{self.lanes}f32"
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), [a, b, c])

    def multiply_add(self, inputs, weights, sums) -> None:
        """sums[m][v] += inputs[m] * weights[v] for every row m and vector v of a tile."""
        loaded = [self.load(weights, v) for v in range(len(sums[0]))]
        for pointer, row in zip(inputs, sums, strict=True):
            scalar = self.broadcast(self.builder.load(pointer))
            for weight, total in zip(loaded, row, strict=True):
                self.builder.store(self.fma(scalar, weight, self.builder.load(total)), total)

    def _below(self, valid, first: int):
        """Which lanes of a vector whose first is column `first` are below `valid`."""
        columns = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), list(range(first, first + self.lanes)))
        return self.builder.icmp_signed("<", columns, self.broadcast(self.builder.trunc(valid, ir.IntType(32))))

    def _masked_store(self, value, pointer, v: int, mask) -> None:
        target = self._vectors(pointer, v)
        align = ir.Constant(ir.IntType(32), 4)
        kind = ir.FunctionType(ir.VoidType(), [self.vector, target.type, align.type, mask.type])
        name = f"llvm.masked.store.v{self.lanes}f32.p0"
        store = cgutils.get_or_insert_function(self.builder.module, kind, name)
        self.builder.call(store, [value, target, align, mask])

    def _array(self, argument: int):
        return self.context.make_array(self.types[argument])(
            self.context, self.builder, self.args[argument]
        )

    def _vectors(self, pointer, v: int):
        shifted = self.builder.gep(pointer, [self.index(v * self.lanes)])
        return self.builder.bitcast(shifted, self.vector.as_pointer())


class Sums:
    """The sums of a register tile, zero at first.

    There are two of each where a row is one vector, and every second product goes to the second: so few sums are done
    sooner than a multiplication, which would wait for the one before it.
    """

    def __init__(self, emit: Emitter, rows: int, vectors: int) -> None:
        self._emit = emit
        self._copies = [
            [[emit.variable() for _ in range(vectors)] for _ in range(rows)] for _ in range(2 if vectors == 1 else 1)
        ]
        self._turns = cycle(self._copies)

    def begin(self, m: int, v: int, value) -> None:
        """Begin a sum with that value."""
        self._emit.builder.store(value, self._copies[0][m][v])

    def add(self, inputs, weights) -> None:
        """Products of one input for every row with a row of weights, as `Emitter.multiply_add` adds them."""
        self._emit.multiply_add(inputs, weights, next(self._turns))

    def totals(self) -> list[list]:
        """The sums, as values."""
        builder = self._emit.builder
        first, *more = ([[builder.load(total) for total in row] for row in sums] for sums in self._copies)
        for sums in more:
            first = [[builder.fadd(a, b) for a, b in zip(*rows, strict=True)] for rows in zip(first, sums, strict=True)]
        return first


def literal(kind) -> int:
    """The number behind an argument's type, which must be a literal."""
    if not isinstance(kind, types.IntegerLiteral):
        raise TypingError("what the code depends on must be a literal integer")
    return kind.literal_value
