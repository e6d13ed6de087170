"""The training loop: data in, weights out, and everything that happened on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import numba
import numpy as np

from minidet import backend
from minidet.data.loader import Batch, Loader
from minidet.data.sample import Dataset
from minidet.evaluation import Evaluation
from minidet.kernels.trust import first_run
from minidet.models import RetinaNet
from minidet.optim import Optimizer, clip_grad_norm, gradient_norm
from minidet.training.ahead import compiling_ahead
from minidet.training.average import WeightAverage
from minidet.training.blame import NonFiniteError, first_non_finite
from minidet.training.checkpoint import BEST, LAST, CheckpointError, read_checkpoint, write_checkpoint
from minidet.training.communicator import Communicator, find_communicator
from minidet.training.config import TrainConfig
from minidet.training.interrupt import Interrupt, Stopped
from minidet.training.monitor import Monitor, StepRecord
from minidet.training.report import draw_samples, write_report
from minidet.training.settings import to_json
from minidet.training.state import TrainingState, capture, restore
from minidet.training.step import batch_gradient
from minidet.training.together import (
    average_statistics,
    check_alike,
    evaluate_together,
    pad_alike,
    sum_gradients,
)


@dataclass(frozen=True, eq=False)
class Training:
    """What a finished training leaves: every step's numbers by column, and the last validation.

    Of several processes only the first one has the evaluation, and the numbers from before a resume.
    """

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
    evaluator: Callable[..., Evaluation] | None = None,
    communicator: Communicator | None = None,
) -> Training:
    """Train `model` on `dataset`, in place.

    `images` overrides `config.images`, and stretches its schedule.  The folder `out` receives metrics.csv (a row
    per step), last.safetensors and best.safetensors (training/checkpoint.py), and at the end metrics.json,
    curves.png and samples.png.  With `resume` the training in `out` continues as if it had never stopped.

    Ctrl-C finishes the step, saves, and raises KeyboardInterrupt.

    Under mpiexec, or with a `communicator`, the processes share every batch and take the same steps; the first
    one writes and shows everything.  All need the same model, data and folder.

    Raises:
        ValueError: if the data set's classes are not the model's, or `out` already holds a training.
        CheckpointError: if there is nothing to resume, or what is there is another training.
        NonFiniteError: when the loss or a gradient is not finite; it says where that began.
    """
    config = config or TrainConfig()
    if images is not None:
        config = config.stretched(images)
    if tuple(dataset.classes) != tuple(model.config.classes):
        raise ValueError(f"train: the model knows {model.config.classes}, the data set has {dataset.classes}")
    out = None if out is None else Path(out)
    communicator = communicator or find_communicator()
    leads = communicator.rank == 0
    optimizer, state, average = config.optimizer(model), TrainingState(), WeightAverage(model, config.ema)
    if resume:
        if out is None:
            raise ValueError("train: to resume, say where: out=FOLDER")
        state = _resumed(out / LAST, model, optimizer, config, dataset, average)
    elif out is not None and (out / LAST).exists():
        raise ValueError(f"train: {out} already holds a training: resume it (--resume), or choose another folder")
    validating = validate is not None and config.validations > 0
    evaluation, judged = None, False
    check_alike(communicator, model, json.dumps([to_json(config), to_json(state), len(dataset)]))

    def save(name: str) -> None:
        check_alike(communicator, model, f"{state.position} images seen")
        if out is not None and leads:
            write_checkpoint(out / name, capture(model, optimizer, config, state, dataset, average))

    def judge() -> None:
        nonlocal state, evaluation, judged
        # As many images at once as a step takes: what fits in training fits here.
        batch_size = max(1, config.batch_size // (config.accumulate * communicator.size))
        with average.in_place(model):
            if evaluator is None:
                evaluation = evaluate_together(communicator, model, validate, batch_size=batch_size)
            else:
                evaluation = evaluator(model, validate, batch_size=batch_size)
        scores = np.array([evaluation["AP"], evaluation["AP50"]] if leads else [0.0, 0.0])
        communicator.broadcast(scores)
        AP, AP50 = scores.tolist()
        state, judged = replace(state, validated=state.position), True
        if AP > state.best_ap:
            state = replace(state, best_ap=AP, best_position=state.position)
            save(BEST)
        monitor.validated(AP, AP50)
        monitor.say(f"{state.position:,} images: AP {AP:.3f}, AP50 {AP50:.3f}")
        save(LAST)

    loader = Loader(
        dataset, model.config.preprocess, batch_size=config.batch_size, seed=config.seed, images=config.images,
        start=state.position, augment=config.augment, min_sizes=config.min_sizes,
        aspect_factor=config.aspect_factor, workers=config.workers,
        rank=communicator.rank, size=communicator.size, parts=config.accumulate, xp=model.xp,
    )  # fmt: skip
    model.train()
    model.compute(precision=config.precision, recompute=config.recompute)
    folder, quiet = out if leads else None, quiet or not leads
    with (
        Interrupt(quiet=not leads) as interrupt,
        Monitor(folder, config.images, state.position, quiet=quiet, xp=model.xp) as monitor,
        ExitStack() as first_step,
    ):

        def stop() -> bool:
            """Whether somebody asked for it, in whichever process: a signal may come between two lines."""
            requested = np.array([interrupt.requested], np.int64)
            communicator.all_max(requested)
            return bool(requested[0])

        monitor.say(config.summary(len(dataset)))
        if communicator.size > 1:
            monitor.say(f"{communicator.size} processes share every batch; threads in each: {numba.get_num_threads()}")
        if first_run() and backend.name_of(model.xp) == "numpy":
            monitor.say("first run on this machine: compiling the kernels takes about half a minute, once")
            if communicator.size == 1 < numba.get_num_threads() and config.precision == "float32":
                first_step.enter_context(compiling_ahead(model.config))
        if validating and _due(config.validations, config.images, state.validated, state.position):
            judge()  # the training was stopped before it could
        for batch in loader:
            before = state.position
            state, record = _step(model, batch, optimizer, config, state, communicator)
            first_step.close()  # after later ones it has nothing to do
            average.update(model, before, batch.whole)
            monitor.record(record)
            stopping = stop()
            validate_now = validating and _due(config.validations, config.images, before, state.position)
            if stopping or validate_now or _due(config.checkpoints, config.images, before, state.position):
                save(LAST)  # before a validation too: nothing that happens in it shall cost the steps before
            if validate_now and not stopping:
                judge()
                stopping = stop()
            if stopping:
                saved = "nothing was saved" if out is None else f"saved in {out / LAST}; resume to go on"
                raise Stopped(f"stopped after {state.position:,} of {config.images:,} images: {saved}")
        save(LAST)
        if validating and not judged:  # resumed after the last step
            judge()
        history = monitor.history
    if config.ema:
        model.load_state_dict(average.weights(model))
    if out is not None and leads:
        write_report(out, history, evaluation, state)
        draw_samples(model, dataset if validate is None else validate, config.samples, out / "samples.png")
    return Training(history, evaluation, state)


def _resumed(
    path: Path,
    model: RetinaNet,
    optimizer: Optimizer,
    config: TrainConfig,
    dataset: Dataset,
    average: WeightAverage,
) -> TrainingState:
    try:
        return restore(read_checkpoint(path), model, optimizer, config, dataset, average)
    except ValueError as error:
        raise CheckpointError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def _step(
    model: RetinaNet,
    batch: Batch,
    optimizer: Optimizer,
    config: TrainConfig,
    state: TrainingState,
    communicator: Communicator,
) -> tuple[TrainingState, StepRecord]:
    """One step of the optimizer: the state after it, and what it was like."""
    lr = config.schedule().lr(state.position)
    clock = perf_counter()
    # Overflows are looked for below, where more can be said about them than in a warning.
    with np.errstate(all="ignore"):
        batch = pad_alike(batch, communicator)
        measured = batch_gradient(model, batch, config.accumulate, state.moving, communicator)
        gradient_done = perf_counter()
        parameters = optimizer.parameters.values()
        sum_gradients(communicator, parameters)
        average_statistics(communicator, model)
        measured.norm = gradient_norm(parameters) if config.clip is None else clip_grad_norm(parameters, config.clip)
        measured = measured.read()
    if not (math.isfinite(measured.loss) and math.isfinite(measured.norm)):
        raise _non_finite(model, batch, config, state, measured.loss, measured.norm, lr, communicator)
    optimizer.step(lr)
    optimizer.clear_gradients()
    done = perf_counter()
    after = replace(
        state,
        position=state.position + batch.whole,
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
        gradient_norm=measured.norm,
        dropped=measured.dropped,
        data_ms=1e3 * batch.seconds,
        match_ms=1e3 * measured.match_seconds,
        forward_ms=1e3 * measured.forward_seconds,
        backward_ms=1e3 * measured.backward_seconds,
        update_ms=1e3 * (done - gradient_done),
    )


def _due(times: int, images: int, before: int, after: int) -> bool:
    """Whether one of `times` moments, evenly spread and the last at the end, lies between two positions."""
    return before * times // images < after * times // images


def _non_finite(
    model: RetinaNet,
    batch: Batch,
    config: TrainConfig,
    state: TrainingState,
    loss: float,
    norm: float,
    lr: float,
    communicator: Communicator,
) -> NonFiniteError:
    """The error that says which step, which images, and which layer."""
    origin = first_non_finite(
        model, batch.images[:], lambda: batch_gradient(model, batch, config.accumulate, state.moving)
    )
    images = ", ".join(f"{number} ({name})" for number, name in zip(batch.image_ids, batch.names, strict=True))
    told = communicator.gather({"origin": np.array(origin), "images": np.array(images)}) or []
    for one in reversed(told):  # the first process speaks, for the first that found something
        if not str(one["origin"]).startswith("nowhere"):
            origin, images = one["origin"], one["images"]
    return NonFiniteError(
        f"step {state.steps + 1}: the loss is {loss} and the gradient's norm {norm}.\n"
        f"The first value that is not finite: {origin}.\n"
        f"The batch, images {state.position:,} to {state.position + batch.whole - 1:,} of the training: {images}.\n"
        f"Usual remedies: a lower learning rate (now {lr:.2g}), a longer warm-up, clipping at a smaller norm "
        f"(now {config.clip})."
    )
