"""The training loop: data in, weights out, and everything that happened on disk."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import numpy as np

from minidet import backend
from minidet.data.loader import Batch, Loader
from minidet.data.sample import Dataset
from minidet.evaluation import Evaluation, evaluate
from minidet.kernels.trust import first_run
from minidet.models import RetinaNet
from minidet.optim import Optimizer, clip_grad_norm, gradient_norm
from minidet.training.blame import NonFiniteError, first_non_finite
from minidet.training.checkpoint import BEST, LAST, CheckpointError, read_checkpoint, write_checkpoint
from minidet.training.config import TrainConfig
from minidet.training.interrupt import Interrupt
from minidet.training.monitor import Monitor, StepRecord
from minidet.training.report import draw_samples, write_report
from minidet.training.state import TrainingState, capture, restore
from minidet.training.step import batch_gradient


@dataclass(frozen=True, eq=False)
class Training:
    """What a finished training leaves: every step's numbers by column, and the last validation."""

    history: dict[str, list]
    evaluation: Evaluation | None
    state: TrainingState


def train(
    model: RetinaNet,
    dataset: Dataset,
    *,
    validate: Dataset | None = None,
    images: int | None = None,
    out: str | Path | None = None,
    config: TrainConfig | None = None,
    resume: bool = False,
    quiet: bool = False,
    evaluator: Callable[..., Evaluation] = evaluate,
) -> Training:
    """Train `model` on `dataset`, in place.

    `images` overrides `config.images`.  The folder `out` receives metrics.csv (a row per step),
    last.safetensors and best.safetensors (training/checkpoint.py), and at the end metrics.json, curves.png
    and samples.png.  With `resume` the training in `out` continues as if it had never stopped.

    Ctrl-C finishes the step, saves, and raises KeyboardInterrupt.

    Raises:
        ValueError: if the data set's classes are not the model's, or `out` already holds a training.
        CheckpointError: if there is nothing to resume, or what is there is another training.
        NonFiniteError: when the loss or a gradient is not finite; it says where that began.
    """
    config = config or TrainConfig()
    if images is not None:
        config = replace(config, images=images)
    if tuple(dataset.classes) != tuple(model.config.classes):
        raise ValueError(f"train: the model knows {model.config.classes}, the data set has {dataset.classes}")
    out = None if out is None else Path(out)
    optimizer, state = config.optimizer(model), TrainingState()
    if resume:
        if out is None:
            raise ValueError("train: to resume, say where: out=FOLDER")
        state = _resumed(out / LAST, model, optimizer, config, dataset)
    elif out is not None and (out / LAST).exists():
        raise ValueError(f"train: {out} already holds a training: resume it (--resume), or choose another folder")
    validating = validate is not None and config.validations > 0
    evaluation = None

    def save(name: str) -> None:
        if out is not None:
            write_checkpoint(out / name, capture(model, optimizer, config, state, dataset))

    def judged() -> Evaluation:
        nonlocal state
        # As many images at once as a step takes: what fits in training fits here.
        result = evaluator(model, validate, batch_size=max(1, config.batch_size // config.accumulate))
        if result["AP"] > state.best_ap:
            state = replace(state, best_ap=result["AP"], best_position=state.position)
            save(BEST)
        return result

    loader = Loader(
        dataset, model.config.preprocess, batch_size=config.batch_size, seed=config.seed, images=config.images,
        start=state.position, augment=config.augment, workers=config.workers,
    )  # fmt: skip
    model.train()
    with Interrupt() as interrupt, Monitor(out, config.images, state.position, quiet=quiet) as monitor:
        monitor.say(config.summary(len(dataset)))
        if first_run() and backend.name_of(model.xp) == "numpy":
            monitor.say("first run on this machine: compiling the kernels takes up to a minute, once")
        for batch in loader:
            before = state
            state, record = _step(model, batch, optimizer, config, state)
            validate_now = validating and _due(config.validations, config.images, before, state)
            if validate_now and not interrupt.requested:
                save(LAST)  # a validation takes its time: nothing that happens in it shall cost the steps before
                evaluation = judged()
                record = replace(record, AP=evaluation["AP"], AP50=evaluation["AP50"])
                monitor.say(f"{state.position:,} images: AP {record.AP:.3f}, AP50 {record.AP50:.3f}")
            monitor.record(record)
            stop = interrupt.requested  # asked once: it may change between two lines
            if stop or validate_now or _due(config.checkpoints, config.images, before, state):
                save(LAST)
            if stop:
                saved = "nothing was saved" if out is None else f"saved in {out / LAST}; resume to go on"
                raise KeyboardInterrupt(f"stopped after {state.position:,} of {config.images:,} images: {saved}")
        save(LAST)
        history = monitor.history
    if validating and evaluation is None:  # resumed after the last step
        evaluation = judged()
        save(LAST)
    if out is not None:
        write_report(out, history, evaluation, state)
        draw_samples(model, dataset if validate is None else validate, config.samples, out / "samples.png")
    return Training(history, evaluation, state)


def _resumed(
    path: Path, model: RetinaNet, optimizer: Optimizer, config: TrainConfig, dataset: Dataset
) -> TrainingState:
    try:
        return restore(read_checkpoint(path), model, optimizer, config, dataset)
    except ValueError as error:
        raise CheckpointError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def _step(
    model: RetinaNet, batch: Batch, optimizer: Optimizer, config: TrainConfig, state: TrainingState
) -> tuple[TrainingState, StepRecord]:
    """One step of the optimizer: the state after it, and what it was like."""
    lr = config.schedule().lr(state.position)
    clock = perf_counter()
    # Overflows are looked for below, where more can be said about them than in a warning.
    with np.errstate(all="ignore"):
        measured = batch_gradient(model, batch, config.accumulate, state.moving)
        gradient_done = perf_counter()
        parameters = optimizer.parameters.values()
        norm = gradient_norm(parameters) if config.clip is None else clip_grad_norm(parameters, config.clip)
    if not (math.isfinite(measured.loss) and math.isfinite(norm)):
        raise _non_finite(model, batch, config, state, measured.loss, norm, lr)
    optimizer.step(lr)
    optimizer.clear_gradients()
    done = perf_counter()
    after = replace(
        state,
        position=state.position + len(batch),
        steps=state.steps + 1,
        moving=measured.moving,
        seconds=state.seconds + batch.seconds + done - clock,
    )
    return after, StepRecord(
        step=after.steps,
        position=after.position,
        lr=lr,
        loss=measured.loss,
        classification=measured.classification,
        box=measured.box,
        positives=measured.positives,
        gradient_norm=norm,
        dropped=batch.dropped,
        data_ms=1e3 * batch.seconds,
        match_ms=1e3 * measured.match_seconds,
        forward_ms=1e3 * measured.forward_seconds,
        backward_ms=1e3 * measured.backward_seconds,
        update_ms=1e3 * (done - gradient_done),
    )


def _due(times: int, images: int, before: TrainingState, after: TrainingState) -> bool:
    """Whether one of `times` moments, evenly spread and the last at the end, lies between two states."""
    return before.position * times // images < after.position * times // images


def _non_finite(
    model: RetinaNet,
    batch: Batch,
    config: TrainConfig,
    state: TrainingState,
    loss: float,
    norm: float,
    lr: float,
) -> NonFiniteError:
    """The error that says which step, which images, and which layer."""
    origin = first_non_finite(
        model, batch.images, lambda: batch_gradient(model, batch, config.accumulate, state.moving)
    )
    images = ", ".join(f"{number} ({name})" for number, name in zip(batch.image_ids, batch.names, strict=True))
    return NonFiniteError(
        f"step {state.steps + 1}: the loss is {loss} and the gradient's norm {norm}.\n"
        f"The first value that is not finite: {origin}.\n"
        f"The batch, images {state.position:,} to {state.position + len(batch) - 1:,} of the training: {images}.\n"
        f"Usual remedies: a lower learning rate (now {lr:.2g}), a longer warm-up, clipping at a smaller norm "
        f"(now {config.clip})."
    )
