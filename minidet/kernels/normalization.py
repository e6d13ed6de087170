"""Group normalization of a pyramid: values, statistics, and the way back."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import numpy as np

from minidet import backend
from minidet.kernels.kernel import Kernel
from minidet.kernels.parallel import parallel

Maps = tuple[tuple[int, int], ...]


@Kernel
def normalize_groups(x, weight, bias, groups: int, eps: float, maps: Maps, relu: bool):
    """Subtract the mean and divide by the standard deviation of each image, level and channel group.

    y = act(weight * (x - mean) / sqrt(variance + eps) + bias), with the biased variance; act is the rectifier
    if `relu`, else the identity.

    Shapes:
        x: (N, S, C), the levels `maps` one after the other
        weight: (C,)
        bias: (C,)
        returns: y (N, S, C), and mean and 1 / sqrt(variance + eps), both (N, L, groups)
    Source: Wu and He, Group Normalization, arXiv:1803.08494, eq. (1), (2), (7).
    """
    xp = backend.namespace(x)
    N, _, C = x.shape
    levels, means, scales = [], [], []
    for inside in _places(maps):
        level = x[:, inside, :]
        grouped = xp.reshape(level, (N, level.shape[1], groups, C // groups))
        mean = xp.mean(grouped, axis=(1, 3), keepdims=True)
        scale = 1 / xp.sqrt(xp.mean((grouped - mean) ** 2, axis=(1, 3), keepdims=True) + eps)
        levels.append(xp.reshape((grouped - mean) * scale, level.shape) * weight + bias)
        means.append(xp.reshape(mean, (N, groups)))
        scales.append(xp.reshape(scale, (N, groups)))
    y = xp.concat(levels, axis=1)
    return xp.maximum(y, xp.zeros_like(y)) if relu else y, xp.stack(means, axis=1), xp.stack(scales, axis=1)


@Kernel
def normalize_groups_gradient(x, gy, weight, mean, scale, maps: Maps, y):
    """dL/dx, dL/dweight and dL/dbias of `normalize_groups`.

    With n = (x - mean) * scale and g = dL/dy * weight, the mean taken over the same elements:
    dL/dx = scale * (g - mean(g) - n * mean(g * n)).  Of a rectified y, dL/dy counts only where y > 0.

    Shapes:
        x: (N, S, C)
        gy: (N, S, C)
        weight: (C,)
        mean: (N, L, groups)
        scale: (N, L, groups)
        y: (N, S, C) if it was rectified, else None
        returns: (N, S, C), (C,), (C,)
    """
    xp = backend.namespace(x)
    gy = gy if y is None else xp.where(y > 0, gy, xp.zeros_like(gy))
    N, _, C = x.shape
    groups = mean.shape[2]
    levels = []
    gweight = xp.zeros((C,), dtype=gy.dtype, device=gy.device)
    for number, inside in enumerate(_places(maps)):
        level, gy_level = x[:, inside, :], gy[:, inside, :]
        shape = (N, level.shape[1], groups, C // groups)
        level_mean = xp.reshape(mean[:, number, :], (N, 1, groups, 1))
        level_scale = xp.reshape(scale[:, number, :], (N, 1, groups, 1))
        n = (xp.reshape(level, shape) - level_mean) * level_scale
        g = xp.reshape(gy_level * weight, shape)
        pull = xp.mean(g, axis=(1, 3), keepdims=True) + n * xp.mean(g * n, axis=(1, 3), keepdims=True)
        levels.append(xp.reshape(level_scale * (g - pull), level.shape))
        gweight = gweight + xp.sum(gy_level * xp.reshape(n, level.shape), axis=(0, 1))
    return xp.concat(levels, axis=1), gweight, xp.sum(gy, axis=(0, 1))


def _places(maps: Maps) -> list[slice]:
    """Where each level lies along S."""
    ends = np.cumsum([0, *(math.prod(map_) for map_ in maps)]).tolist()
    return [slice(start, stop) for start, stop in pairwise(ends)]


@lru_cache(maxsize=1024)
def _starts(maps: Maps) -> np.ndarray:
    return np.array([0, *(place.stop for place in _places(maps))], dtype=np.int64)


@normalize_groups.faster_on("numpy")
def _normalize_groups_numba(x, weight, bias, groups: int, eps: float, maps: Maps, relu: bool):
    weight, bias = weight.astype(x.dtype, copy=False), bias.astype(x.dtype, copy=False)
    N, x, y = len(x), np.ascontiguousarray(x), np.empty(x.shape, x.dtype)
    means, scales = np.empty((N, len(maps), groups), x.dtype), np.empty((N, len(maps), groups), x.dtype)
    _normalize_image(N, x, weight, bias, eps, _starts(maps), _floor(x, relu), y, means, scales)
    return y, means, scales


@normalize_groups_gradient.faster_on("numpy")
def _normalize_groups_gradient_numba(x, gy, weight, mean, scale, maps: Maps, y):
    weight, floor = weight.astype(x.dtype, copy=False), _floor(x, y is not None)
    x, gy, y = (np.ascontiguousarray(a) for a in (x, gy, x if y is None else y))
    (N, _, C), gx = x.shape, np.empty(gy.shape, gy.dtype)
    gweight, gbias = np.zeros((N, C)), np.zeros((N, C))  # a row per image: threads never write to the same sum
    starts = _starts(maps)
    _normalize_image_gradient(N, x, gy, weight, mean, scale, starts, y, floor, gx, gweight, gbias)
    return gx, gweight.sum(axis=0).astype(gy.dtype), gbias.sum(axis=0).astype(gy.dtype)


def _floor(x, relu: bool):
    """What y must exceed: 0, or nothing."""
    return x.dtype.type(0 if relu else -np.inf)


# An image stays in cache; its sums are per channel, so that the inner loops run along memory and vectorise, and in
# float64 after every few pixels.
_RUN = 64  # pixels


@parallel(error_model="numpy")
def _normalize_image(n, x, weight, bias, eps, starts, floor, y, means, scales):
    """One image.

    One pass finds mean and variance: sums of x - pivot and of its square, with a pixel's value for the
    pivot, so that a large mean cancels nothing; then each group's from its channels' (Chan et al. 1979).
    """
    x, y, means, scales = x[n], y[n], means[n], scales[n]
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
            scale = 1 / np.sqrt(spread / (count * width) + eps)
            means[level, g], scales[level, g] = center, scale
            for c in range(g * width, (g + 1) * width):
                slope[c] = scale * weight[c]
                offset[c] = bias[c] - center * scale * weight[c]
        for s in range(count):
            for c in range(C):
                value = pixels[s, c] * slope[c] + offset[c]
                out[s, c] = floor if value < floor else value


@parallel(error_model="numpy")
def _normalize_image_gradient(n, x, gy, weight, mean, scale, starts, y, floor, gx, gweight, gbias):
    x, gy, mean, scale, y, gx, gweight, gbias = x[n], gy[n], mean[n], scale[n], y[n], gx[n], gweight[n], gbias[n]
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
            center[c], slope[c] = mean[level, c // width], scale[level, c // width]
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
