"""Residual networks, the backbones of the paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from minidet.autograd import Tensor, checkpoint
from minidet.nn import ConvNorm, Module, Norm
from minidet.ops import max_pool2d

Map = tuple[int, int]


class Backbone(Protocol):
    """Anything a pyramid can stand on: a Module with these three."""

    channels: tuple[int, ...]
    """Channels of each map it returns, finest first."""

    def __call__(self, images: Tensor) -> list[Tensor]:
        """(N, H, W, 3) -> maps (N, H_l, W_l, C_l), each half the size of the one before, the first at stride 8."""

    def maps(self, height: int, width: int) -> list[Map]:
        """The (H_l, W_l) it returns for images of that size."""


@dataclass(frozen=True)
class ResNetConfig:
    """The shape of a residual network."""

    stem: int = 64
    """Filters of the first 7x7 convolution."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Width of each stage; one at stride 4, 8, 16, 32.  Three widths end at stride 16."""
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    """Residual blocks of each stage."""
    bottleneck: bool = True
    """1x1, 3x3, 1x1 with four times the width coming out; else two 3x3."""
    groups: int = 1
    """Groups of the 3x3: 32 in ResNeXt."""
    group_width: int = 64
    """Channels of a group where the width is 64: 8 in ResNeXt-101-32x8d."""
    stride_in_1x1: bool = False
    """Where a bottleneck halves the map: in its first 1x1 (the paper's authors) or its 3x3 (torchvision)."""
    norm: Norm = Norm("frozen")
    frozen_stages: int = 0
    """Untrained parts from the input on: 1 is the stem, 2 the stem and the first stage, and so on.  Nothing in
    them moves, the running statistics of a "batch" norm included."""

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.blocks) or not 2 <= len(self.widths) <= 4:
            raise ValueError(
                f"ResNetConfig: needs 2 to 4 stages, as many widths as blocks, got {self.widths} and {self.blocks}"
            )
        if min(self.stem, *self.widths, *self.blocks, self.groups, self.group_width) < 1:
            raise ValueError(f"ResNetConfig: all numbers but frozen_stages must be at least 1, got {self}")
        parts = 1 + len(self.widths)
        if not 0 <= self.frozen_stages <= parts:
            raise ValueError(
                f"ResNetConfig.frozen_stages counts the stem and {parts - 1} stages: 0 to {parts}, got "
                f"{self.frozen_stages}"
            )


RESNET18 = ResNetConfig(blocks=(2, 2, 2, 2), bottleneck=False)
RESNET34 = ResNetConfig(blocks=(3, 4, 6, 3), bottleneck=False)
RESNET50 = ResNetConfig()
RESNET101 = ResNetConfig(blocks=(3, 4, 23, 3))
RESNEXT101_32X8D = ResNetConfig(blocks=(3, 4, 23, 3), groups=32, group_width=8)
RESNEXT101_64X4D = ResNetConfig(blocks=(3, 4, 23, 3), groups=64, group_width=4)


class BasicBlock(Module):
    """relu(shortcut(x) + conv3x3(conv3x3(x))).

    Shapes:
        x: (N, H, W, C)
        returns: (N, P, Q, F), the stride divides the map
    Source: Deep Residual Learning, arXiv:1512.03385, section 4.1 and figure 5 left.
    """

    def __init__(self, channels: int, filters: int, stride: int, config: ResNetConfig, rng: np.random.Generator):
        norm = config.norm
        self.conv1 = ConvNorm(channels, filters, 3, norm, stride=stride, rng=rng)
        self.conv2 = ConvNorm(filters, filters, 3, norm, rng=rng)
        self.shortcut = _shortcut(channels, filters, stride, norm, rng)

    def __call__(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, P, Q, F)."""
        return self.conv2(self.conv1(x), shortcut=x if self.shortcut is None else self.shortcut(x))


class Bottleneck(Module):
    """relu(shortcut(x) + conv1x1(conv3x3(conv1x1(x)))), narrow inside.

    Shapes:
        x: (N, H, W, C)
        returns: (N, P, Q, F), the stride divides the map
    Source: Deep Residual Learning, arXiv:1512.03385, figure 5 right; with groups, ResNeXt, arXiv:1611.05431.
    """

    def __init__(self, channels: int, width: int, stride: int, config: ResNetConfig, rng: np.random.Generator):
        norm, filters = config.norm, 4 * width
        inner = width * config.group_width // 64 * config.groups
        first, second = (stride, 1) if config.stride_in_1x1 else (1, stride)
        self.conv1 = ConvNorm(channels, inner, 1, norm, stride=first, rng=rng)
        self.conv2 = ConvNorm(inner, inner, 3, norm, stride=second, groups=config.groups, rng=rng)
        self.conv3 = ConvNorm(inner, filters, 1, norm, rng=rng)
        self.shortcut = _shortcut(channels, filters, stride, norm, rng)

    def __call__(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, P, Q, 4 * width)."""
        return self.conv3(self.conv2(self.conv1(x)), shortcut=x if self.shortcut is None else self.shortcut(x))


def _shortcut(channels: int, filters: int, stride: int, norm: Norm, rng: np.random.Generator) -> ConvNorm | None:
    """A 1x1 convolution where the shape changes (option B of section 3.3), else nothing."""
    if channels == filters and stride == 1:
        return None
    return ConvNorm(channels, filters, 1, norm, relu=False, stride=stride, rng=rng)


class ResNet(Module):
    """The maps C3, C4 and (with four stages) C5 of a residual network.

    Shapes:
        images: (N, H, W, 3)
        returns: list of (N, H_l, W_l, C_l) at strides 8, 16, 32
    Source: Deep Residual Learning, arXiv:1512.03385, table 1.
    """

    def __init__(self, config: ResNetConfig, *, rng: np.random.Generator):
        self.stem = ConvNorm(3, config.stem, 7, config.norm, stride=2, rng=rng)
        block, expansion = (Bottleneck, 4) if config.bottleneck else (BasicBlock, 1)
        channels, stages = config.stem, []
        for i, (width, count) in enumerate(zip(config.widths, config.blocks, strict=True)):
            blocks = []
            for j in range(count):
                blocks.append(block(channels, width, 2 if i > 0 and j == 0 else 1, config, rng))
                channels = width * expansion
            stages.append(_Stage(blocks))
        self.stages = stages
        self.channels = tuple(width * expansion for width in config.widths[1:])
        for part in [self.stem, *stages][: config.frozen_stages]:
            part.freeze()

    def __call__(self, images: Tensor) -> list[Tensor]:
        """(N, H, W, 3) -> the maps at strides 8, 16 and so on."""
        x = max_pool2d(self.stem(images), 3, stride=2, padding=1)
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        return levels[1:]  # C2 is not used (RetinaNet, section 4, footnote 2)

    def maps(self, height: int, width: int) -> list[Map]:
        """The sizes of C3, C4 and C5: every halving rounds up."""
        maps = [(height, width)]
        for _ in range(len(self.stages) + 1):
            maps.append(halved(*maps[-1]))
        return maps[3:]


class _Stage(Module):
    def __init__(self, blocks: list[Module]):
        self.blocks, self.recompute = blocks, False

    def __call__(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x) if self.recompute and _learns(x, block) else block(x)
        return x


def _learns(x: Tensor, block: Module) -> bool:
    """Whether a backward pass goes through the block at all."""
    return x.requires_grad or any(p.requires_grad for p in block.parameters())


def halved(height: int, width: int) -> Map:
    """What a 3x3 (or 7x7, or pooling) window with stride 2 and "same" padding leaves of a map."""
    return (height + 1) // 2, (width + 1) // 2
