"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from minidet.backend import Array


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

    def update(
        self, p: Array, g: Array, state: tuple[Array, ...], *, step: int, lr: float, weight_decay: float
    ) -> None:
        """One step; see the class for the formula."""
        (velocity,) = state
        change = p * weight_decay
        change += g
        velocity *= self.momentum
        velocity += change
        if self.nesterov:
            change += self.momentum * velocity
            change *= lr
        else:
            change = velocity * lr
        p -= change
