"""The feature pyramid: fine maps that know what the coarse ones saw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minidet.autograd import Tensor
from minidet.models.resnet import Map, halved
from minidet.nn import Conv2d, Module, kaiming_uniform_fan_in
from minidet.ops import relu, upsample_nearest


@dataclass(frozen=True)
class PyramidConfig:
    """The shape of a feature pyramid."""

    channels: int = 256
    """Channels of every level."""
    levels: int = 5
    """How many levels, P3 the first; those the backbone has no map for are made by convolutions of stride 2."""
    extra_from_backbone: bool = True
    """What the first extra level (P6) is made from: the backbone's last map (C5: the paper, detectron2,
    torchvision v2) or the pyramid's (P5: torchvision v1)."""

    def __post_init__(self) -> None:
        if self.channels < 1 or self.levels < 1:
            raise ValueError(
                f"PyramidConfig: channels and levels must be at least 1, got {self.channels} and {self.levels}"
            )


class FeaturePyramid(Module):
    """1x1 laterals, nearest upsampling and addition from the top down, 3x3 outputs, and coarser extra levels.

    Shapes:
        maps: list of (N, H_l, W_l, C_l), each half the size of the one before
        returns: list of `levels` tensors (N, H_l, W_l, channels)
    Source: Feature Pyramid Networks, arXiv:1612.03144, section 3; P6 and P7: RetinaNet, arXiv:1708.02002,
        section 4, footnote 2.
    """

    def __init__(self, backbone_channels: tuple[int, ...], config: PyramidConfig, *, rng: np.random.Generator):
        extras = config.levels - len(backbone_channels)
        if extras < 0:
            raise ValueError(f"PyramidConfig.levels is {config.levels}, the backbone has {len(backbone_channels)} maps")
        channels, self.extra_from_backbone = config.channels, config.extra_from_backbone
        conv = {"rng": rng, "initialize": kaiming_uniform_fan_in}
        self.lateral = [Conv2d(c, channels, 1, **conv) for c in backbone_channels]
        self.output = [Conv2d(channels, channels, 3, **conv) for _ in backbone_channels]
        first = backbone_channels[-1] if config.extra_from_backbone else channels
        self.extra = [Conv2d(channels if i else first, channels, 3, stride=2, **conv) for i in range(extras)]

    def __call__(self, maps: list[Tensor]) -> list[Tensor]:
        """The backbone's maps -> all levels, finest first."""
        inner: list[Tensor] = []
        for lateral, x in reversed(list(zip(self.lateral, maps, strict=True))):
            above = upsample_nearest(inner[0], x.shape[1:3]) if inner else None
            inner.insert(0, lateral.fused(x, None, lateral.bias, shortcut=above))
        levels = [output(x) for output, x in zip(self.output, inner, strict=True)]
        x = maps[-1] if self.extra_from_backbone else levels[-1]
        for i, extra in enumerate(self.extra):
            x = extra(relu(x) if i else x)  # P7 rectifies P6; P6 itself goes to the heads as it is
            levels.append(x)
        return levels

    def maps(self, backbone_maps: list[Map]) -> list[Map]:
        """The sizes of all levels."""
        maps = list(backbone_maps)
        for _ in self.extra:
            maps.append(halved(*maps[-1]))
        return maps
