"""Cases of ops/convolution.py and ops/pooling.py."""

from __future__ import annotations

from functools import partial

import numpy as np

from minidet import ops
from op_cases.case import Case, apart, like, normal


def pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def convolution(
    x, weight, bias=0.0, stride=1, padding=0, dilation=1, groups=1, scale=1.0, shortcut=0.0, relu=False
):
    """conv2d as its docstring writes it, an output at a time."""
    (down, right), (top, left), (far, wide) = pair(stride), pair(padding), pair(dilation)
    x = np.pad(x, ((0, 0), (top, top), (left, left), (0, 0)))
    (N, H, W, _), (F, k, l, c) = x.shape, weight.shape  # noqa: E741
    P, Q = (H - far * (k - 1) - 1) // down + 1, (W - wide * (l - 1) - 1) // right + 1
    y = np.zeros((N, P, Q, F))
    for p, q, f in np.ndindex(P, Q, F):
        first = f // (F // groups) * c  # of the filter's group
        rows, columns = p * down + far * np.arange(k), q * right + wide * np.arange(l)
        window = x[:, rows][:, :, columns][..., first : first + c]
        y[:, p, q, f] = (window * weight[f]).sum(axis=(1, 2, 3))
    y = scale * y + bias + shortcut
    return np.maximum(y, 0) if relu else y


def level_by_level(x, weight, bias, *, maps, **how):
    """conv2d_levels as its docstring says: split, conv2d, join."""
    joined, start = [], 0
    for H, W in maps:
        level = x[:, start : start + H * W].reshape(len(x), H, W, -1)
        padding = (weight.shape[1] // 2, weight.shape[2] // 2)
        joined.append(convolution(level, weight, bias, padding=padding, **how).reshape(len(x), H * W, -1))
        start += H * W
    return np.concatenate(joined, axis=1)


SCALE = np.asarray([0.5, -2.0, 1.5, 1.0])

# label: x (N, H, W, C), weight (F, k, l, C / groups), how
CONVOLUTIONS = {
    "1x1": ((2, 2, 3, 2), (3, 1, 1, 2), {}),
    "3x3": ((2, 4, 3, 2), (2, 3, 3, 2), {"padding": 1}),
    "valid": ((1, 4, 5, 2), (2, 3, 3, 2), {}),
    "whole-map": ((1, 3, 2, 2), (4, 3, 2, 2), {}),
    "stride": ((1, 5, 6, 2), (2, 3, 3, 2), {"stride": 2, "padding": 1}),
    "stride-leaves-a-row": ((1, 6, 4, 1), (2, 3, 3, 1), {"stride": 2}),
    "stride-over-window": ((1, 7, 6, 1), (2, 2, 2, 1), {"stride": 3}),
    "1x1-stride": ((2, 5, 4, 2), (2, 1, 1, 2), {"stride": 2}),
    "1x1-stride-padded": ((1, 4, 5, 2), (2, 1, 1, 2), {"stride": 2, "padding": 1}),
    "stem": ((1, 4, 5, 1), (1, 7, 7, 1), {"stride": 2, "padding": 3}),
    "pairs": ((1, 5, 6, 2), (2, 3, 2, 2), {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}),
    "rectangle": ((1, 3, 5, 2), (2, 1, 4, 2), {"padding": (0, 1)}),
    "dilation": ((1, 5, 5, 1), (2, 3, 3, 1), {"padding": 2, "dilation": 2}),
    "padding-over-window": ((1, 2, 2, 1), (2, 2, 2, 1), {"padding": 3}),
    "one-pixel": ((2, 1, 1, 2), (2, 3, 3, 2), {"padding": 1}),
    "one-pixel-stride": ((1, 1, 1, 2), (2, 3, 3, 2), {"padding": 1, "stride": 2}),
    "groups": ((1, 4, 3, 4), (4, 3, 3, 2), {"groups": 2, "padding": 1}),
    "depthwise": ((1, 4, 4, 3), (6, 3, 3, 1), {"groups": 3, "stride": 2, "padding": 1}),
    "groups-of-1x1": ((1, 3, 2, 4), (2, 1, 1, 2), {"groups": 2}),
    "scale": ((1, 3, 4, 2), (4, 3, 3, 2), {"padding": 1, "scale": SCALE}),
    "relu": ((1, 3, 4, 2), (2, 3, 3, 2), {"padding": 1, "relu": True}),
    "scale-relu": ((1, 3, 4, 2), (4, 3, 3, 2), {"padding": 1, "scale": SCALE, "relu": True}),
    "groups-scale-relu": ((1, 3, 3, 4), (4, 2, 2, 2), {"groups": 2, "scale": SCALE, "relu": True}),
}


def clear_of_relu(shapes, formula):
    """Inputs for which nothing that is rectified lies within 0.01 of the kink."""

    def inputs(rng):
        while True:
            arrays = [rng.normal(size=shape) for shape in shapes]
            if np.abs(formula(*arrays, relu=False)).min(initial=1) > 0.01:
                return arrays

    return inputs


def conv2d(label: str, bias: bool = True) -> Case:
    x, weight, how = CONVOLUTIONS[label]

    def call(x, weight, bias=None):
        scale = like(x, how["scale"]) if "scale" in how else None
        return ops.conv2d(x, weight, bias, **how | {"scale": scale})

    def formula(*arrays, **changes):
        return convolution(*arrays, **how | changes)

    shapes = (x, weight, weight[:1]) if bias else (x, weight)
    return Case("conv2d", label if bias else f"{label}-no-bias", call, formula, clear_of_relu(shapes, formula))


def joined(label: str, shape, bias: bool, **more) -> Case:
    """conv2d with a shortcut, the last array; or with x itself as one, if it has no shape of its own."""
    x, weight, how = CONVOLUTIONS[label]
    how = how | more

    def call(x, weight, *rest):
        scale = like(x, how["scale"]) if "scale" in how else None
        shortcut = rest[-1] if shape else x
        return ops.conv2d(x, weight, rest[0] if bias else None, **how | {"scale": scale, "shortcut": shortcut})

    def formula(x, weight, *rest, **changes):
        shortcut = rest[-1] if shape else x
        return convolution(x, weight, rest[0] if bias else 0.0, **how | {"shortcut": shortcut} | changes)

    shapes = [s for s in (x, weight, weight[:1] if bias else None, shape) if s]
    name = f"{label}-shortcut-{'own' if shape else 'x'}{'-bias' if bias else ''}{'-relu' if 'relu' in more else ''}"
    return Case("conv2d", name, call, formula, clear_of_relu(shapes, formula))


def conv2d_levels(maps, size, C, **how) -> Case:
    def call(x, weight, bias):
        scale = like(x, how["scale"]) if "scale" in how else None
        return ops.conv2d_levels(x, maps, weight, bias, **how | {"scale": scale})

    def formula(*arrays, **changes):
        return level_by_level(*arrays, maps=maps, **how | changes)

    shapes = ((2, sum(H * W for H, W in maps), C), (4, *size, C), (4,))
    return Case("conv2d_levels", f"{maps}-{size}", call, formula, clear_of_relu(shapes, formula))


def pooled(x, size, stride, padding):
    around = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    x = np.pad(x, around, constant_values=-np.inf)
    N, H, W, C = x.shape
    y = np.empty((N, (H - size) // stride + 1, (W - size) // stride + 1, C))
    for p, q in np.ndindex(y.shape[1:3]):
        y[:, p, q] = x[:, p * stride : p * stride + size, q * stride : q * stride + size].max(axis=(1, 2))
    return y


def max_pool2d(shape, size, stride, padding) -> Case:
    call = partial(ops.max_pool2d, size=size, stride=stride, padding=padding)
    formula = partial(pooled, size=size, stride=stride or size, padding=padding)
    return Case("max_pool2d", f"{shape}-{size}-{stride}-{padding}", call, formula, apart(shape))


def upsample_nearest(old, new) -> Case:
    # In float32, as PyTorch: of 82 rows made of 2, row 41 copies the first one still.
    places = (np.arange(n, dtype=np.float32) * np.float32(m / n) for m, n in zip(old, new, strict=True))
    rows, columns = (np.minimum(p.astype(int), m - 1) for p, m in zip(places, old, strict=True))
    call = partial(ops.upsample_nearest, size=new)
    return Case("upsample_nearest", f"{old}-{new}", call, lambda x: x[:, rows][:, :, columns], normal((2, *old, 2)))


THREE_LEVELS = ((2, 3), (2, 1), (1, 1))

CASES = [
    *(conv2d(label) for label in CONVOLUTIONS),
    conv2d("3x3", bias=False),
    conv2d("scale-relu", bias=False),
    conv2d("depthwise", bias=False),
    joined("3x3", (2, 4, 3, 2), bias=True),
    joined("3x3", (2, 4, 3, 2), bias=True, relu=True),
    joined("3x3", None, bias=False),
    joined("3x3", None, bias=False, relu=True),
    joined("scale", (1, 3, 4, 4), bias=True, relu=True),
    joined("scale", (1, 3, 4, 4), bias=False),
    joined("depthwise", (1, 2, 2, 6), bias=True, relu=True),
    conv2d_levels(((3, 2),), (3, 3), 1),
    conv2d_levels(((1, 1), (1, 1)), (3, 3), 1),
    conv2d_levels(THREE_LEVELS, (1, 1), 2),
    conv2d_levels(THREE_LEVELS, (3, 3), 1, scale=SCALE, relu=True),
    conv2d_levels(THREE_LEVELS, (3, 1), 1),
    max_pool2d((1, 5, 6, 1), 3, 2, 1),
    max_pool2d((2, 4, 4, 1), 2, None, 0),
    max_pool2d((1, 5, 4, 1), 3, 1, 1),
    max_pool2d((1, 1, 1, 2), 3, 2, 1),
    max_pool2d((1, 5, 5, 1), 2, 3, 0),
    max_pool2d((1, 3, 3, 2), 1, 1, 0),
    upsample_nearest((2, 3), (4, 6)),
    upsample_nearest((2, 2), (2, 2)),
    upsample_nearest((3, 2), (5, 3)),
    upsample_nearest((1, 1), (3, 2)),
    upsample_nearest((4, 3), (2, 2)),
    upsample_nearest((2, 2), (3, 4)),
    upsample_nearest((2, 1), (82, 2)),
]
