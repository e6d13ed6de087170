"""The transforms of Winograd's F(4x4, 3x3), as code for vectors of channels.

A tile of 4x4 outputs reads 6x6 inputs.  Y = A' [(G w G') * (B' d B)] A with the multiplication element by
element: 36 products instead of 144, at the price of transforming what goes in and out.  Each transform
below is one dimension of it, written once, for whatever can be added and scaled: NumPy arrays, or the
vectors of the two functions that the compiled loops call.

Source: Lavin & Gray, arXiv:1509.09308, section 4.3, with the points 0, 1, -1, 2, -2 and infinity.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from minidet.kernels.convolution.cpu.lanes import LANES
from minidet.kernels.convolution.cpu.microkernel import INDEX, Emitter

OUTPUTS, INPUTS = 4, 6
"""Sides of a tile of outputs, and of the inputs that it reads."""


def input_transform(d):
    """B' d: six inputs -> six."""
    e, f, g, h = d[3] - 4 * d[1], d[4] - 4 * d[2], d[3] - d[1], d[4] - d[2]
    return [4 * d[0] - 5 * d[2] + d[4], f + e, f - e, h + 2 * g, h - 2 * g, 4 * d[1] - 5 * d[3] + d[5]]


def weight_transform(w):
    """G w: three weights -> six."""
    a, b = w[0] + w[2], w[0] + 4 * w[2]
    return [
        1 / 4 * w[0],
        -1 / 6 * (a + w[1]),
        1 / 6 * (w[1] - a),
        1 / 24 * (b + 2 * w[1]),
        1 / 24 * (b - 2 * w[1]),
        w[2],
    ]


def output_transform(m):
    """A' m: six products -> four outputs."""
    s, d, u, v = m[1] + m[2], m[1] - m[2], m[3] + m[4], m[3] - m[4]
    return [m[0] + s + u, d + 2 * v, s + 4 * u, d + 8 * v + m[5]]


def both_ways(transform, square):
    """T s T' for a square given as rows: first every column, then every row."""
    columns = [transform(column) for column in zip(*square, strict=True)]
    return [transform(row) for row in zip(*columns, strict=True)]


@intrinsic
def gather_inputs(typing, x, pitch, zeros, patches, patch, channel, target, to, apart):
    """One tile's inputs, LANES channels of them, transformed.

    target[to + q*apart + lane] = (B' d B)[q // 6, q % 6] with d[i, j] = x[patches[patch + 6*i + j],
    channel + lane], or zeros where that pixel is negative; pixels are `pitch` numbers apart.
    """
    signature = types.void(x, INDEX, zeros, patches, INDEX, INDEX, target, INDEX, INDEX)

    def generate(context, builder, signature, args):
        emit = Emitter(context, builder, signature, args)
        _, pitch, _, _, patch, channel, _, to, apart = args
        nothing = emit.pointer(2, emit.index(0))

        def read(q: int):
            pixel = emit.number(3, builder.add(patch, emit.index(q)))
            place = emit.pointer(0, builder.add(builder.mul(pixel, pitch), channel))
            outside = builder.icmp_signed("<", pixel, emit.index(0))
            return _Vector(emit, emit.load(builder.select(outside, nothing, place), 0))

        square = [[read(INPUTS * i + j) for j in range(INPUTS)] for i in range(INPUTS)]
        for i, row in enumerate(both_ways(input_transform, square)):
            for j, vector in enumerate(row):
                offset = builder.add(to, builder.mul(apart, emit.index(INPUTS * i + j)))
                emit.store(vector.value, emit.pointer(6, offset), 0)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def scatter_outputs(typing, m, start, apart, y, pitch, targets, target, column, valid, epilogue, floor):
    """One tile's outputs, LANES columns of them, from its 36 products at m[start + q*apart].

    y[targets[target + 4*i + j], column + lane] = max(floor, add + scale * (A' m A)[i, j]) for every pixel
    that is not negative and every lane with column + lane < valid; the epilogue is multiply_tile's.
    """
    signature = types.void(
        m, INDEX, INDEX, y, INDEX, targets, INDEX, INDEX, INDEX, epilogue, types.float32
    )

    def generate(context, builder, signature, args):
        emit = Emitter(context, builder, signature, args)
        _, start, apart, _, pitch, _, target, column, valid, _, floor = args

        def read(q: int):
            offset = builder.add(start, builder.mul(apart, emit.index(q)))
            return _Vector(emit, emit.load(emit.pointer(0, offset), 0))

        scale, add = emit.epilogue(9, column)
        scale, add, low = emit.load(scale, 0), emit.load(add, 0), emit.broadcast(floor)
        left = builder.sub(valid, column)
        square = [[read(INPUTS * i + j) for j in range(INPUTS)] for i in range(INPUTS)]
        for i, row in enumerate(both_ways(output_transform, square)):
            for j, vector in enumerate(row):
                pixel = emit.number(5, builder.add(target, emit.index(OUTPUTS * i + j)))
                with builder.if_then(builder.icmp_signed(">=", pixel, emit.index(0))):
                    place = emit.pointer(3, builder.add(builder.mul(pixel, pitch), column))
                    emit.store_some(emit.finish(vector.value, scale, add, low), place, 0, left)
        return context.get_dummy_value()

    return signature, generate


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
