"""Arithmetic with broadcasting, and the operators of Tensor."""

from __future__ import annotations

import math
from itertools import zip_longest

from minidet.autograd import Tensor, record
from minidet.backend import Array

Operand = Tensor | Array | float


def add(a: Operand, b: Operand) -> Tensor:
    """Sum, a + b, with broadcasting.

    Shapes: any two that broadcast.
    Backward: dL/da = dL/dy and dL/db = dL/dy, summed over the axes that were broadcast.
    Raises:
        ValueError: if the shapes do not broadcast.
    """
    a, b = _operands("add", a, b)
    shape_a, shape_b = _needed_shapes(a, b)

    def backward(gy):
        return (_unbroadcast(gy, shape_a), _unbroadcast(gy, shape_b))

    return record("add", a.data + b.data, (a, b), backward)


def sub(a: Operand, b: Operand) -> Tensor:
    """Difference, a - b, with broadcasting.

    Shapes: any two that broadcast.
    Backward: dL/da = dL/dy and dL/db = -dL/dy, summed over the axes that were broadcast.
    Raises:
        ValueError: if the shapes do not broadcast.
    """
    a, b = _operands("sub", a, b)
    shape_a, shape_b = _needed_shapes(a, b)

    def backward(gy):
        return (_unbroadcast(gy, shape_a), None if shape_b is None else -_unbroadcast(gy, shape_b))

    return record("sub", a.data - b.data, (a, b), backward)


def mul(a: Operand, b: Operand) -> Tensor:
    """Product, a * b, element by element with broadcasting.

    Shapes: any two that broadcast.
    Backward: dL/da = dL/dy * b and dL/db = dL/dy * a, summed over the axes that were broadcast.
    Raises:
        ValueError: if the shapes do not broadcast.
    """
    a, b = _operands("mul", a, b)
    shape_a, shape_b = _needed_shapes(a, b)
    # Keep an array only for the gradient that needs it.
    kept_a = a.data if b.requires_grad else None
    kept_b = b.data if a.requires_grad else None

    def backward(gy):
        return (
            None if kept_b is None else _unbroadcast(gy * kept_b, shape_a),
            None if kept_a is None else _unbroadcast(gy * kept_a, shape_b),
        )

    return record("mul", a.data * b.data, (a, b), backward)


def div(a: Operand, b: Operand) -> Tensor:
    """Quotient, a / b, element by element with broadcasting.

    Shapes: any two that broadcast.
    Backward: dL/da = dL/dy / b and dL/db = -dL/dy * a / b^2, summed over the axes that were broadcast.
    Raises:
        ValueError: if the shapes do not broadcast.
    """
    a, b = _operands("div", a, b)
    shape_a, shape_b = _needed_shapes(a, b)
    y, divisor = a.data / b.data, b.data
    quotient = y if b.requires_grad else None

    def backward(gy):
        g = gy / divisor
        return (_unbroadcast(g, shape_a), None if quotient is None else _unbroadcast(-g * quotient, shape_b))

    return record("div", y, (a, b), backward)


def neg(x: Tensor) -> Tensor:
    """Negative, y = -x.

    Shapes: any; y has the shape of x.
    Backward: dL/dx = -dL/dy.
    """
    return record("neg", -x.data, (x,), lambda gy: (-gy,))


def power(x: Tensor, exponent: float) -> Tensor:
    """Power with a constant exponent, y = x ** exponent.

    Shapes: any; y has the shape of x.
    Backward: dL/dx = dL/dy * exponent * x ** (exponent - 1); 0 everywhere if the exponent is 0, also at
        x = 0, where the formula would give 0 * inf.
    """
    base = x.data

    def backward(gy):
        if exponent == 0:
            return (0 * gy,)
        return (gy * (exponent * base ** (exponent - 1)),)

    return record("power", base**exponent, (x,), backward)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product over the last two axes; leading axes broadcast.

    Shapes: a: (..., n, k); b: (..., k, m); returns (..., n, m).
    Backward: dL/da = dL/dy @ b^T and dL/db = a^T @ dL/dy, summed over the axes that were broadcast.
    Raises:
        ValueError: if either operand has fewer than two axes or the inner sizes differ.
    """
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"matmul: cannot multiply matrices of shapes {a.shape} and {b.shape}")
    xp, left, right = a.xp, a.data, b.data
    shape_a, shape_b = _needed_shapes(a, b)

    def backward(gy):
        ga = gb = None
        if shape_a is not None:
            ga = _unbroadcast(gy @ xp.matrix_transpose(right), shape_a)
        if shape_b is not None:
            gb = _unbroadcast(xp.matrix_transpose(left) @ gy, shape_b)
        return (ga, gb)

    return record("matmul", left @ right, (a, b), backward)


def maximum(a: Operand, b: Operand) -> Tensor:
    """The larger of a and b, element by element with broadcasting.

    Shapes: any two that broadcast.
    Ties: equal elements share the gradient, half each, as in PyTorch.
    Backward: dL/da = dL/dy where a > b, half of it where a = b, else 0; dL/db likewise.
    Raises:
        ValueError: if the shapes do not broadcast.
    """
    return _larger("maximum", a, b, 1)


def minimum(a: Operand, b: Operand) -> Tensor:
    """The smaller of a and b, element by element with broadcasting.

    Shapes: any two that broadcast.
    Ties: equal elements share the gradient, half each, as in PyTorch.
    Backward: dL/da = dL/dy where a < b, half of it where a = b, else 0; dL/db likewise.
    Raises:
        ValueError: if the shapes do not broadcast.
    """
    return _larger("minimum", a, b, -1)


def _larger(op: str, a: Operand, b: Operand, sign: int) -> Tensor:
    a, b = _operands(op, a, b)
    xp = a.xp
    shape_a, shape_b = _needed_shapes(a, b)
    a_wins, tie = sign * a.data > sign * b.data, a.data == b.data

    def backward(gy):
        share_a = xp.where(tie, 0.5 * gy, xp.where(a_wins, gy, 0 * gy))
        return (_unbroadcast(share_a, shape_a), _unbroadcast(gy - share_a, shape_b))

    values = xp.maximum(a.data, b.data) if sign > 0 else xp.minimum(a.data, b.data)
    return record(op, values, (a, b), backward)


def where(condition: Array, a: Operand, b: Operand) -> Tensor:
    """Choose a where the boolean array `condition` holds, else b.

    Shapes: any three that broadcast.
    Backward: dL/da = dL/dy where the condition holds, else 0; dL/db the other way round.
    Raises:
        ValueError: if the shapes do not broadcast.
    """
    a, b = _operands("where", a, b, condition)
    xp = a.xp
    shape_a, shape_b = _needed_shapes(a, b)

    def backward(gy):
        return (
            None if shape_a is None else _unbroadcast(xp.where(condition, gy, 0 * gy), shape_a),
            None if shape_b is None else _unbroadcast(xp.where(condition, 0 * gy, gy), shape_b),
        )

    return record("where", xp.where(condition, a.data, b.data), (a, b), backward)


def _operands(op: str, a: Operand, b: Operand, *others: Array) -> tuple[Tensor, Tensor]:
    """Both as tensors; a number takes the dtype of the other operand, so it never changes it."""
    if not isinstance(a, Tensor):
        a = _constant(a, b)
    if not isinstance(b, Tensor):
        b = _constant(b, a)
    shapes = (a.shape, b.shape, *(array.shape for array in others))
    for sizes in zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1):
        if len(set(sizes) - {1}) > 1:
            raise ValueError(f"{op}: shapes {' and '.join(map(str, shapes))} do not broadcast")
    return a, b


def _constant(value: Array | float, other: Tensor) -> Tensor:
    if isinstance(value, int | float | bool):
        xp = other.xp
        return Tensor(xp.full((), value, dtype=other.dtype, device=other.data.device))  # written there, not copied
    return Tensor(value)


def _needed_shapes(a: Tensor, b: Tensor) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """The shape of each operand that wants a gradient: what a closure keeps instead of the array."""
    return (a.shape if a.requires_grad else None, b.shape if b.requires_grad else None)


def _unbroadcast(gradient: Array, shape: tuple[int, ...] | None) -> Array | None:
    """Sum over the axes along which an operand of `shape` was repeated; None if nobody asked."""
    if shape is None or gradient.shape == shape:
        return None if shape is None else gradient
    xp = Tensor(gradient).xp
    extra = gradient.ndim - len(shape)
    axes = tuple(i for i, n in enumerate(gradient.shape) if i < extra or shape[i - extra] == 1 != n)
    return xp.reshape(xp.sum(gradient, axis=axes), shape) if math.prod(gradient.shape) else xp.zeros(
        shape, dtype=gradient.dtype, device=gradient.device
    )


# Operators live here and not in autograd.py, which must not know any op.
Tensor.__add__ = add
Tensor.__radd__ = lambda self, other: add(other, self)
Tensor.__sub__ = sub
Tensor.__rsub__ = lambda self, other: sub(other, self)
Tensor.__mul__ = mul
Tensor.__rmul__ = lambda self, other: mul(other, self)
Tensor.__truediv__ = div
Tensor.__rtruediv__ = lambda self, other: div(other, self)
Tensor.__neg__ = neg
Tensor.__pow__ = power
Tensor.__matmul__ = matmul
