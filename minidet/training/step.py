"""One step's gradient: match, forward, loss, backward, in as many parts as memory asks for."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import numpy as np

from minidet.autograd import Tensor
from minidet.data.loader import Batch
from minidet.detection.criterion import build_targets, image_weights, loss
from minidet.models import RetinaNet


@dataclass
class Measured:
    """What a step's gradient cost and gave."""

    classification: float = 0.0
    box: float = 0.0
    positives: int = 0
    moving: float = 0.0
    """The positives' moving average after this batch."""
    match_seconds: float = 0.0
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0

    @property
    def loss(self) -> float:
        """The number that is minimised."""
        return self.classification + self.box


def batch_gradient(model: RetinaNet, batch: Batch, parts: int, moving: float) -> Measured:
    """Add the gradient of the batch's loss to every parameter's `.grad`.

    The batch is padded as one and matched as one; only then is it cut into `parts`.  Every part's losses are
    weighted with factors of the whole batch, so the gradients of the parts add up to that of the batch.

    Source: RetinaNet, arXiv:1708.02002, section 4 "Focal Loss" and "Optimization".
    """
    xp, config = model.xp, model.config
    N, H, W, _ = batch.images.shape
    size = -(-N // parts)
    cuts = [slice(start, start + size) for start in range(0, N, size)]

    clock = perf_counter()
    anchors = model.anchors(H, W)
    targets = [build_targets(anchors, batch.boxes[cut], batch.labels[cut], config.matcher) for cut in cuts]
    positives = np.concatenate([t.positives for t in targets])
    weights, moving = image_weights(config.loss, positives, moving)
    measured = Measured(moving=moving, match_seconds=perf_counter() - clock)

    for cut, target in zip(cuts, targets, strict=True):
        clock = perf_counter()
        logits, deltas = model(Tensor(xp.asarray(batch.images[cut])))
        losses = loss(logits, deltas, target, weights[cut], config.loss, config.coder)
        forward_done = perf_counter()  # `loss` has read numbers back, so a GPU is done too
        losses.total.backward()
        measured.classification += losses.classification
        measured.box += losses.box
        measured.positives += losses.positives
        measured.forward_seconds += forward_done - clock
        measured.backward_seconds += perf_counter() - forward_done
    return measured
