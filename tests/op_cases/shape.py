"""Cases of ops/shape.py."""

from __future__ import annotations

from functools import partial

import numpy as np

from minidet import ops
from op_cases.case import Case, apart, normal


def reshape(old, new) -> Case:
    call = partial(ops.reshape, shape=new)
    return Case("reshape", f"{old}-{new}", call, lambda x: x.reshape(new), normal(old))


def permute(shape, axes) -> Case:
    return Case("permute", str(axes), partial(ops.permute, axes=axes), lambda x: x.transpose(axes), normal(shape))


def broadcast_to(old, new) -> Case:
    call = partial(ops.broadcast_to, shape=new)
    return Case("broadcast_to", f"{old}-{new}", call, lambda x: np.broadcast_to(x, new), normal(old))


def joined(op, numpy, axis, *shapes) -> Case:
    def call(*tensors):
        return getattr(ops, op)(tensors, axis=axis)

    return Case(op, f"{shapes}-{axis}", call, lambda *arrays: numpy(arrays, axis=axis), normal(*shapes))


def pad(shape, *widths) -> Case:
    call = partial(ops.pad, widths=widths)
    return Case("pad", f"{shape}-{widths}", call, lambda x: np.pad(x, widths), normal(shape))


def take(label, shape, index, axis=0) -> Case:
    index = np.asarray(index, np.int64)

    def call(x):
        return ops.take(x, x.xp.asarray(index), axis=axis)

    return Case("take", label, call, lambda x: np.take(x, index, axis=axis), normal(shape))


def getitem(key) -> Case:
    return Case("getitem", str(key), lambda x: x[key], lambda x: x[key], normal((4, 3)))


def reduction(op, shape, axis=None, keepdims=False) -> Case:
    label = f"{shape}-{axis}{'-keepdims' if keepdims else ''}"
    how = {"axis": axis, "keepdims": keepdims}
    call, formula = partial(getattr(ops, op), **how), partial(getattr(np, op), **how)
    return Case(op, label, call, formula, (normal if op in ("sum", "mean") else apart)(shape))


CASES = [
    reshape((2, 3, 2), (-1,)),
    reshape((2, 6), (3, -1, 1)),
    reshape((1, 1), ()),
    reshape((0, 4), (2, 0)),
    permute((2, 3, 4), (1, 2, 0)),
    permute((2, 3), (1, 0)),
    broadcast_to((2, 3), (2, 3)),
    broadcast_to((3,), (2, 3)),
    broadcast_to((2, 1), (2, 4)),
    broadcast_to((), (2, 2)),
    broadcast_to((1, 3), (0, 3)),
    joined("concat", np.concatenate, 0, (2, 3), (1, 3), (0, 3)),
    joined("concat", np.concatenate, 1, (2, 3), (2, 1)),
    joined("concat", np.concatenate, -1, (1, 2, 1), (1, 2, 2)),
    joined("concat", np.concatenate, 0, (3,)),
    joined("stack", np.stack, 0, (2, 3), (2, 3)),
    joined("stack", np.stack, 1, (2, 3), (2, 3), (2, 3)),
    joined("stack", np.stack, -1, (2,), (2,)),
    joined("stack", np.stack, 0, (), ()),
    pad((2, 3), (1, 0), (0, 2)),
    pad((3,), (0, 0)),
    pad((0,), (1, 1)),
    take("rows", (4, 3), [2, 0]),
    take("repeated", (4, 3), [1, 1, 3, 1]),
    take("last-axis", (2, 3, 4), [3, 3, 0], -1),
    take("middle-axis", (2, 3, 4), [0, 2, 2, 1], 1),
    take("vector", (5,), [4, 4]),
    take("nothing", (4, 3), []),
    getitem(1),
    getitem(-1),
    getitem(slice(1, 3)),
    getitem((slice(None), 2)),
    getitem((slice(0, 4, 2), slice(1, 2))),
    getitem((..., 0)),
    getitem((1, ..., slice(2))),
    getitem((1, 2)),
    getitem(slice(2, 2)),
    getitem(slice(None, None, -1)),
    *(
        case
        for op in ("sum", "mean", "max", "min")
        for case in (
            reduction(op, (2, 3, 2)),
            reduction(op, (2, 3, 2), keepdims=True),
            reduction(op, (2, 3, 2), 0),
            reduction(op, (2, 3, 2), -1, keepdims=True),
            reduction(op, (2, 3, 2), (0, 2)),
            reduction(op, (2, 3, 2), (0, -1), keepdims=True),
            reduction(op, ()),
            reduction(op, (0, 3), 1),
        )
    ),
    reduction("sum", (0, 3), 0),
    reduction("sum", (0,)),
]
