"""The register tile: the few lines of machine code in which a convolution spends its time.

Numba's own loops keep their sums in memory and stop at a quarter of what the machine can do.  These functions write
LLVM's intermediate language instead, with one explicit vector variable per register: LLVM keeps a ROWS x VECTORS tile
of sums in registers while one broadcast input at a time meets a row of weights, as fast as the machine multiplies.

Every function here takes flat arrays and offsets in elements.  The numbers of rows and vectors are literals: each
combination is a function of its own, unrolled.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from minidet.kernels.compiler import inner
from minidet.kernels.convolution.cpu.emitter import INDEX, Emitter, Sums, literal
from minidet.kernels.convolution.cpu.lanes import FILTERS, GROUP, LANES, LINE, PAIR, ROWS, UNROLLED, VECTORS


@intrinsic(prefer_literal=True)
def multiply_tile(
    typing, x, pitch, zeros, sources, source, shift, taps, depth, panels, panel, ahead,
    y, shortcut, y_pitch, targets, target, y_shift, column, valid, epilogue, floor, begun, more, rows, vectors,
):  # fmt: skip
    """One tile of a convolution: gather, multiply, add up, finish, store.

    y[pixel(m), column + j] = max(floor, shortcut[pixel(m), column + j] + add[j] + scale[j] *
        sum_{t < taps, k < depth} x[pixel(t, m), k] * panels[panel + (t*depth + k)*width + j])

    for m < rows and j < valid, with width = vectors * LANES.  Pixels are `pitch` and `y_pitch` numbers
    apart: pixel(t, m) = shift + sources[source + t*rows + m], or a row of `zeros` where that source is
    negative, and pixel(m) = y_shift + targets[target + m].  `scale` and `add` are the two halves of
    `epilogue`, from `column` on.  A shortcut that is empty adds nothing.  NaN stays NaN.  Meanwhile the
    cache fetches one GROUP-th of such a panel, from `ahead` on.

    Of taps that come in several calls, all but the first find the sums `begun` in y, and all but the last leave them
    there, for there are `more`.
    """
    signature = types.void(
        x, INDEX, zeros, sources, INDEX, INDEX, INDEX, INDEX, panels, INDEX, INDEX,
        y, shortcut, INDEX, targets, INDEX, INDEX, INDEX, INDEX, epilogue, types.float32, types.boolean,
        types.boolean, rows, vectors,
    )  # fmt: skip
    rows, vectors = literal(rows), literal(vectors)

    def generate(context, builder, signature, args):
        emit = Emitter(context, builder, signature, args)
        _, pitch, _, _, source, shift, taps, depth, _, panel, ahead = args[:11]
        _, _, y_pitch, _, target, y_shift, column, valid, _, floor, begun, more, _, _ = args[11:]
        sums = Sums(emit, rows, vectors)
        width = emit.index(vectors * LANES)
        nothing = emit.pointer(2, emit.index(0))
        places = []
        for m in range(rows):
            pixel = builder.add(emit.number(14, builder.add(target, emit.index(m))), y_shift)
            places.append(builder.add(builder.mul(pixel, y_pitch), column))

        def fetch(joined: bool) -> None:
            for place in places if joined else ():
                for v in range(0, vectors, max(1, LINE // 4 // LANES)):
                    emit.prefetch(emit.pointer(12, builder.add(place, emit.index(v * LANES))))

        # Its rows are far from each other, which no machine foresees: by the time they are added, they shall be there.
        emit.if_any(12, fetch)
        with builder.if_then(begun):
            for m, place in enumerate(places):
                for v in range(vectors):
                    sums.begin(m, v, emit.load_some(emit.pointer(11, place), valid, v))
        with cgutils.for_range(builder, taps) as tap:
            first = builder.add(source, builder.mul(tap.index, emit.index(rows)))
            inputs = []
            for m in range(rows):
                pixel = emit.number(3, builder.add(first, emit.index(m)))
                place = emit.pointer(0, builder.mul(builder.add(pixel, shift), pitch))
                outside = builder.icmp_signed("<", pixel, emit.index(0))
                inputs.append(builder.select(outside, nothing, place))
            place = builder.mul(builder.mul(tap.index, depth), width)
            weights = emit.pointer(8, builder.add(panel, place))
            # A part of the panel that comes next, as far into its share as this tile is into its own.
            soon = emit.pointer(8, builder.add(ahead, builder.sdiv(place, emit.index(GROUP))))

            def multiply(k):
                here = builder.gep(weights, [builder.mul(k, width)])
                sums.add([builder.gep(row, [k]) for row in inputs], here)

            lines = -(-UNROLLED * vectors * LANES // GROUP // (LINE // 4))
            emit.repeat(depth, multiply, lambda turn: emit.prefetch_lines(soon, turn, lines))
        low, totals = emit.broadcast(floor), sums.totals()
        scales, adds = emit.epilogue(19, column)

        def finish(joined: bool) -> None:
            for place, row in zip(places, totals, strict=True):
                for v, total in enumerate(row):
                    scale, add = emit.load(scales, v), emit.load(adds, v)
                    if joined:
                        add = builder.fadd(add, emit.load_some(emit.pointer(12, place), valid, v))
                    value = emit.finish(total, scale, add, low)
                    emit.store_some(value, emit.pointer(11, place), v, valid)

        with builder.if_else(more) as (then, otherwise):
            with then:
                for place, row in zip(places, totals, strict=True):
                    for v, total in enumerate(row):
                        emit.store_some(total, emit.pointer(11, place), v, valid)
            with otherwise:
                emit.if_any(12, finish)
        return context.get_dummy_value()

    return signature, generate


@inner(forceinline=True)
def multiply_rows(
    vectors, x, pitch, zeros, sources, source, shift, taps, depth, panels, panel, ahead,
    y, shortcut, y_pitch, targets, target, y_shift, column, valid, epilogue, floor, begun, more,
):  # fmt: skip
    """`multiply_tile` of ROWS rows and so many vectors, 1 to VECTORS."""
    if VECTORS > 3 and vectors == 4:
        multiply_tile(
            x, pitch, zeros, sources, source, shift, taps, depth, panels, panel, ahead,
            y, shortcut, y_pitch, targets, target, y_shift, column, valid, epilogue, floor, begun, more, ROWS, 4,
        )  # fmt: skip
    elif VECTORS > 2 and vectors == 3:
        multiply_tile(
            x, pitch, zeros, sources, source, shift, taps, depth, panels, panel, ahead,
            y, shortcut, y_pitch, targets, target, y_shift, column, valid, epilogue, floor, begun, more, ROWS, 3,
        )  # fmt: skip
    elif vectors == 2:
        multiply_tile(
            x, pitch, zeros, sources, source, shift, taps, depth, panels, panel, ahead,
            y, shortcut, y_pitch, targets, target, y_shift, column, valid, epilogue, floor, begun, more, ROWS, 2,
        )  # fmt: skip
    else:
        multiply_tile(
            x, pitch, zeros, sources, source, shift, taps, depth, panels, panel, ahead,
            y, shortcut, y_pitch, targets, target, y_shift, column, valid, epilogue, floor, begun, more, ROWS, 1,
        )  # fmt: skip


@intrinsic(prefer_literal=True)
def product_tile(typing, a, first_a, pitch_a, b, first_b, depth, ahead, c, first_c, pitch_c, rows, vectors):
    """One tile of a matrix product, and nothing else.

    c[first_c + m*pitch_c + j] = sum_{k < depth} a[first_a + m*pitch_a + k] * b[first_b + k*width + j]

    for m < rows and j < width = vectors * LANES.  Meanwhile the cache fetches a few lines of b, from `ahead` on.
    """
    signature = types.void(a, INDEX, INDEX, b, INDEX, INDEX, INDEX, c, INDEX, INDEX, rows, vectors)
    rows, vectors = literal(rows), literal(vectors)

    def generate(context, builder, signature, args):
        emit = Emitter(context, builder, signature, args)
        _, first_a, pitch_a, _, first_b, depth, ahead, _, first_c, pitch_c, _, _ = args
        sums = Sums(emit, rows, vectors)
        right, width, ahead = emit.pointer(3, first_b), emit.index(vectors * LANES), emit.pointer(3, ahead)

        def row(argument, first, pitch, m):
            return emit.pointer(argument, builder.add(first, builder.mul(pitch, emit.index(m))))

        inputs = [row(0, first_a, pitch_a, m) for m in range(rows)]

        def multiply(k):
            here = builder.gep(right, [builder.mul(k, width)])
            sums.add([builder.gep(place, [k]) for place in inputs], here)

        emit.repeat(depth, multiply, lambda turn: emit.prefetch_lines(ahead, turn, 1))
        for m, totals in enumerate(sums.totals()):
            for v, total in enumerate(totals):
                emit.store(total, row(7, first_c, pitch_c, m), v)
        return context.get_dummy_value()

    return signature, generate


@inner(forceinline=True)
def product_rows(vectors, a, first_a, pitch_a, b, first_b, depth, ahead, c, first_c, pitch_c):
    """`product_tile` of ROWS rows and so many vectors, 1 to VECTORS."""
    if VECTORS > 3 and vectors == 4:
        product_tile(a, first_a, pitch_a, b, first_b, depth, ahead, c, first_c, pitch_c, ROWS, 4)
    elif VECTORS > 2 and vectors == 3:
        product_tile(a, first_a, pitch_a, b, first_b, depth, ahead, c, first_c, pitch_c, ROWS, 3)
    elif vectors == 2:
        product_tile(a, first_a, pitch_a, b, first_b, depth, ahead, c, first_c, pitch_c, ROWS, 2)
    else:
        product_tile(a, first_a, pitch_a, b, first_b, depth, ahead, c, first_c, pitch_c, ROWS, 1)


@intrinsic(prefer_literal=True)
def accumulate_tile(
    typing, a, first_a, pitch_a, run_a, b, first_b, pitch_b, run_b, count, runs, c, first_c, pitch, begun, rows, vectors
):
    """Add outer products, `runs` times `count` of them, to a tile, or, unless that is `begun`, to zeros.

    c[first_c + m*pitch + j] += sum_{r < runs, p < count} a[first_a + r*run_a + p*pitch_a + m] *
        b[first_b + r*run_b + p*pitch_b + j]

    for m < rows and j < vectors * LANES.  Meanwhile the cache fetches the sums of the next `rows` rows.
    """
    signature = types.void(
        a, INDEX, INDEX, INDEX, b, INDEX, INDEX, INDEX, INDEX, INDEX, c, INDEX, INDEX, types.boolean, rows, vectors
    )
    rows, vectors = literal(rows), literal(vectors)

    def generate(context, builder, signature, args):
        emit = Emitter(context, builder, signature, args)
        _, first_a, pitch_a, run_a, _, first_b, pitch_b, run_b, count, runs, _, first_c, pitch, begun, _, _ = args
        targets = [emit.pointer(10, builder.add(first_c, builder.mul(pitch, emit.index(m)))) for m in range(rows)]
        sums = Sums(emit, rows, vectors)
        with builder.if_then(begun):
            for m, target in enumerate(targets):
                for v in range(vectors):
                    sums.begin(m, v, emit.load(target, v))
        # The sums of the next rows, which come next: by then they shall be in cache.
        beyond = builder.mul(pitch, emit.index(rows))
        for row in targets:
            for v in range(0, vectors, max(1, LINE // 4 // LANES)):
                emit.prefetch(builder.gep(row, [builder.add(beyond, emit.index(v * LANES))]))
        with cgutils.for_range(builder, runs) as run:
            left = emit.pointer(0, builder.add(first_a, builder.mul(run.index, run_a)))
            right = emit.pointer(4, builder.add(first_b, builder.mul(run.index, run_b)))

            def multiply(p):
                column = builder.gep(left, [builder.mul(p, pitch_a)])
                here = builder.gep(right, [builder.mul(p, pitch_b)])
                sums.add([builder.gep(column, [emit.index(m)]) for m in range(rows)], here)

            emit.repeat(count, multiply)
        for row, target in zip(sums.totals(), targets, strict=True):
            for v, total in enumerate(row):
                emit.store(total, target, v)
        return context.get_dummy_value()

    return signature, generate


@inner(forceinline=True)
def accumulate_rows(
    vectors, a, first_a, pitch_a, run_a, b, first_b, pitch_b, run_b, count, runs, c, first_c, pitch, begun
):  # fmt: skip
    """`accumulate_tile` of FILTERS rows and so many vectors, 1 or PAIR; with pitch_b 0, b is a panel of just those."""
    if vectors == PAIR:
        step = PAIR * LANES if pitch_b == 0 else pitch_b
        accumulate_tile(
            a, first_a, pitch_a, run_a, b, first_b, step, run_b, count, runs, c, first_c, pitch, begun, FILTERS, PAIR
        )
    else:
        step = LANES if pitch_b == 0 else pitch_b
        accumulate_tile(
            a, first_a, pitch_a, run_a, b, first_b, step, run_b, count, runs, c, first_c, pitch, begun, FILTERS, 1
        )


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
