"""Everything the next step of a training depends on, named in one place.

    weights, running statistics       model.state_dict()
    their mean over the last steps    WeightAverage.mean              (training/average.py)
    velocities, moments, step counts  optimizer.state_dict()
    learning rate                     a function of the position      (optim/schedule.py)
    order, augmentation               functions of seed, position and the number of images  (data/loader.py)
    positives' moving average         TrainingState.moving            (detection/criterion.py)

Because randomness is a function of the position, no generator has to be saved, and a resumed training is
bitwise the one that was never stopped, given as many threads and processes: sums are split among them.
"""

from __future__ import annotations

from dataclasses import dataclass

from minidet.data.sample import Dataset
from minidet.detection.criterion import MOVING_START
from minidet.models import RetinaNet, RetinaNetConfig
from minidet.optim import Optimizer
from minidet.training.average import WeightAverage
from minidet.training.checkpoint import Checkpoint, CheckpointError
from minidet.training.config import FREE, TrainConfig
from minidet.training.settings import differences, from_json, to_json

OWN = "own."  # what weights that are stepped are called in a checkpoint, where the mean ones take their place


@dataclass(frozen=True)
class TrainingState:
    """Where a training stands, between two steps."""

    position: int = 0
    """Images seen."""
    steps: int = 0
    moving: float = MOVING_START
    """Moving average of the positive anchors of a batch; only the "moving" normaliser reads it."""
    best_ap: float = -1.0
    """Highest validation AP so far; below 0 before the first."""
    best_position: int = 0
    validated: int = 0
    """Images seen when validation AP was last measured: a training stopped before a measurement owes it."""
    seconds: float = 0.0
    """Wall time of all steps so far."""


def capture(
    model: RetinaNet,
    optimizer: Optimizer,
    config: TrainConfig,
    state: TrainingState,
    dataset: Dataset,
    average: WeightAverage,
) -> Checkpoint:
    """All of it, as a checkpoint whose weights are those to detect with: the mean ones, where there is a mean."""
    own = {} if config.ema is None else {OWN + name: array for name, array in model.state_dict().items()}
    return Checkpoint(
        model=to_json(model.config),
        classes=tuple(dataset.classes),
        category_ids=tuple(dataset.category_ids),
        weights=average.weights(model),
        optimizer=optimizer.state_dict() | own,
        training={"config": to_json(config), "state": to_json(state), "dataset_length": len(dataset)},
    )


def restore(
    checkpoint: Checkpoint,
    model: RetinaNet,
    optimizer: Optimizer,
    config: TrainConfig,
    dataset: Dataset,
    average: WeightAverage,
) -> TrainingState:
    """Put model, optimizer and mean where the checkpoint was taken, and say where that is.

    Raises:
        CheckpointError: if the checkpoint is of another model, data set or recipe: it would then not be the
            same training that continues.
    """
    if not checkpoint.training:
        raise CheckpointError("this checkpoint holds weights only: start from it with --init, not --resume")
    if lacking := {"config", "state"} - checkpoint.training.keys():
        raise CheckpointError(
            f"damaged: its header lacks training.{' and training.'.join(sorted(lacking))}, without which it cannot "
            "be continued; continue from another checkpoint of the run, or start from its weights with --init"
        )
    if (checkpoint.classes, checkpoint.category_ids) != (tuple(dataset.classes), tuple(dataset.category_ids)):
        raise CheckpointError(
            f"the checkpoint was trained on the classes {_listed(checkpoint.classes, checkpoint.category_ids)}, "
            f"but the data has {_listed(dataset.classes, dataset.category_ids)}"
        )
    length = checkpoint.training.get("dataset_length")  # unknown of trainings begun before it was recorded
    if length is not None and length != len(dataset):
        raise CheckpointError(
            f"the checkpoint was trained on {length:,} images, but the data has {len(dataset):,}: their order, "
            "and so what comes next, would be another.  To train on from these weights use --init"
        )
    # Read and written again: a setting that is younger than the checkpoint had its default.
    saved_model = to_json(from_json(RetinaNetConfig, checkpoint.model, "model"))
    saved = to_json(from_json(TrainConfig, checkpoint.training["config"], "training"))
    changed = [f"model.{line}" for line in differences(saved_model, to_json(model.config))]
    changed += [
        line
        for line in differences(saved, to_json(config))
        if line.partition(":")[0] not in FREE
    ]
    if changed:
        raise CheckpointError(
            "to resume is to continue the same training, but these settings changed: "
            + "; ".join(changed)
            + ".  To start a new training from these weights use --init"
        )
    state = from_json(TrainingState, checkpoint.training["state"])
    own = {name.removeprefix(OWN): a for name, a in checkpoint.optimizer.items() if name.startswith(OWN)}
    average.load(checkpoint.weights)
    model.load_state_dict(own or checkpoint.weights)
    optimizer.load_state_dict({name: a for name, a in checkpoint.optimizer.items() if not name.startswith(OWN)})
    return state


def _listed(classes, category_ids) -> str:
    pairs = [f"{name} ({number})" for name, number in zip(classes, category_ids, strict=True)]
    return ", ".join(pairs[:5]) + (f" and {len(pairs) - 5} more" if len(pairs) > 5 else "")
