"""A training tried for a minute: its first loss, one batch learned by heart, and what the whole will cost here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np

from minidet.autograd import Tensor, no_grad
from minidet.data import Dataset, Loader
from minidet.data.loader import Batch
from minidet.detect import detect_batch
from minidet.detection import IGNORE, LossConfig, build_targets, image_weights, loss
from minidet.detection.criterion import MOVING_START
from minidet.inspection.advice import finding
from minidet.inspection.findings import MUST_FIX, WARNING, Finding
from minidet.inspection.layers import measure_layers
from minidet.inspection.process import available, peak, reset_peak, settle
from minidet.models import RetinaNet
from minidet.optim import Optimizer, clip_grad_norm
from minidet.plots import loss_curves
from minidet.training.checkpoint import LAST, Checkpoint, write_checkpoint
from minidet.training.config import TrainConfig
from minidet.training.step import batch_gradient

OFF, FAR_OFF = 2.0, 10.0
"""Factors between the first loss and its closed form: what the noise of first weights may do, and what it cannot."""
HEART_IMAGES, HEART_STEPS, HEART_RAMP, HEART_SHARE = 2, 60, 10, 0.5
"""What is learned by heart, within how many steps, the first of them at a growing rate, down to which share."""
SEEN = 8  # batches of the training that are tried
TIMED = 3  # steps of one image
BUDGET = 60.0  # seconds that each experiment may take; with `quick` a quarter
ROOMY = 0.5  # part of the available memory that the trial may use
CODE = 110 * 2**20  # bytes that loading all compiled kernels takes; compiling them takes more, but only once
CURVES = ("position", "loss", "classification", "box")
PHASES = ("data", "match", "forward", "backward", "update")


@dataclass(frozen=True)
class Trial:
    """What was tried, and what the whole training will cost.

    Attributes:
        first_loss, expected_loss: of the classes, before any step; None where it has no closed form.
        heart: the losses of the images that were learned by heart.
        tried, part: images that were run at once, and that the recipe runs at once.
        steps: of the whole training.
        seconds: of a step, by phase.
        validation_seconds: of all validations.
        memory: predicted peak in bytes, by what it is for.
        counted: bytes of all activations of a part, by counting.
        available: bytes that this machine has.
    """

    first_loss: float
    expected_loss: float | None
    heart: tuple[float, ...]
    tried: int
    part: int
    steps: int
    seconds: dict[str, float]
    validation_seconds: float
    memory: dict[str, float]
    counted: float
    available: int

    @property
    def step_seconds(self) -> float:
        """Of one step, waiting for its data included."""
        return sum(self.seconds.values())

    @property
    def total_seconds(self) -> float:
        """Of the whole training."""
        return self.steps * self.step_seconds + self.validation_seconds

    @property
    def peak(self) -> float:
        """Bytes that the process will have at most."""
        return sum(self.memory.values())

    def table(self) -> str:
        """The trial in lines."""
        expected = "no closed form" if self.expected_loss is None else f"closed form {self.expected_loss:.3f}"
        phases = ", ".join(f"{name} {1e3 * value:,.0f}" for name, value in self.seconds.items())
        memory = ", ".join(f"{name} {value / 2**20:,.0f}" for name, value in self.memory.items())
        heart = f"loss {self.heart[0]:.3f} -> {self.heart[-1]:.3f}" if self.heart else "not tried"
        tried = "" if self.tried == self.part else f"; {self.tried} of {self.part} images tried"
        training, validation = duration(self.steps * self.step_seconds), duration(self.validation_seconds)
        whole = duration(self.total_seconds)
        return "\n".join([
            f"first class loss  {self.first_loss:.3f}, {expected}",
            f"learned by heart  {heart} in {max(0, len(self.heart) - 1)} steps",
            f"a step            {self.step_seconds:,.3f} s (ms: {phases}){tried}",
            f"the training      {whole}: {self.steps:,} steps {training}, validation {validation}",
            f"peak memory       {self.peak / 2**20:,.0f} of {self.available / 2**20:,.0f} MiB ({memory}; "
            f"all outputs of all layers would be {self.counted / 2**20:,.0f})",
        ])  # fmt: skip


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def expected_first_loss(
    config: LossConfig, prior: float, labels: np.ndarray, weights: np.ndarray, classes: int
) -> float:
    """The class loss of a network that says `prior` everywhere.

    Background: (1 - alpha) pi^gamma -log(1 - pi) for each anchor and class; an object, in its class:
    alpha (1 - pi)^gamma -log pi.

    Shapes:
        labels: (N, R)
        weights: (N,)
    Source: RetinaNet, arXiv:1708.02002, section 3.3 and eq. (5).
    """
    objects, others = (1.0, 1.0) if config.alpha is None else (config.alpha, 1 - config.alpha)
    background = others * prior**config.gamma * -math.log(1 - prior)
    found = objects * (1 - prior) ** config.gamma * -math.log(prior)
    positives = (labels >= 0).sum(axis=1)
    return float(weights @ (positives * found + ((labels != IGNORE).sum(axis=1) * classes - positives) * background))


def run_trial(
    model: RetinaNet, dataset: Dataset, validate: Dataset | None, recipe: TrainConfig, *, program: int, quick: bool
) -> Trial:
    """Run the experiments; afterwards the model's weights are what they were.

    `program` counts the bytes that the process had before it knew of data or model.
    """
    saved = {name: array.copy() for name, array in model.state_dict().items()}
    weights, idle = sum(array.nbytes for array in saved.values()), settle()
    budget = BUDGET / 4 if quick else BUDGET
    part = -(-recipe.batch_size // recipe.accumulate)
    optimizer = recipe.optimizer(model)
    state = sum(array.nbytes for arrays in optimizer.state.values() for array in arrays)

    model.train()
    with np.errstate(all="ignore"):
        batch = next(iter(_loader(model, dataset, recipe)))
        first, expected = _first_loss(model, batch)
        _steps(model, [batch], 1, optimizer, 0.0)  # compiles what was not yet
        ready = settle()
        one, _, one_peak = _steps(model, [batch] * (1 + TIMED), 1, optimizer, budget)
        room = ROOMY * available() / max(1, one_peak - ready)
        tried = max(1, min(part, int(budget / (TIMED * one[1:].sum())), int(room)))
        many, pixels, many_peak = _steps(model, _loader(model, dataset, recipe), tried, optimizer, budget)
        saving = max(0, _saving(model, optimizer) - many_peak)
        heart = _by_heart(model, dataset, recipe, budget)
    model.load_state_dict(saved)
    validation = recipe.validations * len(validate) * _validation(model, validate, part, budget) if validate else 0.0

    # Time grows linearly with the images run at once and with their pixels, and memory with the images.
    more, one[1:4] = (
        (part - tried) / max(1, tried - 1),
        one[1:4] * pixels / (batch.images.shape[1] * batch.images.shape[2]),
    )
    phases = many + more * np.maximum(many - one, 0) if tried > 1 else part * many
    phases = np.array([many[0], *(phases[1:4] * recipe.accumulate), many[4]])
    activations = many_peak - ready + batch.images.nbytes
    activations += more * max(0, many_peak - one_peak) if tried > 1 else (part - 1) * (many_peak - ready)
    if recipe.workers:  # batches come while the step before runs
        phases[0] = max(0.0, many[0] - phases[1:].sum())
    code = min(CODE, max(0, ready - idle - state - batch.images.nbytes))
    memory = {"program": program + code, "data": max(0, idle - 2 * weights - program), "weights": weights}
    memory |= {"optimizer": state + (weights if recipe.ema else 0), "activations": activations, "saving": saving}
    counted = sum(layer.memory for layer in measure_layers(model, (256, 256))) / 256**2
    return Trial(
        first, expected, heart, tried, part, -(-recipe.images // recipe.batch_size),
        dict(zip(PHASES, phases.tolist(), strict=True)), validation, memory,
        counted * batch.images[:part, ..., 0].size, available(),
    )  # fmt: skip


def check_trial(trial: Trial, recipe: TrainConfig) -> Iterator[Finding]:
    """What the trial means for training."""
    ratio = trial.first_loss / trial.expected_loss if trial.expected_loss else 1.0
    if not 1 / OFF < ratio < OFF:
        severity = WARNING if 1 / FAR_OFF < ratio < FAR_OFF else MUST_FIX
        yield finding("first-loss", severity=severity, found=trial.first_loss, expected=trial.expected_loss)
    forgetful = len(trial.heart) > HEART_STEPS and trial.heart[-1] > HEART_SHARE * trial.heart[0]
    if forgetful or not np.isfinite(trial.heart).all():  # fewer steps: the time was over
        yield finding(
            "not-learned-by-heart", severity=WARNING if forgetful else MUST_FIX, images=HEART_IMAGES,
            steps=len(trial.heart) - 1, first=trial.heart[0], last=trial.heart[-1], share=HEART_SHARE,
        )  # fmt: skip
    if trial.peak > 0.8 * trial.available:
        room = 0.8 * trial.available - (trial.peak - trial.memory["activations"])
        parts = math.ceil(trial.memory["activations"] * recipe.accumulate / room) if room > 0 else math.inf
        fix = f"--set accumulate={parts} gives the same result in parts"
        if parts > recipe.batch_size:
            fix = "smaller images (--set model.preprocess.max_size=...) or a smaller network"
        yield finding(
            "memory", severity=MUST_FIX if trial.peak > trial.available else WARNING, peak=trial.peak / 2**30,
            available=trial.available / 2**30, images=trial.part, fix=fix,
        )  # fmt: skip


def _loader(model: RetinaNet, dataset: Dataset, recipe: TrainConfig) -> Loader:
    """The first batches, as the training will see them."""
    return Loader(
        dataset, model.config.preprocess, batch_size=recipe.batch_size, seed=recipe.seed,
        images=min(recipe.images, SEEN * recipe.batch_size), augment=recipe.augment, min_sizes=recipe.min_sizes,
        aspect_factor=recipe.aspect_factor,
    )  # fmt: skip


def _first(batch: Batch, count: int) -> Batch:
    """The batch's first images, padded as they were."""
    return replace(batch, images=batch.images[:count], boxes=batch.boxes[:count], labels=batch.labels[:count])


def _first_loss(model: RetinaNet, batch: Batch) -> tuple[float, float | None]:
    """The class loss of one or two images, and its closed form."""
    config, part = model.config, _first(batch, HEART_IMAGES)
    targets = build_targets(model.anchors(*part.images.shape[1:3]), part.boxes, part.labels, config.matcher)
    weights, _ = image_weights(config.loss, targets.positives)
    with no_grad():
        outputs = model(Tensor(model.xp.asarray(part.images)))
        found = float(loss(*outputs, targets, weights, config.loss, config.coder).classification)
    if config.loss.mining is not None:  # which anchors count is then decided by noise
        return found, None
    return found, expected_first_loss(config.loss, config.head.prior, targets.labels, weights, len(config.classes))


def _steps(
    model: RetinaNet, batches: Iterable[Batch], count: int, optimizer: Optimizer, budget: float
) -> tuple[np.ndarray, float, int]:
    """Steps of the first `count` images of each batch, which change nothing.

    Returns the seconds of each of PHASES in a typical step, the mean pixels of an image, and the peak bytes.
    """
    reset_peak()
    steps, pixels, began = [], [], perf_counter()
    for batch in batches:
        part, clock = _first(batch, count), perf_counter()
        measured = batch_gradient(model, part, 1, MOVING_START)
        clip_grad_norm(optimizer.parameters.values(), 1.0)
        optimizer.step(0.0)
        optimizer.clear_gradients()
        measured.read()  # waits for a device, which would else still be at work
        phases = [measured.match_seconds, measured.forward_seconds, measured.backward_seconds]
        steps.append([batch.seconds, *phases, perf_counter() - clock - sum(phases)])
        pixels.append(batch.images.shape[1] * batch.images.shape[2])
        if perf_counter() - began > budget and len(steps) > 1:
            break
    # Per pixel, because sizes differ; the first one touched its memory for the first time.
    scale = np.array(pixels, float)[:, None] / np.mean(pixels)
    steps = (np.array(steps) / np.where([False, True, True, True, False], scale, 1.0))[1:] if len(steps) > 1 else steps
    return np.median(steps, axis=0), float(np.mean(pixels)), peak()


def _saving(model: RetinaNet, optimizer: Optimizer) -> int:
    """Peak bytes of what happens besides steps: a checkpoint is written, and curves are drawn."""
    reset_peak()
    with TemporaryDirectory() as folder:
        weights, state = model.state_dict(), optimizer.state_dict()
        write_checkpoint(f"{folder}/{LAST}", Checkpoint({}, model.config.classes, (), weights, state))
        loss_curves({name: [0.0, 1.0] for name in CURVES}, f"{folder}/curves.png")
    return peak()


def _by_heart(model: RetinaNet, dataset: Dataset, recipe: TrainConfig, budget: float) -> tuple[float, ...]:
    """The losses of a few images with objects, learned again and again without augmentation."""
    loader = Loader(dataset, model.config.preprocess, batch_size=HEART_IMAGES, seed=recipe.seed)
    batch = next((batch for _, batch in zip(range(50), loader, strict=False) if any(map(len, batch.boxes))), None)
    optimizer, losses, began = recipe.optimizer(model), [], perf_counter()
    while batch is not None and len(losses) <= HEART_STEPS:
        measured = batch_gradient(model, batch, 1, MOVING_START).read()
        losses.append(measured.loss)
        done = measured.loss <= HEART_SHARE * losses[0] or not math.isfinite(measured.loss)
        if done or perf_counter() - began > budget:
            break
        clip_grad_norm(optimizer.parameters.values(), recipe.clip or 10.0)
        optimizer.step(recipe.schedule().peak * min(1, len(losses) / HEART_RAMP))
        optimizer.clear_gradients()
    optimizer.clear_gradients()
    return tuple(losses)


def _validation(model: RetinaNet, validate: Dataset, batch_size: int, budget: float) -> float:
    """Seconds an image, from opening it to its detections."""
    began, images = perf_counter(), min(len(validate), 2 * batch_size)
    loader = Loader(validate, model.config.preprocess, batch_size=batch_size, images=images, shuffle=False)
    for batch in loader:
        detect_batch(model, batch.images, batch.sizes, batch.original_sizes)
        if perf_counter() - began > budget:
            return (perf_counter() - began) / (batch.position + len(batch))
    return (perf_counter() - began) / images
