"""Training: the loop, its recipe, and checkpoints that continue it exactly."""

from minidet.training.blame import NonFiniteError
from minidet.training.checkpoint import Checkpoint, CheckpointError, read_checkpoint, write_checkpoint
from minidet.training.config import FINE_TUNE, SCRATCH, SHAPES, TrainConfig
from minidet.training.convert import convert, export
from minidet.training.load import load_model
from minidet.training.loop import Training, train
from minidet.training.recipes import RECIPES, Recipe

__all__ = [
    "FINE_TUNE",
    "RECIPES",
    "SCRATCH",
    "SHAPES",
    "Checkpoint",
    "CheckpointError",
    "NonFiniteError",
    "Recipe",
    "TrainConfig",
    "Training",
    "convert",
    "export",
    "load_model",
    "read_checkpoint",
    "train",
    "write_checkpoint",
]
