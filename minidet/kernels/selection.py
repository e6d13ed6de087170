"""The few largest probabilities among millions."""

from __future__ import annotations

import math

import numpy as np

from minidet import backend
from minidet.kernels import cuda
from minidet.kernels.kernel import Kernel


@Kernel
def best_pairs(logits, threshold: float, count: int):
    """The largest probabilities of every row that exceed a threshold, and their positions, best first.

    Shapes:
        logits: (N, P)
        returns: positions (N, k) int64 and probabilities (N, k), k = min(count, P)
    Rule: a probability passes when it is > threshold.  Where fewer pass, the rest is filled up with position 0 and
        probability -1: on a device, to make arrays of just so many would be to wait.
    Ties: of equal probabilities the lower position goes first.
    """
    xp = backend.namespace(logits)
    scores = probabilities(logits)
    nothing = xp.full_like(scores, -1.0)
    scores = xp.where(scores > threshold, scores, nothing)
    order = xp.argsort(-scores, axis=1, stable=True)[:, : min(count, logits.shape[1])]
    best = xp.take_along_axis(scores, order, axis=1)
    return xp.where(best > 0, xp.astype(order, xp.int64), xp.zeros_like(order, dtype=xp.int64)), best


def probabilities(logits):
    """The logistic function: e^-|x| never overflows, and gives both tails exactly."""
    xp = backend.namespace(logits)
    tail = xp.exp(-xp.abs(logits))
    return xp.where(logits >= 0, 1 / (1 + tail), tail / (1 + tail))


@best_pairs.faster_on("numpy")
def _best_pairs_numpy(logits, threshold: float, count: int):
    t, shape = threshold, (len(logits), min(count, logits.shape[1]))
    surely = -math.inf if t <= 0 else math.log(t / (1 - t)) - 0.01
    positions, best = np.zeros(shape, np.int64), np.full(shape, -1, logits.dtype)
    for n, row in enumerate(logits):
        # Few of millions pass: compare logits with a threshold that is surely too low, and apply the exact rule,
        # on probabilities, to those few.
        passing = np.flatnonzero(row > surely)
        scores = probabilities(row[passing])
        above = scores > t
        passing, scores = passing[above], scores[above]
        if len(passing) > count:
            limit = np.partition(scores, len(scores) - count)[len(scores) - count]
            above, equal = np.flatnonzero(scores > limit), np.flatnonzero(scores == limit)
            rows = np.sort(np.concatenate([above, equal[: count - len(above)]]))  # of equal ones the first
            passing, scores = passing[rows], scores[rows]
        order = np.argsort(-scores, kind="stable")
        positions[n, : len(order)], best[n, : len(order)] = passing[order], scores[order]
    return positions, best


_SHARES = 1 << 16  # threads for a row


@best_pairs.faster_on("cupy", when=lambda logits, *_: str(logits.dtype) == "float32" and 0 < logits.shape[1] < 1 << 32)
def _best_pairs_cuda(logits, threshold: float, count: int):
    xp, (N, P), real = backend.namespace(logits), logits.shape, logits.dtype
    k, threads, logits = min(count, P), min(P, _SHARES), cuda.contiguous(logits)
    limits, wanted = xp.zeros(N, dtype=xp.int64), xp.full(N, k, dtype=xp.int64)
    counts, found = xp.zeros((N, 256), dtype=xp.int32), xp.zeros(N, dtype=xp.int32)
    rule = float(threshold)
    for shift in range(56, -8, -8):
        arguments = logits, limits, counts, N, threads, P, rule, shift
        cuda.launch(__file__, "count", N * threads, *arguments, real=real)
        cuda.launch(__file__, "pick", N, counts, limits, wanted, N, shift, real=real)
    keys, positions = xp.zeros((N, k), dtype=xp.int64), xp.empty((N, k), dtype=xp.int64)
    cuda.launch(__file__, "collect", N * threads, logits, limits, found, keys, N, threads, P, k, rule, real=real)
    keys, best = xp.sort(keys, axis=1), xp.empty((N, k), dtype=real)
    cuda.launch(__file__, "unpack", N * k, keys, positions, best, N * k, real=real)
    return positions, best
