"""Cases of ops/activation.py."""

from __future__ import annotations

from functools import partial

import numpy as np

from minidet import ops
from op_cases.case import Case, apart, normal, not_zero, positive


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x, axis=-1):
    return np.exp(x) / np.exp(x).sum(axis=axis, keepdims=True)


FORMULAS = {
    "exp": (np.exp, normal),
    "log": (np.log, positive),
    "sqrt": (np.sqrt, positive),
    "abs": (np.abs, not_zero),
    "relu": (lambda x: x * (x > 0), not_zero),
    "sigmoid": (sigmoid, partial(normal, scale=3)),
    "log_sigmoid": (lambda x: np.log(sigmoid(x)), partial(normal, scale=3)),
    "softmax": (softmax, normal),
}

CASES = [
    *(Case(name, "matrix", getattr(ops, name), f, numbers((3, 4))) for name, (f, numbers) in FORMULAS.items()),
    *(Case(name, "empty", getattr(ops, name), f, normal((0, 3))) for name, (f, _) in FORMULAS.items()),
    Case("softmax", "columns", partial(ops.softmax, axis=0), partial(softmax, axis=0), normal((3, 4))),
    Case("softmax", "single", ops.softmax, softmax, normal((3, 1))),
    Case("add_relu", "same", lambda x: ops.add_relu(x, x), lambda x: np.maximum(2 * x, 0), not_zero((3, 4))),
    Case("add_relu", "two", ops.add_relu, lambda a, b: np.maximum(a + b, 0), apart((2, 3), (2, 3))),
    Case("astype", "same", lambda x: ops.astype(x, x.dtype), lambda x: x, normal((3,))),
]
