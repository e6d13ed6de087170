"""Weights from elsewhere: foreign names and layouts, and starting from what somebody trained."""

from minidet.weights.detectron2 import from_detectron2
from minidet.weights.initial import Initialization, WeightsError, load_initial
from minidet.weights.torchvision import from_torchvision, to_torchvision

__all__ = [
    "Initialization",
    "WeightsError",
    "from_detectron2",
    "from_torchvision",
    "load_initial",
    "to_torchvision",
]
