"""Winograd's transforms, F(4x4, 3x3) and F(2x2, 3x3), as code for vectors of channels.

A tile of m x m outputs reads (m + 2) x (m + 2) inputs.  Y = A' [(G w G') * (B' d B)] A with the multiplication
element by element: for m = 4, 36 products instead of 144, at the price of transforming what goes in and out.
The gradient of the weights is G' [(B' d B) * (A g A')] G, from the same points.  Each transform below is one
dimension of its product, written once, for whatever can be added and scaled: NumPy arrays, or the vectors of
the functions that the compiled loops call.

Source: Lavin & Gray, arXiv:1509.09308, sections 4.1 and 4.3, with the points 0, 1, -1 (2, -2) and infinity.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from minidet.kernels.convolution.cpu.emitter import INDEX, Emitter, literal
from minidet.kernels.convolution.cpu.lanes import LANES, PAIR

TAPS = 3
"""Side of the filters."""


def input_of_4(d):
    """B' d: six inputs -> six points."""
    e, f, g, h = d[3] - 4 * d[1], d[4] - 4 * d[2], d[3] - d[1], d[4] - d[2]
    return [4 * d[0] - 5 * d[2] + d[4], f + e, f - e, h + 2 * g, h - 2 * g, 4 * d[1] - 5 * d[3] + d[5]]


def weight_of_4(w):
    """G w: three weights -> six points."""
    a, b = w[0] + w[2], w[0] + 4 * w[2]
    return [
        1 / 4 * w[0],
        -1 / 6 * (a + w[1]),
        1 / 6 * (w[1] - a),
        1 / 24 * (b + 2 * w[1]),
        1 / 24 * (b - 2 * w[1]),
        w[2],
    ]


def output_of_4(m):
    """A' m: six products -> four outputs."""
    s, d, u, v = m[1] + m[2], m[1] - m[2], m[3] + m[4], m[3] - m[4]
    return [m[0] + s + u, d + 2 * v, s + 4 * u, d + 8 * v + m[5]]


def gradient_of_4(g):
    """A g: the gradient of four outputs -> six points."""
    s, d, u, v = g[0] + g[2], g[1] + g[3], g[0] + 4 * g[2], 2 * g[1] + 8 * g[3]
    return [g[0], s + d, s - d, u + v, u - v, g[3]]


def weight_gradient_of_4(u):
    """G' u: six points -> the gradient of three weights."""
    s, d, a, b = u[1] + u[2], u[2] - u[1], u[3] + u[4], u[3] - u[4]
    return [
        1 / 4 * u[0] - 1 / 6 * s + 1 / 24 * a,
        1 / 6 * d + 1 / 12 * b,
        1 / 6 * (a - s) + u[5],
    ]


def input_of_2(d):
    """B' d: four inputs -> four points."""
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def weight_of_2(w):
    """G w: three weights -> four points."""
    s = w[0] + w[2]
    return [w[0], 1 / 2 * (s + w[1]), 1 / 2 * (s - w[1]), w[2]]


def output_of_2(m):
    """A' m: four products -> two outputs."""
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def gradient_of_2(g):
    """A g: the gradient of two outputs -> four points."""
    return [g[0], g[0] + g[1], g[0] - g[1], -1 * g[1]]


def weight_gradient_of_2(u):
    """G' u: four points -> the gradient of three weights."""
    s = u[1] + u[2]
    return [u[0] + 1 / 2 * s, 1 / 2 * (u[1] - u[2]), 1 / 2 * s + u[3]]


TRANSFORMS = (
    (6, 6, input_of_4), (3, 6, weight_of_4), (6, 4, output_of_4), (4, 6, gradient_of_4), (6, 3, weight_gradient_of_4),
    (4, 4, input_of_2), (3, 4, weight_of_2), (4, 2, output_of_2), (2, 4, gradient_of_2), (4, 3, weight_gradient_of_2),
)  # fmt: skip
"""How many numbers each reads, how many it makes, and the function; compiled code names it by its place here."""

INPUT_4, WEIGHT_4, OUTPUT_4, GRADIENT_4, WEIGHT_GRADIENT_4 = range(5)
INPUT_2, WEIGHT_2, OUTPUT_2, GRADIENT_2, WEIGHT_GRADIENT_2 = range(5, 10)


@register_jitable
def points(side):
    """Products per tile, input channel and filter, for tiles of side x side outputs."""
    return (side + TAPS - 1) ** 2


def both_ways(transform, square):
    """T s T' for a square given as rows: first every column, then every row."""
    columns = [transform(column) for column in zip(*square, strict=True)]
    return [transform(row) for row in zip(*columns, strict=True)]


@intrinsic(prefer_literal=True)
def transform_pixels(typing, x, pitch, zeros, pixels, first, begin, end, target, to, vector, panel, apart, which):
    """The channels begin to end of a square of pixels, transformed, LANES at a time.

    target[to + place(k) + q*apart + lane] = point q of T s T' with
    s[i, j] = x[pixels[first + i*side + j], begin + k*LANES + lane], or zeros where that pixel is negative or has no
    such channel; pixels have `pitch` channels.  Vectors come in panels: place(k) = k // PAIR * panel +
    k % PAIR * vector.
    """
    signature = types.void(
        x, INDEX, zeros, pixels, INDEX, INDEX, INDEX, target, INDEX, INDEX, INDEX, INDEX, which
    )
    reads, makes, transform = TRANSFORMS[literal(which)]

    def generate(context, builder, signature, args):
        emit = Emitter(context, builder, signature, args)
        _, pitch, _, _, first, begin, end, _, to, vector, panel, apart, _ = args
        # Where the pixels are does not depend on the channel: found once, it costs less than what is done with it.
        nothing = emit.pointer(2, begin)
        sources = []
        for q in range(reads * reads):
            pixel = emit.number(3, builder.add(first, emit.index(q)))
            source = emit.pointer(0, builder.add(builder.mul(pixel, pitch), begin))
            outside = builder.icmp_signed("<", pixel, emit.index(0))
            sources.append(builder.select(outside, nothing, source))

        def place_of(k):
            pair, odd = (f(k, emit.index(PAIR)) for f in (builder.udiv, builder.urem))
            return builder.add(to, builder.add(builder.mul(pair, panel), builder.mul(odd, vector)))

        def write(k, load, ahead=False):
            offset = builder.mul(k, emit.index(LANES))
            vectors = [_Vector(emit, load(builder.gep(source, [offset]), offset)) for source in sources]
            square = [vectors[reads * i : reads * (i + 1)] for i in range(reads)]
            if ahead:  # the points lie far apart, which no machine foresees: where the next ones go shall be in cache
                soon = emit.pointer(7, place_of(builder.add(k, emit.index(1))))
                for _ in range(makes * makes):
                    emit.prefetch(soon, write=True)
                    soon = builder.gep(soon, [apart])
            _store_square(emit, both_ways(transform, square), 7, place_of(k), apart, None)

        there, wanted = builder.sub(pitch, begin), builder.sub(end, begin)
        many = builder.sdiv(builder.add(wanted, emit.index(LANES - 1)), emit.index(LANES))
        whole = builder.sdiv(there, emit.index(LANES))
        whole = builder.select(builder.icmp_signed("<", whole, many), whole, many)
        with cgutils.for_range(builder, whole) as k:
            write(k.index, lambda place, offset: emit.load(place, 0), ahead=True)
        with cgutils.for_range(builder, builder.sub(many, whole)) as k:
            write(builder.add(whole, k.index), lambda place, offset: emit.load_some(place, builder.sub(there, offset)))
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def transform_vectors(typing, x, start, pitch, channels, target, to, apart, room, which):
    """LANES channels of a square of numbers, transformed.

    target[to + q*apart + lane] = point q of T s T' with s[i, j] = x[start + (i*side + j)*pitch + lane], for
    lanes below `room`; from `channels` on, what is read counts as zero.
    """
    signature = types.void(x, INDEX, INDEX, INDEX, target, INDEX, INDEX, INDEX, which)
    reads, _, transform = TRANSFORMS[literal(which)]

    def generate(context, builder, signature, args):
        emit = Emitter(context, builder, signature, args)
        _, start, pitch, channels, _, to, apart, room, _ = args

        def read(q: int):
            offset = builder.add(start, builder.mul(pitch, emit.index(q)))
            return _Vector(emit, emit.load_some(emit.pointer(0, offset), channels))

        square = [[read(reads * i + j) for j in range(reads)] for i in range(reads)]
        _store_square(emit, both_ways(transform, square), 4, to, apart, room)
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def scatter_outputs(
    typing, m, start, apart, y, shortcut, pitch, targets, target, begin, end, epilogue, floor, nowhere, which
):
    """One tile's outputs, columns begin to end of them, from its products at m[start + q*apart + column - begin].

    y[targets[target + side*i + j], column] = max(floor, shortcut[the same place] + add + scale * (A' m A)[i, j]) for
    every pixel that is not negative; the others go to `nowhere`, which has room for `end` numbers.  The epilogue and
    the shortcut are multiply_tile's.
    """
    signature = types.void(
        m, INDEX, INDEX, y, shortcut, INDEX, targets, INDEX, INDEX, INDEX, epilogue, types.float32, nowhere, which
    )
    reads, writes, transform = TRANSFORMS[literal(which)]

    def generate(context, builder, signature, args):
        emit = Emitter(context, builder, signature, args)
        _, start, apart, _, _, pitch, _, target, begin, end, _, floor, _, _ = args
        lost, places, more = emit.pointer(12, begin), [], []
        for q in range(writes * writes):
            pixel = emit.number(6, builder.add(target, emit.index(q)))
            outside = builder.icmp_signed("<", pixel, emit.index(0))
            place = builder.add(builder.mul(pixel, pitch), begin)
            places.append(builder.select(outside, lost, emit.pointer(3, place)))
            more.append(builder.select(outside, lost, emit.pointer(4, place)))
        low, wanted = emit.broadcast(floor), builder.sub(end, begin)
        many = builder.sdiv(builder.add(wanted, emit.index(LANES - 1)), emit.index(LANES))
        scales, adds = emit.epilogue(10, begin)
        with cgutils.for_range(builder, many) as k:
            offset = builder.mul(k.index, emit.index(LANES))
            scale, add = (emit.load(builder.gep(values, [offset]), 0) for values in (scales, adds))
            source, vectors = emit.pointer(0, builder.add(start, offset)), []
            for _ in range(reads * reads):
                vectors.append(_Vector(emit, emit.load(source, 0)))
                source = builder.gep(source, [apart])
            square = [vectors[reads * i : reads * (i + 1)] for i in range(reads)]
            results = [vector for row in both_ways(transform, square) for vector in row]
            valid = builder.sub(wanted, offset)

            def finish(joined: bool) -> None:
                for vector, place, other in zip(results, places, more, strict=True):
                    added = add
                    if joined:
                        added = builder.fadd(add, emit.load_some(builder.gep(other, [offset]), valid))
                    value = emit.finish(vector.value, scale, added, low)
                    emit.store_some(value, builder.gep(place, [offset]), 0, valid)

            emit.if_any(4, finish)
        return context.get_dummy_value()

    return signature, generate


def _store_square(emit: Emitter, square, argument: int, to, apart, room) -> None:
    """The points of a square, `apart` from each other, into that array argument."""
    place = emit.pointer(argument, to)
    for vector in (v for row in square for v in row):
        if room is None:
            emit.store(vector.value, place, 0)
        else:
            emit.store_some(vector.value, place, 0, room)
        place = emit.builder.gep(place, [apart])


class _Vector:
    """LANES numbers in a register, added, subtracted and scaled as an array would be."""

    def __init__(self, emit: Emitter, value) -> None:
        self.emit, self.value = emit, value

    def __add__(self, other: _Vector) -> _Vector:
        return _Vector(self.emit, self.emit.builder.fadd(self.value, other.value, flags=("contract",)))

    def __sub__(self, other: _Vector) -> _Vector:
        return _Vector(self.emit, self.emit.builder.fsub(self.value, other.value, flags=("contract",)))

    def __rmul__(self, factor: float) -> _Vector:
        constant = ir.Constant(self.emit.vector, [float(factor)] * LANES)
        return _Vector(self.emit, self.emit.builder.fmul(constant, self.value, flags=("contract",)))
