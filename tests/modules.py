"""Modules under a gradient check: drawn anew in float64, their parameters inputs like any other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gradients import STEP, assert_gradients_match
from untraced import untraced

from minidet import backend
from minidet.autograd import Tensor
from minidet.nn import Module


def randomized(module: Module, rng: np.random.Generator) -> Module:
    """Every parameter and buffer in float64, neither zero nor one; what may be a variance is positive."""
    for parameter in module.parameters():
        spread = parameter.data.std() or 0.5  # first weights keep their size, and so do the activations
        parameter.data = parameter.data + rng.normal(scale=spread, size=parameter.shape)
    for _, layer in module.named_modules():
        for name, array in vars(layer).items():
            if isinstance(array, np.ndarray):
                setattr(layer, name, rng.uniform(0.5, 2, array.shape))
    return module


def assert_module_gradients_match(module: Module, x: np.ndarray, *maps, xp, rng: np.random.Generator) -> None:
    """`assert_gradients_match` of x and every parameter."""
    parameters = module.to(xp).parameters()

    def f(x, *values):
        # The module computes with the checker's tensors: their gradients are then the parameters'.
        _replace(module, dict(zip(map(id, parameters), values, strict=True)))
        y = module(x, *maps)
        _replace(module, dict(zip(map(id, values), parameters, strict=True)))
        return y

    assert_gradients_match(f, x, *(backend.to_numpy(p.data) for p in parameters), xp=xp, rng=rng)


def _replace(module: Module, tensors: dict[int, Tensor]) -> None:
    for _, layer in module.named_modules():
        for name, value in list(vars(layer).items()):
            if id(value) in tensors:
                setattr(layer, name, tensors[id(value)])


def assert_slopes_match(
    loss: Callable[[], Tensor], parameters: list[Tensor], rng: np.random.Generator, *, directions: int = 4
) -> None:
    """Assert that d loss / d step is what backpropagation says, along random directions of all parameters at once.

    Too many parameters to move one by one.  A large network has a kink near every point: where two step
    sizes disagree one was crossed, and another direction is drawn, but at least half of them must count.
    """
    parameters = [p for p in parameters if p.requires_grad]
    for p in parameters:
        p.grad = None
    loss().backward()
    xp = parameters[0].xp
    start, gradients = [p.data for p in parameters], [backend.to_numpy(p.grad) for p in parameters]

    @untraced  # what it runs has run above, once
    def value(shift: float, along: list[np.ndarray]) -> float:
        for p, old, d in zip(parameters, start, along, strict=True):
            p.data = old + shift * xp.asarray(d)
        result = float(loss())
        for p, old in zip(parameters, start, strict=True):
            p.data = old
        return result

    size = np.sqrt(sum(np.sum(g**2) for g in gradients))  # of a typical slope: the directions have unit variance
    counted = 0
    for _ in range(2 * directions):
        along = [rng.normal(size=p.shape) for p in parameters]
        coarse, fine = ((value(h, along) - value(-h, along)) / (2 * h) for h in (STEP / 2, STEP / 8))
        if abs(coarse - fine) < 1e-7 * size:
            want = sum(float(np.sum(g * d)) for g, d in zip(gradients, along, strict=True))
            assert abs(want - fine) < 1e-6 * size, f"backpropagation says {want}, differences say {fine}"
            counted += 1
        if counted == directions:
            return
    raise AssertionError(f"only {counted} of {2 * directions} directions met no kink")
