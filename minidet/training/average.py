"""The mean of the weights of the last steps: often better than the last one, which a last batch has pushed about."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from minidet import backend
from minidet.backend import Array
from minidet.nn import Module


class WeightAverage:
    """An exponential moving average of a model's parameters and running statistics, or of nothing.

    After B more images  mean += fresh * (weights - mean),  fresh = max(1 - exp(-B / images), B / seen):
    the plain mean of all steps until `images` have been seen, and from then on one that forgets.  `fresh`
    depends on nothing but the position, so that a resumed training has the same mean.

    Source: Polyak & Juditsky, SIAM J. Control Optim. 30 (1992); exponential as in Tarvainen & Valpola,
        arXiv:1703.01780, section 2.
    """

    def __init__(self, model: Module, images: int | None):
        self.images = images
        self.mean = {} if images is None else {name: array + 0 for name, array in _arrays(model).items()}

    def update(self, model: Module, position: int, batch: int) -> None:
        """Take in the weights after `batch` more images; `position` were seen before."""
        if self.images is None:
            return
        fresh = max(-math.expm1(-batch / self.images), batch / (position + batch))
        for name, array in _arrays(model).items():
            self.mean[name] += fresh * (array - self.mean[name])

    def weights(self, model: Module) -> dict[str, np.ndarray]:
        """What to detect with: the mean, or without one the model's own weights."""
        if self.images is None:
            return model.state_dict()
        return {name: np.array(backend.to_numpy(array)) for name, array in self.mean.items()}

    def load(self, weights: dict[str, np.ndarray]) -> None:
        """Continue from a mean that `weights` gave."""
        for name, array in self.mean.items():
            array[...] = backend.namespace(array).asarray(weights[name], dtype=array.dtype)

    @contextmanager
    def in_place(self, model: Module) -> Iterator[None]:
        """Inside, the model has the mean's weights."""
        if self.images is None:
            yield
            return
        own = model.state_dict()
        model.load_state_dict(self.weights(model))
        try:
            yield
        finally:
            model.load_state_dict(own)


def _arrays(model: Module) -> dict[str, Array]:
    return {name: parameter.data for name, parameter in model.named_parameters()} | dict(model.named_buffers())
