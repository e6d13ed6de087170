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


def batch_norm_training(shape, relu=False) -> Case:
    def call(x, weight, bias):
        return ops.batch_norm_training(x, weight, bias, eps=0.1, relu=relu)[0]

    def formula(x, weight, bias):
        y = weight * standardized(x, tuple(range(x.ndim - 1)), 0.1) + bias
        return np.maximum(y, 0) if relu else y

    return Case("batch_norm_training", f"{shape}{'-relu' * relu}", call, formula, normal(shape, shape[-1:], shape[-1:]))


def group_norm(shape, groups, maps=None, relu=False) -> Case:
    def call(x, weight, bias):
        return ops.group_norm(x, weight, bias, groups=groups, eps=0.1, maps=maps, relu=relu)

    def formula(x, weight, bias):
        y = group_normalized(x, weight, bias, groups, maps, 0.1)
        return np.maximum(y, 0) if relu else y

    return Case("group_norm", f"{shape}-{groups}{'-relu' * relu}", call, formula, normal(shape, shape[-1:], shape[-1:]))


CASES = [
    batch_norm(0.0),
    batch_norm(0.1),
    batch_norm_training((2, 3, 2, 2)),
    batch_norm_training((1, 2, 1, 1)),
    batch_norm_training((3, 4, 2)),
    batch_norm_training((2, 3, 2, 2), relu=True),
    group_norm((2, 2, 3, 4), 2),
    group_norm((1, 2, 2, 3), 3),
    group_norm((2, 1, 1, 4), 1),
    group_norm((2, 7, 4), 2, ((2, 2), (1, 2), (1, 1))),
    group_norm((2, 2, 3, 4), 2, relu=True),
    group_norm((2, 7, 4), 2, ((2, 2), (1, 2), (1, 1)), relu=True),
]
