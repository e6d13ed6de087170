"""Batch normalization, with fixed statistics or the batch's own, and group normalization."""

from __future__ import annotations

import math

from minidet.autograd import Tensor, record
from minidet.backend import Array
from minidet.kernels import normalize_groups, normalize_groups_gradient, rectify_gradient
from minidet.kernels.precision import sums_in


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, mean: Array, variance: Array, *, eps: float) -> Tensor:
    """Normalize with given statistics: y = weight * (x - mean) / sqrt(variance + eps) + bias.

    Shapes:
        x: (N, H, W, C)
        weight: (C,)
        bias: (C,)
        mean: (C,)
        variance: (C,)
        returns: (N, H, W, C)
    Backward:
        dL/dx       dL/dy * weight / sqrt(variance + eps)
        dL/dweight  sums dL/dy * (x - mean) / sqrt(variance + eps) over images and positions
        dL/dbias    sums dL/dy over images and positions
    Source: Ioffe and Szegedy, arXiv:1502.03167, algorithm 2.
    """
    xp = x.xp
    deviation = 1 / xp.sqrt(xp.astype(variance, x.dtype) + eps)
    center = xp.astype(mean, x.dtype)
    scale = xp.astype(weight.data, x.dtype) * deviation
    offset = xp.astype(bias.data, x.dtype) - center * scale
    needs_x, needs_weight, needs_bias = x.requires_grad, weight.requires_grad, bias.requires_grad
    values = x.data if needs_weight else None

    def backward(gy):
        return (
            gy * scale if needs_x else None,
            _total(gy * ((values - center) * deviation), xp) if needs_weight else None,
            _total(gy, xp) if needs_bias else None,
        )

    return record("batch_norm", x.data * scale + offset, (x, weight, bias), backward, fresh=True)


def batch_norm_training(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, shortcut: Tensor | None = None, relu: bool = False
) -> tuple[Tensor, Array, Array]:
    """Normalize with the batch's own mean and biased variance over images and positions, add what a residual block
    adds, and rectify if asked to.

    Shapes:
        x: (N, H, W, C)
        weight: (C,)
        bias: (C,)
        shortcut: the shape of x
        returns: y (N, H, W, C), and mean (C,) and *unbiased* variance (C,) for the running statistics
    Backward:
        with n = (x - mean) / sqrt(variance + eps), d = dL/dy where y > 0 if `relu`, else dL/dy, and g = weight * d:
        dL/dx       (g - mean(g) - n * mean(g * n)) / sqrt(variance + eps)
        dL/dweight  sums d * n over images and positions
        dL/dbias    sums d over images and positions
        dL/dshortcut is d
    Source: Ioffe and Szegedy, arXiv:1502.03167, algorithm 1; the unbiased variance is section 3.1.
    Raises:
        ValueError: if a channel has only one value, whose variance says nothing, or the shortcut does not fit.
    """
    xp, (*positions, C) = x.xp, x.shape
    count = math.prod(positions)
    if count < 2:
        raise ValueError(f"batch_norm: needs more than one value per channel in training, got shape {x.shape}")
    # As one image, of which every channel is a group.
    flat, one = xp.reshape(x.data, (1, count, C)), ((count, 1),)
    y, statistics = _normalize("batch_norm", x, flat, weight, bias, shortcut, C, eps, one, relu)
    return y, statistics[0, 0, 0, :], statistics[1, 0, 0, :] * (count / (count - 1))


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    eps: float = 1e-5,
    maps: tuple[tuple[int, int], ...] | None = None,
    shortcut: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Normalize each image over all positions and the channels of one group, add what a residual block adds, and
    rectify if asked to.

    y = act(weight * (x - mean) / sqrt(variance + eps) + bias + shortcut), mean and biased variance per image and
    group; act is the rectifier if `relu`, else the identity.

    Shapes:
        x: (N, H, W, C), or (N, S, C) with the levels `maps`, each normalized by itself
        weight: (C,)
        bias: (C,)
        shortcut: the shape of x
        returns: the shape of x
    Backward:
        with n = (x - mean) / sqrt(variance + eps), d = dL/dy where y > 0 if `relu`, else dL/dy, and
        g = weight * d, means over the same elements:
        dL/dx       (g - mean(g) - n * mean(g * n)) / sqrt(variance + eps)
        dL/dweight  sums d * n over images and positions
        dL/dbias    sums d over images and positions
        dL/dshortcut is d
    Source: Wu and He, Group Normalization, arXiv:1803.08494, eq. (1), (2), (7).
    Raises:
        ValueError: if the groups do not divide the channels, or the shortcut does not fit.
    """
    xp, N, C = x.xp, x.shape[0], x.shape[-1]
    if C % groups:
        raise ValueError(f"group_norm: {C} channels do not divide into {groups} groups")
    if maps is None:
        maps = (x.shape[1:3],)
    flat = xp.reshape(x.data, (N, -1, C))
    return _normalize("group_norm", x, flat, weight, bias, shortcut, groups, eps, maps, relu)[0]


def _normalize(op: str, x: Tensor, flat: Array, weight: Tensor, bias: Tensor, shortcut, *rule) -> tuple[Tensor, Array]:
    """The body of both ops, and the statistics; `flat` is x as (N, S, C)."""
    xp, shape, wide = x.xp, x.shape, sums_in(x.data)
    if shortcut is not None and (shortcut.shape, shortcut.dtype) != (shape, x.dtype):
        raise ValueError(f"{op}: x is {shape} in {x.dtype}, but the shortcut {shortcut.shape} in {shortcut.dtype}")
    gamma, beta = (xp.astype(a.data, wide, copy=False) for a in (weight, bias))
    added = None if shortcut is None else xp.reshape(shortcut.data, flat.shape)
    y, statistics = normalize_groups(flat, gamma, beta, added, *rule)
    _, eps, maps, relu = rule
    rectified = y if relu else None
    inputs = (x, weight, bias) if shortcut is None else (x, weight, bias, shortcut)
    needed = [tensor.requires_grad for tensor in inputs]

    def backward(gy):
        g, y = xp.reshape(gy, flat.shape), rectified
        if y is not None and needed[3:] == [True]:  # the shortcut gets what is rectified, so it is made once
            g, y = rectify_gradient(g, y), None
        # The kernel makes all three in one pass over the map.
        gx, gweight, gbias = normalize_groups_gradient(flat, g, gamma, statistics, eps, maps, y)
        gradients = xp.reshape(gx, shape), gweight, gbias, xp.reshape(g, shape)
        return tuple(gradient if need else None for gradient, need in zip(gradients, needed, strict=False))

    # Without a rectifier the shortcut is handed the very gradient that came in.
    return record(op, xp.reshape(y, shape), inputs, backward, fresh=shortcut is None or relu), statistics


def _total(x: Array, xp) -> Array:
    """The sum over all but the channels, in double precision, as of the statistics."""
    return xp.astype(xp.sum(x, axis=tuple(range(x.ndim - 1)), dtype=xp.float64), x.dtype)
