"""Normalization on a GPU: normalization_gpu.cu says how the sums are shared out."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import accumulate

import numpy as np

from minidet import backend
from minidet.kernels import cuda
from minidet.kernels.normalization import Maps, norm_to_affine, normalize_groups, normalize_groups_gradient
from minidet.kernels.precision import sums_in

_THREADS = 1 << 19  # enough for any GPU
_SHORTEST = 16  # pixels of a run
_SHARES = 64  # sums that one thread adds up in the end


def alike(first, *others) -> bool:
    """Whether arrays hold numbers of one type."""
    return all(a.dtype == first.dtype for a in others)


@norm_to_affine.faster_on("cupy", when=lambda weight, *rest: alike(weight, *rest[:3]))
def _norm_to_affine_cuda(weight, bias, mean, variance, eps: float):
    (C,), dtype = weight.shape, weight.dtype
    affine = backend.namespace(weight).empty((2, C), dtype=dtype)
    arrays = map(cuda.contiguous, (weight, bias, mean, variance))
    cuda.launch(__file__, "to_affine", C, *arrays, affine, C, float(eps), real=dtype)
    return affine


@normalize_groups.faster_on("cupy", when=lambda x, *_: x.size > 0, narrow=True)
def _normalize_groups_cuda(x, weight, bias, shortcut, groups: int, eps: float, maps: Maps, relu: bool):
    xp, x, wide = backend.namespace(x), cuda.contiguous(x), sums_in(x)
    weight, bias = (xp.astype(a, wide, copy=False) for a in (weight, bias))
    start, sums = _runs(x, maps, groups, float(eps), int(relu))
    y, statistics = xp.empty(x.shape, dtype=x.dtype), xp.empty((2, len(x), len(maps), groups), dtype=wide)
    more = x if shortcut is None else cuda.contiguous(xp.astype(shortcut, x.dtype, copy=False))
    start("normalize", x, weight, bias, sums("moments", x), more, int(shortcut is not None), statistics, y)
    return y, statistics


@normalize_groups_gradient.faster_on("cupy", when=lambda x, gy, *_: x.size > 0 and x.dtype == gy.dtype, narrow=True)
def _normalize_groups_gradient_cuda(x, gy, weight, statistics, eps: float, maps: Maps, y):
    xp, x, gy, wide = backend.namespace(x), cuda.contiguous(x), cuda.contiguous(gy), sums_in(x)
    weight, gx = xp.astype(weight, wide, copy=False), xp.empty(x.shape, dtype=x.dtype)
    start, sums = _runs(x, maps, statistics.shape[3], float(eps), int(y is not None))
    y = x if y is None else cuda.contiguous(y)
    totals = sums("gradient_sums", x, gy, y, statistics)
    start("gradient", x, gy, y, weight, statistics, totals, gx)
    of_bias, of_weight = (xp.astype(xp.sum(total, axis=(0, 1)), wide) for total in (totals[0, ...], totals[1, ...]))
    return gx, of_weight, of_bias


def _runs(x, maps: Maps, groups: int, *rule):
    """Two functions that run a kernel on all runs of pixels: as it is; and for its sums (2, N, L, C)."""
    xp, (N, S, C), L, length = backend.namespace(x), x.shape, len(maps), max(_SHORTEST, -(-x.size // _THREADS))
    plan, counts = _plan(maps, length, xp, int(x.device))
    threads = N * sum(counts) * C

    def start(name: str, *arrays):
        sizes = plan, threads, L, S, C, groups, length
        cuda.launch(__file__, name, threads, *arrays, *sizes, *rule, real=x.dtype)

    def sums(name: str, *arrays):
        totals = xp.empty((2, threads), dtype=xp.float64)
        start(name, *arrays, totals)
        bounds = plan[1, :]
        for shares in (_SHARES, 1) if max(counts) > _SHARES else (1,):
            parts, totals = totals, xp.empty((2, N, L * shares, C), dtype=xp.float64)
            arguments = parts, totals, bounds, totals.size, L, shares, C
            cuda.launch(__file__, "gather", totals.size, *arguments, real=x.dtype)
            bounds = plan[2, :]
        return totals

    return start, sums


@lru_cache(maxsize=4096)
def _plan(maps: Maps, length: int, xp, device: int):
    """Where levels begin: in pixels, in runs of `length`, and in shares; and how many runs each has."""
    pixels = [math.prod(map_) for map_ in maps]
    runs = [-(-count // length) for count in pixels]
    rows = [[0, *accumulate(counts)] for counts in (pixels, runs, len(maps) * [_SHARES])]
    return xp.asarray(np.array(rows, np.int64)), runs
