"""Training: the loop, its recipe, and checkpoints that continue it exactly."""

from minidet.training.blame import NonFiniteError
from minidet.training.checkpoint import Checkpoint, CheckpointError, read_checkpoint, write_checkpoint
from minidet.training.config import FINE_TUNE, SHAPES, TrainConfig
from minidet.training.loop import Training, train

__all__ = [
    "FINE_TUNE",
    "SHAPES",
    "Checkpoint",
    "CheckpointError",
    "NonFiniteError",
    "TrainConfig",
    "Training",
    "read_checkpoint",
    "train",
    "write_checkpoint",
]
