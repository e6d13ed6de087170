"""A checkpoint back to a model."""

from __future__ import annotations

from pathlib import Path

from minidet import backend
from minidet.models import Backbone, RetinaNet, RetinaNetConfig
from minidet.training.checkpoint import CheckpointError, find_checkpoint, read_checkpoint
from minidet.training.settings import from_json


def load_model(
    path: str | Path, *, backbone: Backbone | None = None, xp=None, precision: str = "float32"
) -> RetinaNet:
    """The model of a checkpoint, or of a run's folder: its best checkpoint, else the last one.

    Anchors, classes and preprocessing come from the file too: nothing about the model is asked twice.  Only a
    `backbone` of one's own, which is code and in no file, has to be made again and passed in.
    `precision` is what to compute in, whatever it was trained in.

    Raises:
        CheckpointError: if there is none, or it cannot be used; the message names the file.
    """
    xp = backend.default() if xp is None else xp
    path = find_checkpoint(path)
    checkpoint = read_checkpoint(path)
    try:
        model = RetinaNet(from_json(RetinaNetConfig, checkpoint.model), backbone=backbone, xp=xp)
        model.load_state_dict(checkpoint.weights)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    model.compute(precision=precision)
    return model
