"""Cases of ops/arithmetic.py."""

from __future__ import annotations

from functools import partial

import numpy as np

from minidet import ops
from op_cases.case import Case, apart, like, normal, positive

SHAPES = {
    "same": ((2, 3), (2, 3)),
    "column-row": ((3, 1), (1, 4)),
    "scalar-matrix": ((), (2, 3)),
    "matrix-scalar": ((2, 3), ()),
    "scalars": ((), ()),
    "fewer-axes": ((4, 1), (2, 1, 3)),
    "ones": ((1, 1), (1,)),
    "empty": ((0, 3), (3,)),
    "empty-column": ((0, 3), (1, 1)),
}
BINARY = {
    "add": (np.add, normal),
    "sub": (np.subtract, normal),
    "mul": (np.multiply, normal),
    "div": (np.divide, positive),
    "maximum": (np.maximum, apart),
    "minimum": (np.minimum, apart),
}
ARRAY = np.asarray([[0.8, 1.2, 0.95], [1.9, -0.45, -2.75]])
CONDITION = np.asarray([[True, False, True], [False, False, True]])
MATRICES = {
    "matrices": ((2, 3), (3, 4)),
    "one-element": ((1, 1), (1, 1)),
    "batch": ((5, 2, 3), (5, 3, 2)),
    "shared-right": ((5, 2, 3), (3, 2)),
    "shared-left": ((2, 3), (2, 3, 2)),
    "both-repeat": ((2, 1, 2, 3), (4, 3, 1)),
    "empty-sum": ((2, 0), (0, 3)),
    "empty": ((0, 2), (2, 3)),
}


def binary(name: str) -> list[Case]:
    """Every way in which two operands can meet, one of which may be an array or a number."""
    op, (formula, numbers) = getattr(ops, name), BINARY[name]
    one = numbers((2, 3))
    return [
        *(Case(name, label, op, formula, numbers(*shapes)) for label, shapes in SHAPES.items()),
        Case(name, "right-array", lambda x: op(x, like(x, ARRAY)), lambda x: formula(x, ARRAY), one),
        Case(name, "left-array", lambda x: op(like(x, ARRAY), x), lambda x: formula(ARRAY, x), one),
        Case(name, "right-number", lambda x: op(x, 2), lambda x: formula(x, 2), one),
        Case(name, "left-number", lambda x: op(0.7, x), lambda x: formula(0.7, x), one),
        Case(name, "itself", lambda x: op(x, x * 2), lambda x: formula(x, x * 2), one),
    ]


def power(exponent: float) -> Case:
    numbers = normal((2, 3)) if exponent in (0, 1, 2, 3) else positive((2, 3))
    call = partial(ops.power, exponent=exponent)
    return Case("power", str(exponent), call, lambda x: x**exponent, numbers)


def where(label: str, *shapes: tuple[int, ...]) -> Case:
    def call(a, b=0.0):
        return ops.where(a.xp.asarray(CONDITION), a, b)

    return Case("where", label, call, lambda a, b=0.0: np.where(CONDITION, a, b), normal(*shapes))


CASES = [
    *(case for name in BINARY for case in binary(name)),
    *(power(exponent) for exponent in (0, 1, 2, 3, 0.5, -1, -2.5)),
    *(Case("matmul", label, ops.matmul, np.matmul, normal(*shapes)) for label, shapes in MATRICES.items()),
    where("same", (2, 3), (2, 3)),
    where("row-column", (3,), (2, 1)),
    where("scalars", (), ()),
    where("number", (2, 3)),
    Case("neg", "matrix", ops.neg, np.negative, normal((2, 3))),
    Case("neg", "empty", ops.neg, np.negative, normal((0, 3))),
]
