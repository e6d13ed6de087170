"""The two subnets that look at every level of the pyramid."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from minidet.autograd import Tensor, checkpoint
from minidet.nn import Conv2d, ConvNorm, Module, Norm, kaiming_normal_fan_out, normal
from minidet.ops import reshape

WEIGHT_STD = 0.01  # section 4.1, "Initialization"


@dataclass(frozen=True)
class HeadConfig:
    """The shape of both subnets."""

    depth: int = 4
    """3x3 convolutions before the last one."""
    norm: Norm = Norm("none")
    """What follows each of them."""
    prior: float = 0.01
    """pi: the probability of an object that every anchor starts with."""
    he_towers: bool = False
    """First weights of the towers: He et al.'s, which suit a norm and training from scratch; else N(0, 0.01)."""

    def __post_init__(self) -> None:
        if not 0 < self.prior < 1:
            raise ValueError(f"HeadConfig.prior is a probability between 0 and 1, got {self.prior}")
        if self.depth < 0:
            raise ValueError(f"HeadConfig.depth must not be negative, got {self.depth}")


class Subnet(Module):
    """Some 3x3 conv + ReLU, then one 3x3 conv, run on every pyramid level with the same weights.

    Shapes:
        x: (N, S, C), all levels one after the other, S = sum of H_l * W_l
        returns: (N, R, outputs) with R = S * A, the order of the anchors: level, row, column, anchor in the cell
    Source: RetinaNet, arXiv:1708.02002, section 4, "Classification Subnet" and "Box Regression Subnet".
    """

    def __init__(
        self, channels: int, anchors: int, outputs: int, config: HeadConfig, *, rng, final_bias: float = 0.0
    ):
        self.outputs, self.recompute = outputs, False
        tower = kaiming_normal_fan_out if config.he_towers else normal(WEIGHT_STD)
        self.tower = [
            ConvNorm(channels, channels, 3, config.norm, initialize=tower, rng=rng) for _ in range(config.depth)
        ]
        final = normal(WEIGHT_STD)
        self.final = Conv2d(channels, anchors * outputs, 3, initialize=final, bias=final_bias, rng=rng)

    def __call__(self, x: Tensor, maps: tuple[tuple[int, int], ...]) -> Tensor:
        """(N, S, C) and the (H, W) of every level -> (N, R, outputs)."""

        def tower(x: Tensor) -> Tensor:
            for layer in self.tower:
                x = layer(x, maps)
            return x

        x = checkpoint(tower, x) if self.recompute else tower(x)
        x = self.final(x, maps)                                 # (N, S, A * outputs)
        return reshape(x, (x.shape[0], -1, self.outputs))       # (N, S * A, outputs)


class RetinaNetHead(Module):
    """One class logit per anchor and class, and four box deltas per anchor.

    The subnets share their shape but no parameters; each is shared by all levels.

    Shapes:
        x: (N, S, C)
        returns: logits (N, R, K), deltas (N, R, 4)
    Source: RetinaNet, arXiv:1708.02002, figure 3.
    """

    def __init__(self, channels: int, anchors: int, classes: int, config: HeadConfig, *, rng: np.random.Generator):
        # Start with every anchor saying "object" with probability `prior`, so the ~100k background anchors
        # do not swamp the first steps (section 3.3; section 4.1: pi = .01).
        bias = -math.log((1 - config.prior) / config.prior)
        self.class_subnet = Subnet(channels, anchors, classes, config, rng=rng, final_bias=bias)
        self.box_subnet = Subnet(channels, anchors, 4, config, rng=rng)

    def __call__(self, x: Tensor, maps: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor]:
        """(N, S, C) and the (H, W) of every level -> logits (N, R, K), deltas (N, R, 4)."""
        return self.class_subnet(x, maps), self.box_subnet(x, maps)
