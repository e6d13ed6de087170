"""Gradient clipping: one wild batch must not undo a thousand good ones."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from minidet import backend
from minidet.autograd import Tensor
from minidet.backend import Array
from minidet.kernels.kernel import Kernel
from minidet.kernels.parallel import parallel
from minidet.kernels.places import blocks, over_all, writable

GUARD = 1e-6  # torch.nn.utils.clip_grad_norm_: keeps max_norm / norm finite at a zero gradient


def gradient_norm(parameters: Iterable[Tensor]) -> Array | float:
    """The Euclidean length of all gradients together, as one long vector; 0 without any.

    In the gradients' own dtype and on their device, where the result stays: to read it is to wait for it.
    """
    total = sum(squared_length.each([(p.grad,) for p in parameters if p.grad is not None]))
    return float(total) ** 0.5 if isinstance(total, int | np.generic) else total**0.5


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Array | float:
    """Scale all gradients by min(1, max_norm / (norm + 1e-6)); returns the norm before.

    The direction is kept; a gradient exactly at `max_norm` is shortened by the guard's part in 1e6.

    Source: Pascanu et al., arXiv:1211.5063, section 3.2 and algorithm 1, with torch's guard.
    Differs: gradients whose norm is not finite stay as they are, so that the caller can see which are bad.
    Raises:
        ValueError: if `max_norm` is not above 0.
    """
    if not max_norm > 0:
        raise ValueError(f"clip_grad_norm: max_norm must be above 0, got {max_norm}")
    parameters = list(parameters)
    norm = gradient_norm(parameters)
    factor = max_norm / (norm + GUARD)
    if isinstance(norm, float):
        if factor >= 1 or not math.isfinite(norm):
            return norm
    else:  # a device is told to multiply by 1: to ask it first whether the factor is below would be to wait
        xp = backend.namespace(norm)
        factor = xp.where((factor < 1) & xp.isfinite(norm), factor, xp.ones_like(factor))
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad *= factor
    return norm


@Kernel
def squared_length(g):
    """The sum of the squares of all elements.

    Shapes:
        g: any
        returns: ()
    """
    xp = backend.namespace(g)
    flat = xp.reshape(g, (-1,))
    return xp.vecdot(flat, flat)  # reads once and writes nothing, where sum(flat * flat) makes a copy


@squared_length.faster_on("numpy", when=writable, many=True)
def _squared_lengths_numba(calls):
    gradients = [g for (g,) in calls]
    row, *_ = blocks(tuple([g.size for g in gradients]))
    sums = np.zeros(len(row))
    with np.errstate(over="ignore"):
        return over_all(_squares, (gradients,), sums) and list(np.bincount(row, sums).astype(gradients[0].dtype))


@parallel(fastmath={"reassoc"})  # else every sum waits for the one before
def _squares(block, table, memory, sums):
    g, total = memory[table[block, 2] : table[block, 2] + table[block, 1]], 0.0
    for i in range(len(g)):
        total += np.float64(g[i]) * np.float64(g[i])
    sums[block] = total
