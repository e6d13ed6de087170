"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from minidet.kernels import cuda
from minidet.kernels.kernel import Kernel
from minidet.kernels.parallel import parallel
from minidet.kernels.places import over_all, writable
from minidet.optim.adamw import STEP, flat_views


@dataclass(frozen=True)
class SGD:
    """Roll downhill: the velocity remembers past gradients, the rate multiplies it at use.

        d = g + weight_decay * p
        u = momentum * u + d                      (u starts at 0)
        p = p - lr * (d + momentum * u  if nesterov else  u)

    Because `lr` multiplies `u` where it is used, and is not part of what `u` accumulates, a change of the
    learning rate acts at once.

    Source: RetinaNet, arXiv:1708.02002, section 4.1 "Optimization" (momentum 0.9, weight decay 0.0001);
        Nesterov momentum in the form of Sutskever et al., ICML 2013, section 2, as torch writes it.
    """

    momentum: float = 0.9
    nesterov: bool = False

    state: ClassVar[tuple[str, ...]] = ("velocity",)

    def __post_init__(self):
        if not 0 <= self.momentum < 1:
            raise ValueError(f"SGD: momentum must be in [0, 1), got {self.momentum}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("SGD: nesterov needs a momentum above 0")

    def update(self, moves: Sequence[tuple], *, steps: Sequence[int], lr: float, weight_decay: float) -> None:
        """One step of every (p, g, u); see the class for the formula."""
        direct, through = (lr, lr * self.momentum) if self.nesterov else (0.0, lr)
        sgd_step.each([(*arrays, weight_decay, self.momentum, direct, through) for arrays in moves])


@Kernel
def sgd_step(p, g, u, weight_decay: float, momentum: float, direct: float, through: float):
    """One SGD step, in place: d = g + weight_decay * p, the new u, then p = p - direct * d - through * u.

    Shapes:
        p, g, u: any, all the same; only g is left as it was
    """
    change = p * weight_decay
    change += g
    u *= momentum
    u += change
    change *= direct
    change += through * u
    p -= change


@sgd_step.faster_on("numpy", when=writable, many=True)
def _sgd_steps_numba(calls):
    # One pass over memory instead of eight, and one loop for all parameters.
    p, g, u, *constants = zip(*calls, strict=True)
    return over_all(_sgd, (p, g, u), np.array(constants, p[0].dtype))


@sgd_step.faster_on("cupy", when=flat_views)
def _sgd_step_cuda(p, g, u, *constants):
    arguments = p, cuda.contiguous(g), u, p.size, *map(float, constants)
    cuda.launch(STEP, "sgd", p.size, *arguments, real=p.dtype)


@parallel
def _sgd(block, table, memory, constants):
    line = table[block]
    size, c = line[1], constants[:, line[0]]
    p, g, u = memory[line[2] : line[2] + size], memory[line[3] : line[3] + size], memory[line[4] : line[4] + size]
    weight_decay, momentum, direct, through = c[0], c[1], c[2], c[3]
    for i in range(len(p)):
        d = g[i] + weight_decay * p[i]
        velocity = momentum * u[i] + d
        u[i] = velocity
        p[i] -= direct * d + through * velocity
