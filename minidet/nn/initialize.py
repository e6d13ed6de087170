"""How the papers draw first weights: functions of a generator and a shape (F, k, k, C)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Initializer = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def normal(std: float) -> Initializer:
    """Gaussian with mean 0.

    Source: RetinaNet, arXiv:1708.02002, section 4.1 "Initialization" (sigma = 0.01 in the subnets).
    """
    return lambda rng, shape: rng.normal(0, std, shape).astype(np.float32)


def kaiming_normal_fan_out(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Gaussian with variance 2 / (F * k * k), which keeps the size of gradients through ReLUs.

    Source: He et al., arXiv:1502.01852, eq. (14); what torchvision's ResNet uses.
    """
    fan_out = shape[0] * math.prod(shape[1:3])
    return normal(math.sqrt(2 / fan_out))(rng, shape)


def kaiming_uniform_fan_in(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform with variance 1 / (k * k * C), which keeps the size of activations without a ReLU.

    Source: He et al., arXiv:1502.01852, eq. (10) with slope a = 1; what torchvision's FPN uses.
    """
    bound = math.sqrt(3 / math.prod(shape[1:]))
    return rng.uniform(-bound, bound, shape).astype(np.float32)
