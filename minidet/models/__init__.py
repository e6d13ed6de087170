"""RetinaNet and its parts."""

from minidet.models import presets
from minidet.models.fpn import FeaturePyramid, PyramidConfig
from minidet.models.heads import HeadConfig, RetinaNetHead, Subnet
from minidet.models.resnet import (
    RESNET18,
    RESNET34,
    RESNET50,
    RESNET101,
    RESNEXT101_32X8D,
    RESNEXT101_64X4D,
    Backbone,
    ResNet,
    ResNetConfig,
)
from minidet.models.retinanet import RetinaNet, RetinaNetConfig

__all__ = [
    "RESNET18",
    "RESNET34",
    "RESNET50",
    "RESNET101",
    "RESNEXT101_32X8D",
    "RESNEXT101_64X4D",
    "Backbone",
    "FeaturePyramid",
    "HeadConfig",
    "PyramidConfig",
    "ResNet",
    "ResNetConfig",
    "RetinaNet",
    "RetinaNetConfig",
    "RetinaNetHead",
    "Subnet",
    "presets",
]
