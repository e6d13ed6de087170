"""Modules: parameters, and the layers that hold them."""

from minidet.nn.initialize import kaiming_normal_fan_out, kaiming_uniform_fan_in, normal
from minidet.nn.layers import BatchNorm2d, Conv2d, ConvNorm, FrozenBatchNorm2d, GroupNorm, Norm
from minidet.nn.module import Module

__all__ = [
    "BatchNorm2d",
    "Conv2d",
    "ConvNorm",
    "FrozenBatchNorm2d",
    "GroupNorm",
    "Module",
    "Norm",
    "kaiming_normal_fan_out",
    "kaiming_uniform_fan_in",
    "normal",
]
