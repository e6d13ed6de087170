"""The register tile: the few lines of machine code in which a convolution spends its time.

Numba's own loops keep their sums in memory and stop at a quarter of what the machine can do.  These
functions write LLVM's intermediate language instead, with one explicit vector variable per register: LLVM
keeps a ROWS x VECTORS tile of sums in registers while one broadcast input at a time meets one row of
weights, which is as fast as the machine multiplies.

Every function here takes flat arrays and offsets in elements.  The numbers of rows and vectors
are literals: each combination is a function of its own, unrolled.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

from minidet.kernels.convolution.cpu.lanes import LANES

INDEX = types.intp


@intrinsic(prefer_literal=True)
def multiply_tile(
    typing, x, pitch, zeros, sources, source, shift, taps, depth, panels, panel,
    y, y_pitch, targets, target, y_shift, column, valid, epilogue, floor, rows, vectors,
):  # fmt: skip
    """One tile of a convolution: gather, multiply, add up, finish, store.

    y[pixel(m), column + j] = max(floor, add[j] + scale[j] *
        sum_{t < taps, k < depth} x[pixel(t, m), k] * panels[panel + (t*depth + k)*width + j])

    for m < rows and j < valid, with width = vectors * LANES.  Pixels are `pitch` and `y_pitch` numbers
    apart: pixel(t, m) = shift + sources[source + t*rows + m], or a row of `zeros` where that source is
    negative, and pixel(m) = y_shift + targets[target + m].  `scale` and `add` are the two halves of
    `epilogue`, from `column` on.  NaN stays NaN.
    """
    signature = types.void(
        x, INDEX, zeros, sources, INDEX, INDEX, INDEX, INDEX, panels, INDEX,
        y, INDEX, targets, INDEX, INDEX, INDEX, INDEX, epilogue, types.float32, rows, vectors,
    )  # fmt: skip
    rows, vectors = literal(rows), literal(vectors)

    def generate(context, builder, signature, args):
        emit = Emitter(context, builder, signature, args)
        _, pitch, _, _, source, shift, taps, depth, _, panel = args[:10]
        _, y_pitch, _, target, y_shift, column, valid, _, floor, _, _ = args[10:]
        sums = [[emit.variable() for _ in range(vectors)] for _ in range(rows)]
        width = emit.index(vectors * LANES)
        nothing = emit.pointer(2, emit.index(0))
        with cgutils.for_range(builder, taps) as tap:
            first = builder.add(source, builder.mul(tap.index, emit.index(rows)))
            inputs = []
            for m in range(rows):
                pixel = emit.number(3, builder.add(first, emit.index(m)))
                place = emit.pointer(0, builder.mul(builder.add(pixel, shift), pitch))
                outside = builder.icmp_signed("<", pixel, emit.index(0))
                inputs.append(builder.select(outside, nothing, place))
            weights = emit.pointer(8, builder.add(panel, builder.mul(builder.mul(tap.index, depth), width)))
            with cgutils.for_range(builder, depth) as k:
                here = builder.gep(weights, [builder.mul(k.index, width)])
                emit.multiply_add([builder.gep(row, [k.index]) for row in inputs], here, sums)
        low = emit.broadcast(floor)
        scales, adds = emit.epilogue(17, column)
        for m, row in enumerate(sums):
            pixel = builder.add(emit.number(12, builder.add(target, emit.index(m))), y_shift)
            place = emit.pointer(10, builder.add(builder.mul(pixel, y_pitch), column))
            for v, total in enumerate(row):
                scale, add = emit.load(scales, v), emit.load(adds, v)
                emit.store_some(emit.finish(builder.load(total), scale, add, low), place, v, valid)
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def accumulate_tile(
    typing, a, first_a, pitch_a, run_a, b, first_b, run_b, count, runs, c, first_c, pitch, rows, vectors
):
    """Add outer products, `runs` times `count` of them, to a tile.

    c[first_c + m*pitch + j] += sum_{r < runs, p < count} a[first_a + r*run_a + p*pitch_a + m] *
        b[first_b + r*run_b + p*width + j]

    for m < rows and j < width = vectors * LANES.
    """
    signature = types.void(
        a, INDEX, INDEX, INDEX, b, INDEX, INDEX, INDEX, INDEX, c, INDEX, INDEX, rows, vectors
    )
    rows, vectors = literal(rows), literal(vectors)

    def generate(context, builder, signature, args):
        emit = Emitter(context, builder, signature, args)
        _, first_a, pitch_a, run_a, _, first_b, run_b, count, runs, _, first_c, pitch, _, _ = args
        targets = [
            emit.pointer(9, builder.add(first_c, builder.mul(pitch, emit.index(m)))) for m in range(rows)
        ]
        sums = [[emit.variable(emit.load(row, v)) for v in range(vectors)] for row in targets]
        with cgutils.for_range(builder, runs) as run:
            left = emit.pointer(0, builder.add(first_a, builder.mul(run.index, run_a)))
            right = emit.pointer(4, builder.add(first_b, builder.mul(run.index, run_b)))
            with cgutils.for_range(builder, count) as p:
                column = builder.gep(left, [builder.mul(p.index, pitch_a)])
                here = builder.gep(right, [builder.mul(p.index, emit.index(vectors * LANES))])
                emit.multiply_add([builder.gep(column, [emit.index(m)]) for m in range(rows)], here, sums)
        for row, target in zip(sums, targets, strict=True):
            for v, total in enumerate(row):
                emit.store(builder.load(total), target, v)
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def copy_run(typing, target, to, source, start, length):
    """target[to : to + length] = source[start : start + length] in one move; `length` is a literal."""
    signature = types.void(target, INDEX, source, INDEX, length)
    length = literal(length)

    def generate(context, builder, signature, args):
        emit = Emitter(context, builder, signature, args, lanes=length)
        emit.store(emit.load(emit.pointer(2, args[3]), 0), emit.pointer(0, args[1]), 0)
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def transpose_square(typing, target, to, target_pitch, source, start, source_pitch, length):
    """target[to + k*target_pitch + j] = source[start + j*source_pitch + k] for j, k < length.

    `length` is a literal power of two.  Interleaving row i with row i + length/2, for every i, and doing
    so log2(length) times, transposes a square.
    """
    signature = types.void(target, INDEX, INDEX, source, INDEX, INDEX, length)
    length = literal(length)

    def generate(context, builder, signature, args):
        emit = Emitter(context, builder, signature, args, lanes=length)
        _, to, target_pitch, _, start, source_pitch, _ = args
        rows = [
            emit.load(emit.pointer(3, builder.add(start, builder.mul(source_pitch, emit.index(j)))), 0)
            for j in range(length)
        ]
        low = [i // 2 + length * (i % 2) for i in range(length)]
        masks = [
            ir.Constant(ir.VectorType(ir.IntType(32), length), [i + half for i in low])
            for half in (0, length // 2)
        ]
        for _ in range(length.bit_length() - 1):
            pairs = zip(rows[: length // 2], rows[length // 2 :], strict=True)
            rows = [builder.shuffle_vector(a, b, mask) for a, b in pairs for mask in masks]
        for k, row in enumerate(rows):
            emit.store(row, emit.pointer(0, builder.add(to, builder.mul(target_pitch, emit.index(k)))), 0)
        return context.get_dummy_value()

    return signature, generate


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

    def epilogue(self, argument: int, column):
        """Where the scales and the shifts of the columns from `column` on are: halves of that array."""
        scales = self.pointer(argument, column)
        half = self.builder.sdiv(self._array(argument).nitems, self.index(2))
        return scales, self.builder.gep(scales, [half])

    def finish(self, value, scale, add, low):
        """max(low, add + scale * value)."""
        value = self.fma(value, scale, add)
        # An ordered comparison is false for NaN, so NaN is kept.
        return self.builder.select(self.builder.fcmp_ordered("<", value, low), low, value)

    def variable(self, value=None):
        """A vector that LLVM will keep in a register, zero unless told otherwise."""
        slot = cgutils.alloca_once(self.builder, self.vector)
        self.builder.store(ir.Constant(self.vector, None) if value is None else value, slot)
        return slot

    def load(self, pointer, v: int):
        """The v-th vector behind `pointer`, which need not be aligned."""
        return self.builder.load(self._vectors(pointer, v), align=4)

    def store(self, value, pointer, v: int) -> None:
        """Write the v-th vector behind `pointer`."""
        self.builder.store(value, self._vectors(pointer, v), align=4)

    def load_some(self, pointer, valid):
        """The vector behind `pointer`, its lanes from `valid` on as zeros that are not read."""
        vector, mask = self._vectors(pointer, 0), self._below(valid, 0)
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


def literal(kind) -> int:
    """The number behind an argument's type, which must be a literal."""
    if not isinstance(kind, types.IntegerLiteral):
        raise TypingError("what the code depends on must be a literal integer")
    return kind.literal_value
