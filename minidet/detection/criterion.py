"""What training minimises: focal loss of all anchors plus box loss of the positive ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minidet import backend
from minidet.autograd import Tensor
from minidet.backend import Array
from minidet.detection.assignment import BACKGROUND, MatcherConfig, assign_images
from minidet.detection.coder import CoderConfig, decode_deltas, encode_boxes
from minidet.detection.mining import MiningConfig, hard_labels
from minidet.ops import giou_loss, reshape, sigmoid_focal_loss_sum, smooth_l1, sum, take

BOX_LOSSES = ("l1", "smooth_l1", "giou")
NORMALISERS = ("batch", "image", "moving")

MOVING_START = 100.0  # detectron2's first guess of the positives in a batch
MOVING_MOMENTUM = 0.9


@dataclass(frozen=True)
class LossConfig:
    """The two losses and what they are divided by."""

    alpha: float | None = 0.25
    """Weight of objects; 1 - alpha weighs background.  None: no weights.  Source: table 1b."""
    gamma: float = 2.0
    """How much easy examples are muted; 0 is cross-entropy, balanced by alpha: eq. (3).  Source: table 1b."""
    mining: MiningConfig | None = None
    """Which anchors have a class loss; None: all that are not ignored.  The box loss is of all positives."""
    box: str = "smooth_l1"
    """One of BOX_LOSSES: of deltas ("l1", "smooth_l1") or of decoded boxes ("giou")."""
    beta: float = 1 / 9
    """Where smooth L1 turns from quadratic to linear; the paper does not say, Detectron has 1/9."""
    box_weight: float = 1.0
    """Factor on the box loss.  Source: section 4 "Optimization", the plain sum."""
    normaliser: str = "batch"
    """One of NORMALISERS.  "batch": both sums are divided by the positives of the whole batch.  "image": each
    image's sums by its own positives, then the mean over images (torchvision).  "moving": by a moving average
    of the batch's positives (detectron2).  Never by less than 1."""

    def __post_init__(self):
        if self.box not in BOX_LOSSES:
            raise ValueError(f"loss: box must be one of {', '.join(BOX_LOSSES)}, got {self.box!r}")
        if self.normaliser not in NORMALISERS:
            raise ValueError(f"loss: normaliser must be one of {', '.join(NORMALISERS)}, got {self.normaliser!r}")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"loss: alpha must lie in [0, 1] or be None, got {self.alpha}")
        if self.gamma < 0 or self.beta < 0 or self.box_weight < 0:
            raise ValueError(f"loss: gamma, beta and box_weight must not be negative, got {self}")


@dataclass(frozen=True)
class Targets:
    """What every anchor of a batch should have said.

    Shapes:
        labels: (N, R) int64, the class, BACKGROUND or IGNORE
        rows: (M,) int64, the positive anchors as positions in (N * R); or None, and the next two are of all
            anchors, (N, R, 4) and (R, 4)
        boxes: (M, 4), the object of each; without rows, an anchor that has none has itself
        anchors: (M, 4)
        positives: (N,) int64, how many each image has
        all_anchors: (R, 4)
    """

    labels: Array
    rows: Array | None
    boxes: Array
    anchors: Array
    positives: Array
    all_anchors: Array
    highest: int = BACKGROUND
    """The largest class of any object."""


@dataclass(frozen=True)
class Losses:
    """The loss to differentiate, and its two parts (box already weighted): numbers, but where they were computed."""

    total: Tensor
    classification: Array
    box: Array


def build_targets(
    anchors: Array, boxes: Sequence[np.ndarray], labels: Sequence[np.ndarray], matcher: MatcherConfig
) -> Targets:
    """Match the anchors with the objects of every image, where the anchors are.

    NumPy picks the few positive anchors.  On a device their number is known only there, and to ask for it is to
    wait: targets of all anchors are made instead, and those of background count nothing in the loss.

    Shapes:
        anchors: (R, 4)
        boxes: N arrays (G, 4), G may be 0
        labels: N arrays (G,) int64
    Units: pixels of the network input.
    Source: RetinaNet, arXiv:1708.02002, section 4 "Anchors".
    """
    xp, (R, _) = backend.namespace(anchors), anchors.shape
    # All images' objects one after the other, and one that stands for none: two arrays to copy to a device.
    objects = xp.asarray(np.concatenate([*boxes, np.zeros((1, 4), boxes[0].dtype)]), device=anchors.device)
    classes = np.concatenate([*labels, [0]]).astype(np.int64)
    highest, classes = int(classes[:-1].max(initial=BACKGROUND)), xp.asarray(classes, device=anchors.device)
    ends = np.cumsum([0, *(len(own) for own in boxes)]).tolist()
    matches = assign_images(anchors, objects, ends, matcher)
    if xp is np:
        rows = np.flatnonzero(matches >= 0)
        images = rows // R
        chosen = matches.reshape(-1)[rows] + np.asarray(ends)[images]
        matches.reshape(-1)[rows] = classes[chosen]
        positives = np.bincount(images, minlength=len(boxes))
        return Targets(matches, rows, objects[chosen], anchors[rows % R], positives, anchors, highest)
    matches = xp.stack([xp.where((m := matches[n, :]) >= 0, m + start, m) for n, start in enumerate(ends[:-1])])
    positive = matches >= 0
    positives = xp.sum(xp.astype(positive, xp.int64), axis=1)
    chosen = xp.reshape(xp.where(positive, matches, xp.full_like(matches, ends[-1])), (-1,))
    learned = xp.where(positive, xp.reshape(xp.take(classes, chosen), matches.shape), matches)
    targets = xp.reshape(xp.take(objects, chosen, axis=0), (*matches.shape, 4))
    targets = xp.where(positive[:, :, None], targets, xp.astype(anchors, objects.dtype)[None, :, :])
    return Targets(learned, None, targets, anchors, positives, anchors, highest)


def image_weights(config: LossConfig, positives: Array, moving: Array | float = MOVING_START) -> tuple[Array, Array]:
    """The factor on each image's loss, and the moving average after this batch.

    Takes the positives of the *whole* effective batch: with gradient accumulation every micro-batch then gets
    its part of the factors, and the gradients add up to those of one big batch.

    Shapes:
        positives: (N,) int64
        returns: (N,) float64, and a number to pass in at the next step (and to keep in a checkpoint)
    Source: RetinaNet, arXiv:1708.02002, section 4 "Focal Loss": divided by the anchors assigned to an object.
    """
    xp = backend.namespace(positives)
    counts = xp.astype(positives, xp.float64)
    ones = xp.ones_like(counts)
    if config.normaliser == "image":
        return ones / (positives.shape[0] * xp.maximum(counts, ones)), moving
    total = xp.sum(counts)
    total = xp.where(total > 1, total, xp.ones_like(total))
    if config.normaliser == "moving":
        total = moving = MOVING_MOMENTUM * moving + (1 - MOVING_MOMENTUM) * total
    return ones / total, moving


def loss(
    logits: Tensor, deltas: Tensor, targets: Targets, weights: Array, config: LossConfig, coder: CoderConfig
) -> Losses:
    """Focal loss of every anchor and class, or of the hard ones, plus box loss of the positive anchors.

    Shapes:
        logits: (N, R, K)
        deltas: (N, R, 4)
        weights: (N,), of `image_weights`
    Units: logits; deltas as of `encode_boxes`.
    Source: RetinaNet, arXiv:1708.02002, section 4 "Focal Loss" and "Optimization".
    Raises:
        ValueError: if the targets are for other anchors, or name a class that the logits lack.
    """
    xp, device, dtype = logits.xp, logits.data.device, logits.dtype
    N, R, K = logits.shape
    if targets.labels.shape != (N, R):
        raise ValueError(f"loss: logits are for {N} x {R} anchors, targets for {targets.labels.shape}")
    if targets.highest >= K:
        raise ValueError(f"loss: targets name class {targets.highest}, the model has {K} (0 to {K - 1})")

    def constant(array, dtype=dtype):
        return xp.asarray(array, dtype=dtype, device=device)

    labels, weights = constant(targets.labels, xp.int64), constant(weights)
    learned, how = targets.labels, {"alpha": config.alpha, "gamma": config.gamma}
    if config.mining is not None:
        learned = hard_labels(logits.data, learned, targets.all_anchors, config.mining, **how)
    per_image = sigmoid_focal_loss_sum(logits, constant(learned, xp.int64), **how)
    classification = sum(per_image * weights)
    anchors, boxes = constant(targets.anchors), constant(targets.boxes)
    if targets.rows is None:
        factors = xp.where(labels >= 0, weights[:, None], xp.zeros_like(weights)[:, None])
    else:
        # Most anchors are background and have no box: only the rows of positive ones are ever touched.
        rows = constant(targets.rows, xp.int64)
        deltas, factors = take(reshape(deltas, (N * R, 4)), rows), xp.take(weights, rows // R)
    if config.box == "giou":
        per_row = giou_loss(decode_deltas(deltas, anchors, coder), boxes)
    else:
        beta = config.beta if config.box == "smooth_l1" else 0.0
        per_row = sum(smooth_l1(deltas, encode_boxes(boxes, anchors, coder), beta=beta), axis=-1)
    box = sum(per_row * (config.box_weight * factors))
    return Losses(classification + box, classification.data, box.data)
