"""What a case is, and where its numbers come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from gradients import away_from

from minidet.autograd import Tensor

Inputs = Callable[[np.random.Generator], Sequence[np.ndarray]]


@dataclass(frozen=True)
class Case:
    """`call` of Tensors made from `inputs(rng)` must equal `formula` of the arrays."""

    op: str
    label: str
    call: Callable[..., Tensor]
    formula: Callable[..., np.ndarray]
    inputs: Inputs

    def __str__(self) -> str:
        return f"{self.op}-{self.label}"


def like(x: Tensor, values: np.ndarray):
    """A constant in the library and type of `x`."""
    return x.xp.asarray(values, dtype=x.dtype)


def normal(*shapes: tuple[int, ...], scale: float = 1.0) -> Inputs:
    return lambda rng: [rng.normal(scale=scale, size=shape) for shape in shapes]


def positive(*shapes: tuple[int, ...]) -> Inputs:
    return lambda rng: [rng.uniform(0.5, 2, shape) for shape in shapes]


def not_zero(*shapes: tuple[int, ...]) -> Inputs:
    return lambda rng: [away_from(rng.normal(size=shape), 0) for shape in shapes]


def apart(*shapes: tuple[int, ...]) -> Inputs:
    """All numbers at least 0.1 from each other, from their halves and doubles, and from 0 and 0.7 and 2.

    So no step of a difference changes which of them is the largest.
    """

    def inputs(rng):
        count = sum(math.prod(shape) for shape in shapes)
        numbers = rng.permutation(np.concatenate([-0.3 * np.arange(1, count + 1), 2.3 + 0.3 * np.arange(count)]))
        ends = np.cumsum([math.prod(shape) for shape in shapes])
        return [part.reshape(shape) for part, shape in zip(np.split(numbers, ends), shapes, strict=False)]

    return inputs
