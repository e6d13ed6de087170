"""Group normalization of a pyramid, values, statistics and the way back; and what a norm with fixed statistics is."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import numpy as np

from minidet import backend
from minidet.kernels.compiler import compiled
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
def normalize_groups(x, weight, bias, shortcut, groups: int, eps: float, maps: Maps, relu: bool):
    """Subtract the mean and divide by the standard deviation of each image, level and channel group.

    y = act(weight * (x - mean) / sqrt(variance + eps) + bias + shortcut), with the biased variance; act is the
    rectifier if `relu`, else the identity.

    Shapes:
        x: (N, S, C), the levels `maps` one after the other
        weight: (C,)
        bias: (C,)
        shortcut: (N, S, C) or None for 0
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
    if shortcut is not None:
        y = y + shortcut
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


@normalize_groups.faster_on("numpy")
def _normalize_groups_numba(x, weight, bias, shortcut, groups: int, eps: float, maps: Maps, relu: bool):
    N, y, statistics = len(x), np.empty(x.shape, x.dtype), np.empty((2, len(x), len(maps), groups), x.dtype)
    added = shortcut is not None
    flat, more = (np.ascontiguousarray(a).reshape(N, -1) for a in (x, shortcut if added else x))
    _normalize_image(N, flat, weight, bias, more, added, eps, _starts(maps), relu, y.reshape(N, -1), statistics)
    return y, statistics


@normalize_groups_gradient.faster_on("numpy")
def _normalize_groups_gradient_numba(x, gy, weight, statistics, eps: float, maps: Maps, y):
    N, gx = len(x), np.empty(gy.shape, gy.dtype)
    sums = np.zeros((N, 2, len(weight)))  # a part for every image: threads never write to the same sum
    flat = (np.ascontiguousarray(a).reshape(N, -1) for a in (x, gy, x if y is None else y))
    _normalize_image_gradient(N, *flat, weight, statistics, eps, _starts(maps), y is not None, gx.reshape(N, -1), sums)
    gbias, gweight = sums.sum(axis=0).astype(gy.dtype)
    return gx, gweight, gbias


# An image stays in cache.  Its numbers are handled a span at a time, several pixels if they have few channels: along a
# span all loops run through memory and vectorise, for what belongs to a channel is repeated there.
_SPAN = 256  # numbers, if a pixel has not more; of a small map fewer, or filling a span would take longer than using it
_RUN = 64  # spans that are added up in the type of x, their sums then in float64


@compiled
def _repeat(rows, C, span):
    """Of every row the first C numbers again and again."""
    for k in range(len(rows)):
        for place in range(C, span, C):
            part = rows[k, place : place + C]
            for c in range(len(part)):
                part[c] = rows[k, c]


@compiled
def _fold(rows, span, totals):
    """Move every channel's sums along the rows to its totals."""
    C = totals.shape[1]
    for k in range(len(rows)):
        for place in range(0, span, C):
            part = rows[k, place : place + C]
            for c in range(len(part)):
                totals[k, c] += part[c]
                part[c] = 0


@parallel(error_model="numpy", fastmath={"contract"})
def _normalize_image(n, x, weight, bias, shortcut, added, eps, starts, relu, y, statistics):
    """One image.

    One pass finds mean and variance: sums of x - pivot and of its square, with an element of the group for the
    pivot, so that a large mean cancels little.
    """
    C, groups = len(weight), statistics.shape[3]
    width, longest, floor = C // groups, C * max(1, _SPAN // C), x.dtype.type(0 if relu else -np.inf)
    totals, spans = np.empty((2, C)), np.empty((6, longest), x.dtype)  # pivot, both sums, zeros, slope, offset
    for level in range(len(starts) - 1):
        start, stop = starts[level], starts[level + 1]
        pixels, out, count = x[n, C * start : C * stop], y[n, C * start : C * stop], (stop - start) * width
        span = C * max(1, min(_SPAN // C, (stop - start) // 8))
        for group in range(groups):
            for c in range(group * width, (group + 1) * width):
                spans[0, c] = pixels[group * width]
                totals[0, c] = totals[1, c] = spans[1, c] = spans[2, c] = spans[3, c] = 0
        _repeat(spans[:4], C, span)
        for place in range(0, len(pixels), span):
            row = pixels[place : place + span]
            for j in range(len(row)):
                d = row[j] - spans[0, j]
                spans[1, j] += d
                spans[2, j] += d * d
            if place // span % _RUN == _RUN - 1 or place + span >= len(pixels):
                _fold(spans[1:3], span, totals)
        for group in range(groups):
            away = spread = 0.0
            for c in range(group * width, (group + 1) * width):
                away += totals[0, c]
                spread += totals[1, c]
            away /= count
            spread = spread / count - away * away
            center, variance = spans[0, group * width] + away, 0.0 if spread < 0 else spread
            scale = 1 / np.sqrt(variance + eps)
            statistics[0, n, level, group], statistics[1, n, level, group] = center, variance
            for c in range(group * width, (group + 1) * width):
                spans[4, c] = scale * weight[c]
                spans[5, c] = bias[c] - center * scale * weight[c]
        _repeat(spans[4:], C, span)
        for place in range(0, len(pixels), span):
            row, out_row = pixels[place : place + span], out[place : place + span]
            more = shortcut[n, C * start + place : C * stop] if added else spans[3]
            for j in range(len(row)):
                value = row[j] * spans[4, j] + spans[5, j] + more[j]
                out_row[j] = floor if value < floor else value


@parallel(error_model="numpy", fastmath={"contract"})
def _normalize_image_gradient(n, x, gy, y, weight, statistics, eps, starts, relu, gx, sums):
    C, groups = len(weight), statistics.shape[3]
    width, longest = C // groups, C * max(1, _SPAN // C)
    zero, floor = x.dtype.type(0), x.dtype.type(0 if relu else -np.inf)
    totals, spans = np.empty((2, C)), np.empty((6, longest), x.dtype)  # center, both sums, factors of g and x, constant
    for level in range(len(starts) - 1):
        start, stop = C * starts[level], C * starts[level + 1]
        xs, gs, ys, out = x[n, start:stop], gy[n, start:stop], y[n, start:stop], gx[n, start:stop]
        count, span = (stop - start) // groups, C * max(1, min(_SPAN // C, (stop - start) // (8 * C)))
        for group in range(groups):
            for c in range(group * width, (group + 1) * width):
                spans[0, c] = statistics[0, n, level, group]
                totals[0, c] = totals[1, c] = spans[1, c] = spans[2, c] = 0
        _repeat(spans[:3], C, span)
        for place in range(0, len(xs), span):
            row, g_row, y_row = xs[place : place + span], gs[place : place + span], ys[place : place + span]
            for j in range(len(row)):
                g = g_row[j] if y_row[j] > floor else zero
                spans[1, j] += g
                spans[2, j] += g * (row[j] - spans[0, j])
            if place // span % _RUN == _RUN - 1 or place + span >= len(xs):
                _fold(spans[1:3], span, totals)
        for group in range(groups):
            scale = 1 / np.sqrt(statistics[1, n, level, group] + eps)
            mean_g = mean_gn = 0.0
            for c in range(group * width, (group + 1) * width):
                sums[n, 0, c] += totals[0, c]
                sums[n, 1, c] += totals[1, c] * scale
                mean_g += totals[0, c] * weight[c]
                mean_gn += totals[1, c] * weight[c]
            mean_g, mean_gn = mean_g / count, mean_gn * scale / count
            for c in range(group * width, (group + 1) * width):
                # dL/dx = scale * (gy * weight - mean_g - (x - center) * scale * mean_gn)
                spans[3, c] = scale * weight[c]
                spans[4, c] = -scale * scale * mean_gn
                spans[5, c] = scale * (scale * mean_gn * spans[0, c] - mean_g)
        _repeat(spans[3:], C, span)
        for place in range(0, len(xs), span):
            row, g_row = xs[place : place + span], gs[place : place + span]
            y_row, out_row = ys[place : place + span], out[place : place + span]
            for j in range(len(row)):
                g = g_row[j] if y_row[j] > floor else zero
                out_row[j] = spans[3, j] * g + (spans[4, j] * row[j] + spans[5, j])
