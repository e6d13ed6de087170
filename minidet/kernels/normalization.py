"""Group normalization of a pyramid, values, statistics and the way back; and what a norm with fixed statistics is."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numba import njit

from minidet import backend
from minidet.kernels.kernel import Kernel
from minidet.kernels.parallel import parallel

Maps = tuple[tuple[int, int], ...]


@Kernel
def norm_to_affine(weight, bias, mean, variance, eps: float):
    """scale = weight / sqrt(variance + eps) and offset = bias - mean * scale: a norm with fixed statistics.

    Shapes:
        weight, bias, mean, variance: (C,)
        returns: (2, C), scale and offset: norm(x) = scale * x + offset
    """
    xp = backend.namespace(weight)
    scale = weight / xp.sqrt(variance + eps)
    return xp.stack([scale, bias - mean * scale])


@Kernel
def normalize_groups(x, weight, bias, groups: int, eps: float, maps: Maps, relu: bool):
    """Subtract the mean and divide by the standard deviation of each image, level and channel group.

    y = act(weight * (x - mean) / sqrt(variance + eps) + bias), with the biased variance; act is the rectifier
    if `relu`, else the identity.

    Shapes:
        x: (N, S, C), the levels `maps` one after the other
        weight: (C,)
        bias: (C,)
        returns: y (N, S, C), and statistics (2, N, L, groups), mean and variance
    Source: Wu and He, Group Normalization, arXiv:1803.08494, eq. (1), (2), (7).
    """
    xp = backend.namespace(x)
    N, _, C = x.shape
    levels, means, variances = [], [], []
    for inside in _places(maps):
        level = x[:, inside, :]
        grouped = xp.reshape(level, (N, level.shape[1], groups, C // groups))
        mean = _mean(grouped, xp)
        variance = _mean((grouped - mean) ** 2, xp)
        levels.append(xp.reshape((grouped - mean) * (1 / xp.sqrt(variance + eps)), level.shape) * weight + bias)
        means.append(xp.reshape(mean, (N, groups)))
        variances.append(xp.reshape(variance, (N, groups)))
    y, statistics = xp.concat(levels, axis=1), xp.stack([xp.stack(each, axis=1) for each in (means, variances)])
    return xp.maximum(y, xp.zeros_like(y)) if relu else y, statistics


@Kernel
def normalize_groups_gradient(x, gy, weight, statistics, eps: float, maps: Maps, y):
    """dL/dx, dL/dweight and dL/dbias of `normalize_groups`.

    With scale = 1 / sqrt(variance + eps), n = (x - mean) * scale and g = dL/dy * weight, means taken over the same
    elements: dL/dx = scale * (g - mean(g) - n * mean(g * n)).  Of a rectified y, dL/dy counts only where y > 0.

    Shapes:
        x: (N, S, C)
        gy: (N, S, C)
        weight: (C,)
        statistics: (2, N, L, groups), mean and variance
        y: (N, S, C) if it was rectified, else None
        returns: (N, S, C), (C,), (C,)
    """
    xp = backend.namespace(x)
    gy = gy if y is None else xp.where(y > 0, gy, xp.zeros_like(gy))
    N, _, C = x.shape
    groups = statistics.shape[3]
    levels = []
    gweight = xp.zeros((C,), dtype=gy.dtype, device=gy.device)
    for number, inside in enumerate(_places(maps)):
        level, gy_level = x[:, inside, :], gy[:, inside, :]
        shape = (N, level.shape[1], groups, C // groups)
        mean, variance = (xp.reshape(statistics[i, :, number, :], (N, 1, groups, 1)) for i in (0, 1))
        scale = 1 / xp.sqrt(variance + eps)
        n = (xp.reshape(level, shape) - mean) * scale
        g = xp.reshape(gy_level * weight, shape)
        levels.append(xp.reshape(scale * (g - _mean(g, xp) - n * _mean(g * n, xp)), level.shape))
        gweight = gweight + xp.sum(gy_level * xp.reshape(n, level.shape), axis=(0, 1))
    return xp.concat(levels, axis=1), gweight, xp.sum(gy, axis=(0, 1))


def _mean(x, xp):
    """Over pixels and a group's channels, in double precision: tens of thousands of float32 numbers, added one after
    the other, lose digits that what follows needs."""
    total = xp.sum(x, axis=(1, 3), keepdims=True, dtype=xp.float64)
    return xp.astype(total / (x.shape[1] * x.shape[3]), x.dtype)


def _places(maps: Maps) -> list[slice]:
    """Where each level lies along S."""
    ends = np.cumsum([0, *(math.prod(map_) for map_ in maps)]).tolist()
    return [slice(start, stop) for start, stop in pairwise(ends)]


@lru_cache(maxsize=1024)
def _starts(maps: Maps) -> np.ndarray:
    return np.array([0, *(place.stop for place in _places(maps))], dtype=np.int64)


@norm_to_affine.faster_on("numpy", when=lambda weight, *rest: alike(weight, *rest[:3]))
def _norm_to_affine_numba(weight, bias, mean, variance, eps: float):
    affine = np.empty((2, len(weight)), weight.dtype)
    _to_affine(weight, bias, mean, variance, weight.dtype.type(eps), affine)
    return affine


def alike(first, *others) -> bool:
    """Whether arrays hold numbers of one type."""
    return all(a.dtype == first.dtype for a in others)


@njit(cache=True, error_model="numpy")
def _to_affine(weight, bias, mean, variance, eps, affine):
    for c in range(len(weight)):
        affine[0, c] = weight[c] / np.sqrt(variance[c] + eps)
        affine[1, c] = bias[c] - mean[c] * affine[0, c]


@normalize_groups.faster_on("numpy")
def _normalize_groups_numba(x, weight, bias, groups: int, eps: float, maps: Maps, relu: bool):
    weight, bias = weight.astype(x.dtype, copy=False), bias.astype(x.dtype, copy=False)
    N, x, y = len(x), np.ascontiguousarray(x), np.empty(x.shape, x.dtype)
    statistics = np.empty((2, N, len(maps), groups), x.dtype)
    _normalize_image(N, x, weight, bias, eps, _starts(maps), _floor(x, relu), y, *statistics)
    return y, statistics


@normalize_groups_gradient.faster_on("numpy")
def _normalize_groups_gradient_numba(x, gy, weight, statistics, eps: float, maps: Maps, y):
    weight, floor = weight.astype(x.dtype, copy=False), _floor(x, y is not None)
    x, gy, y = (np.ascontiguousarray(a) for a in (x, gy, x if y is None else y))
    (N, _, C), gx = x.shape, np.empty(gy.shape, gy.dtype)
    gweight, gbias = np.zeros((N, C)), np.zeros((N, C))  # a row per image: threads never write to the same sum
    starts = _starts(maps)
    _normalize_image_gradient(N, x, gy, weight, *statistics, eps, starts, y, floor, gx, gweight, gbias)
    return gx, gweight.sum(axis=0).astype(gy.dtype), gbias.sum(axis=0).astype(gy.dtype)


def _floor(x, relu: bool):
    """What y must exceed: 0, or nothing."""
    return x.dtype.type(0 if relu else -np.inf)


# An image stays in cache; its sums are per channel, so that the inner loops run along memory and vectorise, and in
# float64 after every few pixels.
_RUN = 64  # pixels


@parallel(error_model="numpy")
def _normalize_image(n, x, weight, bias, eps, starts, floor, y, means, variances):
    """One image.

    One pass finds mean and variance: sums of x - pivot and of its square, with a pixel's value for the
    pivot, so that a large mean cancels nothing; then each group's from its channels' (Chan et al. 1979).
    """
    x, y, means, variances = x[n], y[n], means[n], variances[n]
    C, groups = x.shape[1], means.shape[1]
    width = C // groups
    total, square = np.empty(C), np.empty(C)
    part, part_square = np.empty(C, x.dtype), np.empty(C, x.dtype)
    slope, offset = np.empty(C, x.dtype), np.empty(C, x.dtype)
    for level in range(starts.size - 1):
        pixels, out = x[starts[level] : starts[level + 1]], y[starts[level] : starts[level + 1]]
        count, pivot = len(pixels), pixels[0]
        total[:] = 0
        square[:] = 0
        for first in range(0, count, _RUN):
            run = pixels[first : first + _RUN]
            part[:] = 0
            part_square[:] = 0
            for s in range(len(run)):
                for c in range(C):
                    d = run[s, c] - pivot[c]
                    part[c] += d
                    part_square[c] += d * d
            for c in range(C):
                total[c] += part[c]
                square[c] += part_square[c]
        for g in range(groups):
            center = spread = 0.0
            for c in range(g * width, (g + 1) * width):
                center += (pivot[c] + total[c] / count) / width
            for c in range(g * width, (g + 1) * width):
                away = pivot[c] + total[c] / count - center
                spread += square[c] - total[c] * total[c] / count + count * away * away
            variance = spread / (count * width)
            scale = 1 / np.sqrt(variance + eps)
            means[level, g], variances[level, g] = center, variance
            for c in range(g * width, (g + 1) * width):
                slope[c] = scale * weight[c]
                offset[c] = bias[c] - center * scale * weight[c]
        for s in range(count):
            for c in range(C):
                value = pixels[s, c] * slope[c] + offset[c]
                out[s, c] = floor if value < floor else value


@parallel(error_model="numpy")
def _normalize_image_gradient(n, x, gy, weight, mean, variance, eps, starts, y, floor, gx, gweight, gbias):
    x, gy, y, gx, mean, variance, gweight, gbias = x[n], gy[n], y[n], gx[n], mean[n], variance[n], gweight[n], gbias[n]
    C, groups = x.shape[1], mean.shape[1]
    width, zero = C // groups, x.dtype.type(0)
    sum_g, sum_gn = np.empty(C), np.empty(C)
    along_gy, along_x, constant = np.empty(C, x.dtype), np.empty(C, x.dtype), np.empty(C, x.dtype)
    center, slope = np.empty(C, x.dtype), np.empty(C, x.dtype)
    part_g, part_gn = np.empty(C, x.dtype), np.empty(C, x.dtype)
    for level in range(starts.size - 1):
        start, stop = starts[level], starts[level + 1]
        pixels, values, arriving, out = x[start:stop], y[start:stop], gy[start:stop], gx[start:stop]
        count = len(pixels) * width
        for c in range(C):
            center[c], slope[c] = mean[level, c // width], 1 / np.sqrt(variance[level, c // width] + eps)
            sum_g[c] = sum_gn[c] = 0
        for first in range(0, len(pixels), _RUN):
            inside = slice(first, first + _RUN)
            run, value, g_run = pixels[inside], values[inside], arriving[inside]
            part_g[:] = 0
            part_gn[:] = 0
            for s in range(len(run)):
                for c in range(C):
                    g = g_run[s, c] if value[s, c] > floor else zero
                    part_g[c] += g
                    part_gn[c] += g * ((run[s, c] - center[c]) * slope[c])
            for c in range(C):
                sum_g[c] += part_g[c]
                sum_gn[c] += part_gn[c]
        for c in range(C):
            gbias[c] += sum_g[c]
            gweight[c] += sum_gn[c]
        for group in range(groups):
            mean_g = mean_gn = 0.0
            for c in range(group * width, (group + 1) * width):
                mean_g += sum_g[c] * weight[c] / count
                mean_gn += sum_gn[c] * weight[c] / count
            for c in range(group * width, (group + 1) * width):
                # dL/dx = slope * (gy * weight - mean_g - (x - center) * slope * mean_gn)
                along_gy[c] = slope[c] * weight[c]
                along_x[c] = -slope[c] * slope[c] * mean_gn
                constant[c] = -slope[c] * mean_g - along_x[c] * center[c]
        for s in range(len(pixels)):
            for c in range(C):
                g = arriving[s, c] if values[s, c] > floor else zero
                out[s, c] = along_gy[c] * g + along_x[c] * pixels[s, c] + constant[c]
