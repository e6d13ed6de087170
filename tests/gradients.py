"""Checking a gradient against differences, in every direction of every input at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from untraced import untraced

from minidet import backend
from minidet.autograd import Tensor

STEP = float(np.finfo(np.float64).eps ** (1 / 3))
"""Balances the error of a central difference, STEP^2, against rounding, eps / STEP."""


def assert_gradients_match(
    f: Callable[..., Tensor],
    *arrays: np.ndarray,
    xp,
    rng: np.random.Generator,
    rtol: float = 1e-6,
    atol: float = 1e-8,
) -> None:
    """Assert that d<v, f(x)>/dx is the same by backpropagation and by differences.

    `v` is random.  With v = 1, i.e. checking f(x).sum(), every op whose output sums to a constant (softmax,
    batch norm) passes with a gradient of zero.

    `f` takes and returns Tensors; `arrays` are float64 NumPy inputs, at least 10 * STEP away from any kink.
    """
    for array in arrays:
        assert array.dtype == np.float64, "differences need float64"
    tensors = [Tensor(xp.asarray(array), requires_grad=True) for array in arrays]
    y = f(*tensors)
    v = rng.normal(size=y.shape)
    y.backward(xp.asarray(v))

    @untraced  # what it runs has run above, once
    def value(*inputs: np.ndarray) -> float:
        outputs = f(*(Tensor(xp.asarray(array)) for array in inputs))
        return float(np.sum(v * backend.to_numpy(outputs.data)))

    for n, (array, tensor) in enumerate(zip(arrays, tensors, strict=True)):
        assert tensor.grad is not None, f"input {n} received no gradient"
        numeric = np.empty_like(array)
        for index in np.ndindex(array.shape):
            up, down = array.copy(), array.copy()
            up[index] += STEP
            down[index] -= STEP
            rise = value(*arrays[:n], up, *arrays[n + 1 :]) - value(*arrays[:n], down, *arrays[n + 1 :])
            numeric[index] = rise / (2 * STEP)
        np.testing.assert_allclose(
            backend.to_numpy(tensor.grad),
            numeric,
            rtol=rtol,
            atol=atol,
            err_msg=f"gradient of input {n}, shape {array.shape}",
        )


def away_from(values: np.ndarray, kink: float, gap: float = 0.05) -> np.ndarray:
    """Push numbers out of the band |value - kink| < gap, each to its own side."""
    side = np.where(values >= kink, 1.0, -1.0)
    return np.where(np.abs(values - kink) < gap, kink + side * gap, values)
