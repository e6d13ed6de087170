"""Layers: the ops of `minidet.ops` together with the parameters they need."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minidet.autograd import Tensor, recording
from minidet.kernels import norm_to_affine
from minidet.kernels.precision import sums_in
from minidet.nn.initialize import Initializer, kaiming_normal_fan_out
from minidet.nn.module import Module
from minidet.ops import add_relu, astype, batch_norm, batch_norm_training, conv2d, conv2d_levels, group_norm
from minidet.ops import relu as rectify

Maps = tuple[tuple[int, int], ...]


class Conv2d(Module):
    """A bank of filters (F, k, k, C / groups), with a bias unless `bias` is None.

    Differs: `padding` defaults to k // 2, which keeps the size at stride 1; PyTorch's default is 0.
    """

    def __init__(
        self,
        channels: int,
        filters: int,
        size: int,
        *,
        rng: np.random.Generator,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        bias: float | None = 0.0,
        initialize: Initializer = kaiming_normal_fan_out,
    ):
        if channels % groups or filters % groups:
            raise ValueError(f"Conv2d: {groups} groups do not divide {channels} channels and {filters} filters")
        self.stride, self.dilation, self.groups = stride, dilation, groups
        self.padding = size // 2 if padding is None else padding
        weight = initialize(rng, (filters, size, size, channels // groups))
        self.weight = Tensor(weight, requires_grad=True)
        self.bias = None if bias is None else Tensor(np.full(filters, bias, np.float32), requires_grad=True)

    def __call__(self, x: Tensor, maps: Maps | None = None) -> Tensor:
        """(N, H, W, C) -> (N, P, Q, F); or, level by level, (N, S, C) with its `maps` -> (N, S, F)."""
        return self.fused(x, maps, self.bias)

    def fused(self, x: Tensor, maps: Maps | None, bias: Tensor | None, **end) -> Tensor:
        """With a bias that may not be the layer's own, and `scale`, `shortcut` and `relu` as `conv2d` has them."""
        if maps is not None:
            same = self.weight.shape[1] // 2
            if (self.stride, self.padding, self.dilation, self.groups) != (1, same, 1, 1):
                raise ValueError(
                    "Conv2d: on a pyramid it keeps every level's size, with one group, but has "
                    f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, groups={self.groups}"
                )
            return conv2d_levels(x, maps, self.weight, bias, **end)
        shape = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}
        return conv2d(x, self.weight, bias, **shape, **end)


class BatchNorm2d(Module):
    """Normalize channels over images and positions; running statistics when not training.

    A frozen one never trains: neither its parameters nor its statistics move.  And statistics move only while
    the tape records, so that `checkpoint`, which runs everything twice, moves them once.

    Source: Ioffe and Szegedy, arXiv:1502.03167.
    Differs: there is no count of batches, which PyTorch keeps and RetinaNet never reads; in PyTorch freezing
        stops the parameters only, and statistics move under no_grad too.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5, momentum: float = 0.1):
        self.eps, self.momentum = eps, momentum
        self.training, self.frozen = True, False
        self.weight = Tensor(np.ones(channels, np.float32), requires_grad=True)
        self.bias = Tensor(np.zeros(channels, np.float32), requires_grad=True)
        self.running_mean = np.zeros(channels, np.float32)
        self.running_var = np.ones(channels, np.float32)

    def __call__(
        self, x: Tensor, maps: Maps | None = None, *, shortcut: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        """(N, ..., C) -> the same, plus the shortcut, rectified if `relu`; in training the running statistics move, by
        `momentum`, towards the batch's.

        On a pyramid (N, S, C) all levels share the statistics.
        """
        if self.frozen or not self.training:
            wide = astype(x, sums_in(x.data))
            y = batch_norm(wide, self.weight, self.bias, self.running_mean, self.running_var, eps=self.eps)
            y = astype(y, x.dtype)
            if shortcut is not None:
                return add_relu(y, shortcut) if relu else y + shortcut
            return rectify(y) if relu else y
        y, mean, variance = batch_norm_training(x, self.weight, self.bias, eps=self.eps, shortcut=shortcut, relu=relu)
        if not recording():
            return y
        for name, new in (("running_mean", mean), ("running_var", variance)):
            old = getattr(self, name)
            setattr(self, name, old + self.momentum * (x.xp.astype(new, old.dtype) - old))
        return y


class FrozenBatchNorm2d(Module):
    """A batch norm whose statistics, weight and bias are constants: an affine map per channel.

    Any `eps`, 0 included, which is what torchvision's published RetinaNet weights need.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5):
        self.eps = eps
        self.weight = np.ones(channels, np.float32)
        self.bias = np.zeros(channels, np.float32)
        self.running_mean = np.zeros(channels, np.float32)
        self.running_var = np.ones(channels, np.float32)

    def affine(self, dtype):
        """(scale, offset), both (C,), with norm(x) = scale * x + offset, computed in `dtype`."""
        arrays = (self.weight, self.bias, self.running_mean, self.running_var)
        xp = Tensor(self.weight).xp
        affine = norm_to_affine(*(xp.astype(a, dtype, copy=False) for a in arrays), self.eps)
        return affine[0, :], affine[1, :]

    def __call__(self, x: Tensor, maps: Maps | None = None) -> Tensor:
        """(N, ..., C) -> the same."""
        wide = sums_in(x.data)
        scale, offset = self.affine(wide)
        return astype(astype(x, wide) * scale + offset, x.dtype)


class GroupNorm(Module):
    """Normalize each image, and each pyramid level, over positions and the channels of a group.

    Source: Wu and He, arXiv:1803.08494.
    """

    def __init__(self, groups: int, channels: int, *, eps: float = 1e-5):
        if channels % groups:
            raise ValueError(f"GroupNorm: {groups} groups do not divide {channels} channels")
        self.groups, self.eps = groups, eps
        self.weight = Tensor(np.ones(channels, np.float32), requires_grad=True)
        self.bias = Tensor(np.zeros(channels, np.float32), requires_grad=True)

    def __call__(self, x: Tensor, maps: Maps | None = None, **end) -> Tensor:
        """(N, H, W, C), or (N, S, C) with its `maps` -> the same; `shortcut` and `relu` as `group_norm` has them."""
        return group_norm(x, self.weight, self.bias, groups=self.groups, eps=self.eps, maps=maps, **end)


@dataclass(frozen=True)
class Norm:
    """Which normalization follows a convolution."""

    name: str = "frozen"
    """"none", "frozen" (constant batch norm), "batch" or "group"."""
    groups: int = 32
    """Groups of "group"."""
    eps: float = 1e-5
    """Added to the variance."""
    momentum: float = 0.1
    """How fast the running statistics of "batch" move."""

    def __post_init__(self) -> None:
        if self.name not in ("none", "frozen", "batch", "group"):
            raise ValueError(f'Norm.name is {self.name!r}: choose "none", "frozen", "batch" or "group"')
        if self.groups < 1 or self.eps < 0 or not 0 <= self.momentum <= 1:
            raise ValueError(
                f"Norm: needs groups >= 1, eps >= 0 and 0 <= momentum <= 1, got {self.groups}, {self.eps} and "
                f"{self.momentum}"
            )

    def layer(self, channels: int) -> BatchNorm2d | FrozenBatchNorm2d | GroupNorm | None:
        """A new layer for so many channels, or None."""
        if self.name == "frozen":
            return FrozenBatchNorm2d(channels, eps=self.eps)
        if self.name == "batch":
            return BatchNorm2d(channels, eps=self.eps, momentum=self.momentum)
        if self.name == "group":
            return GroupNorm(self.groups, channels, eps=self.eps)
        return None


class ConvNorm(Module):
    """Convolution, normalization, rectifier: y = relu(norm(conv(x))), or y = relu(norm(conv(x)) + shortcut).

    The only place that fuses: with a frozen norm, or none, all of it is one `conv2d`; other norms take in the
    shortcut and the rectifier.  The convolution has a bias only if no norm follows, which would undo it.
    """

    def __init__(self, channels: int, filters: int, size: int, norm: Norm, *, relu: bool = True, **conv):
        self.norm = norm.layer(filters)
        self.conv = Conv2d(channels, filters, size, bias=0.0 if self.norm is None else None, **conv)
        self.relu = relu

    def __call__(self, x: Tensor, maps: Maps | None = None, *, shortcut: Tensor | None = None) -> Tensor:
        """(N, H, W, C) -> (N, P, Q, F); or, level by level, (N, S, C) with its `maps` -> (N, S, F)."""
        if self.norm is None:
            return self.conv.fused(x, maps, self.conv.bias, shortcut=shortcut, relu=self.relu)
        if isinstance(self.norm, FrozenBatchNorm2d):
            scale, offset = self.norm.affine(sums_in(x.data))
            return self.conv.fused(x, maps, Tensor(offset), scale=scale, shortcut=shortcut, relu=self.relu)
        return self.norm(self.conv(x, maps), maps, shortcut=shortcut, relu=self.relu)
