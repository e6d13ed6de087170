"""Anchors, targets, losses and detections: everything between the network's outputs and boxes."""

from minidet.detection.anchors import AnchorConfig, anchors_for, octaves
from minidet.detection.assignment import BACKGROUND, IGNORE, MatcherConfig, assign
from minidet.detection.coder import CoderConfig, decode_boxes, decode_deltas, encode_boxes
from minidet.detection.criterion import LossConfig, Losses, Targets, build_targets, image_weights, loss
from minidet.detection.mining import MiningConfig
from minidet.detection.postprocess import Detections, PostprocessConfig, postprocess

__all__ = [
    "BACKGROUND",
    "IGNORE",
    "AnchorConfig",
    "CoderConfig",
    "Detections",
    "LossConfig",
    "Losses",
    "MatcherConfig",
    "MiningConfig",
    "PostprocessConfig",
    "Targets",
    "anchors_for",
    "assign",
    "build_targets",
    "decode_boxes",
    "decode_deltas",
    "encode_boxes",
    "image_weights",
    "loss",
    "octaves",
    "postprocess",
]
