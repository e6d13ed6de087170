"""Weights from elsewhere: foreign files, names and layouts, and starting from what somebody trained."""

from minidet.weights.coco_names import BY_NUMBER, CATEGORY_IDS
from minidet.weights.detectron2 import from_detectron2
from minidet.weights.files import read_arrays
from minidet.weights.initial import Initialization, load_initial
from minidet.weights.recognition import Found, config_for, find_weights
from minidet.weights.tensors import WeightsError
from minidet.weights.torchvision import from_torchvision, to_torchvision

__all__ = [
    "BY_NUMBER",
    "CATEGORY_IDS",
    "Found",
    "Initialization",
    "WeightsError",
    "config_for",
    "find_weights",
    "from_detectron2",
    "from_torchvision",
    "load_initial",
    "read_arrays",
    "to_torchvision",
]
