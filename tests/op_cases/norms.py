"""Cases of ops/normalization.py."""

from __future__ import annotations

import numpy as np

from minidet import ops
from op_cases.case import Case, like, normal

MEAN, VARIANCE = np.asarray([0.3, -1.0]), np.asarray([0.5, 2.0])


def standardized(x, axes, eps):
    return (x - x.mean(axis=axes, keepdims=True)) / np.sqrt(x.var(axis=axes, keepdims=True) + eps)


def group_normalized(x, weight, bias, groups, maps, eps):
    levels, start, flat = [], 0, x.reshape(len(x), -1, x.shape[-1])
    for H, W in maps or (x.shape[1:3],):
        level = flat[:, start : start + H * W].reshape(len(x), H * W, groups, -1)
        levels.append(standardized(level, (1, 3), eps).reshape(len(x), H * W, -1))
        start += H * W
    return (np.concatenate(levels, axis=1) * weight + bias).reshape(x.shape)


def batch_norm(eps: float) -> Case:
    def call(x, weight, bias):
        return ops.batch_norm(x, weight, bias, like(x, MEAN), like(x, VARIANCE), eps=eps)

    def formula(x, weight, bias):
        return weight * (x - MEAN) / np.sqrt(VARIANCE + eps) + bias

    return Case("batch_norm", f"eps-{eps}", call, formula, normal((2, 2, 1, 2), (2,), (2,)))


def batch_norm_training(shape, added=False, relu=False) -> Case:
    def call(x, weight, bias, shortcut=None):
        return ops.batch_norm_training(x, weight, bias, eps=0.1, shortcut=shortcut, relu=relu)[0]

    def formula(x, weight, bias, shortcut=0.0):
        y = weight * standardized(x, tuple(range(x.ndim - 1)), 0.1) + bias + shortcut
        return np.maximum(y, 0) if relu else y

    return Case("batch_norm_training", named(shape, added, relu), call, formula, inputs(shape, added))


def group_norm(shape, groups, maps=None, added=False, relu=False) -> Case:
    def call(x, weight, bias, shortcut=None):
        return ops.group_norm(x, weight, bias, groups=groups, eps=0.1, maps=maps, shortcut=shortcut, relu=relu)

    def formula(x, weight, bias, shortcut=0.0):
        y = group_normalized(x, weight, bias, groups, maps, 0.1) + shortcut
        return np.maximum(y, 0) if relu else y

    return Case("group_norm", f"{groups}-{named(shape, added, relu)}", call, formula, inputs(shape, added))


def named(shape, added: bool, relu: bool) -> str:
    return f"{shape}{'-shortcut' * added}{'-relu' * relu}"


def inputs(shape, added: bool):
    """x, weight, bias and, if asked for, a shortcut."""
    return normal(shape, shape[-1:], shape[-1:], *[shape] * added)


CASES = [
    batch_norm(0.0),
    batch_norm(0.1),
    batch_norm_training((2, 3, 2, 2)),
    batch_norm_training((1, 2, 1, 1)),
    batch_norm_training((3, 4, 2)),
    batch_norm_training((2, 3, 2, 2), relu=True),
    batch_norm_training((2, 3, 2, 2), added=True),
    batch_norm_training((2, 3, 2, 2), added=True, relu=True),
    group_norm((2, 2, 3, 4), 2),
    group_norm((1, 2, 2, 3), 3),
    group_norm((2, 1, 1, 4), 1),
    group_norm((2, 7, 4), 2, ((2, 2), (1, 2), (1, 1))),
    group_norm((2, 2, 3, 4), 2, relu=True),
    group_norm((2, 7, 4), 2, ((2, 2), (1, 2), (1, 1)), relu=True),
    group_norm((2, 2, 3, 4), 2, added=True),
    group_norm((2, 7, 4), 2, ((2, 2), (1, 2), (1, 1)), added=True, relu=True),
]
