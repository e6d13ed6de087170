"""Adam with decoupled weight decay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from minidet import backend
from minidet.kernels import cuda
from minidet.kernels.kernel import Kernel
from minidet.kernels.parallel import parallel
from minidet.kernels.places import over_all, writable

STEP = __file__.replace("adamw", "step")


@dataclass(frozen=True)
class AdamW:
    """Every weight steps by its mean gradient over the gradient's typical size.

        m = beta1 * m + (1 - beta1) * g           (m, v start at 0)
        v = beta2 * v + (1 - beta2) * g**2
        p = (1 - lr * weight_decay) * p - lr * m^ / (sqrt(v^) + eps)

    with m^ = m / (1 - beta1**t) and v^ = v / (1 - beta2**t), which undo the start at zero; t counts this
    parameter's own steps from 1.  The decay is not part of g, so it is not divided by sqrt(v^).

    Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization, arXiv:1711.05101, algorithm 2.
    Differs: lr multiplies the decay too, as in torch.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    state: ClassVar[tuple[str, ...]] = ("mean", "square")

    def __post_init__(self):
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"AdamW: {name} must be in [0, 1), got {getattr(self, name)}")
        if self.eps <= 0:
            raise ValueError(f"AdamW: eps must be above 0, got {self.eps}")

    def update(self, moves: Sequence[tuple], *, steps: Sequence[int], lr: float, weight_decay: float) -> None:
        """One step of every (p, g, m, v); see the class for the formula."""
        # The corrections are numbers, not arrays: fold them into the rate and eps.
        #   lr * m^ / (sqrt(v^) + eps) = rate * m / (sqrt(v) + eps * root)
        numbers = {}
        for step in set(steps):
            root = math.sqrt(1 - self.beta2**step)
            rate = lr * root / (1 - self.beta1**step)
            numbers[step] = 1 - lr * weight_decay, self.beta1, self.beta2, self.eps * root, rate
        adamw_step.each([(*arrays, *numbers[step]) for arrays, step in zip(moves, steps, strict=True)])


@Kernel
def adamw_step(p, g, m, v, keep: float, beta1: float, beta2: float, eps: float, rate: float):
    """One AdamW step, in place: the new m and v, then p = keep * p - rate * m / (sqrt(v) + eps).

    Shapes:
        p, g, m, v: any, all the same; only g is left as it was
    """
    xp = backend.namespace(p)
    change = g - m
    change *= 1 - beta1
    m += change
    square = g * g
    square *= 1 - beta2
    v *= beta2
    v += square
    scale = xp.sqrt(v)
    scale += eps
    p *= keep
    p -= rate * m / scale


@adamw_step.faster_on("numpy", when=writable, many=True)
def _adamw_steps_numba(calls):
    # One pass over memory instead of a dozen, and one loop for all parameters.
    p, g, m, v, *constants = zip(*calls, strict=True)
    keep, beta1, beta2, eps, rate = np.array(constants)
    constants = np.array([keep, 1 - beta1, beta2, 1 - beta2, eps, rate], p[0].dtype)
    return over_all(_adamw, (p, g, m, v), constants)


def flat_views(p, g, *rest) -> bool:
    """Whether p and its state can be written, element by element, through one-dimensional views."""
    state = [a for a in rest if not isinstance(a, float | int)]
    return g.dtype == p.dtype and all(a.dtype == p.dtype and a.flags.c_contiguous for a in (p, *state))


@adamw_step.faster_on("cupy", when=flat_views)
def _adamw_step_cuda(p, g, m, v, *constants):
    arguments = p, cuda.contiguous(g), m, v, p.size, *map(float, constants)
    cuda.launch(STEP, "adamw", p.size, *arguments, real=p.dtype)


@parallel(error_model="numpy")
def _adamw(block, table, memory, constants):
    line = table[block]
    size, c = line[1], constants[:, line[0]]
    p, g = memory[line[2] : line[2] + size], memory[line[3] : line[3] + size]
    m, v = memory[line[4] : line[4] + size], memory[line[5] : line[5] + size]
    keep, fresh1, beta2, fresh2, eps, rate = c[0], c[1], c[2], c[3], c[4], c[5]
    for i in range(len(p)):
        mean = m[i] + (g[i] - m[i]) * fresh1
        square = v[i] * beta2 + g[i] * g[i] * fresh2
        m[i] = mean
        v[i] = square
        p[i] = p[i] * keep - rate * mean / (np.sqrt(square) + eps)
