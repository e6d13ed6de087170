"""One step's gradient: match, forward, loss, backward, in as many parts as memory asks for."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import numpy as np

from minidet.autograd import Tensor
from minidet.data.loader import Batch
from minidet.detection.criterion import build_targets, image_weights, loss
from minidet.models import RetinaNet
from minidet.training.communicator import Alone, Communicator


@dataclass
class Measured:
    """What a step's gradient cost and gave."""

    classification: float = 0.0
    box: float = 0.0
    positives: int = 0
    dropped: int = 0
    moving: float = 0.0
    """The positives' moving average after this batch."""
    match_seconds: float = 0.0
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0

    @property
    def loss(self) -> float:
        """The number that is minimised."""
        return self.classification + self.box


def batch_gradient(
    model: RetinaNet, batch: Batch, parts: int, moving: float, communicator: Communicator | None = None
) -> Measured:
    """Add the gradient of the batch's loss to every parameter's `.grad`.

    The batch is padded as one and matched as one; only then is it cut into `parts`.  Every part's losses are
    weighted with factors of the whole batch, so the gradients of the parts add up to that of the batch.  In the
    same way the gradients of several processes, which share a batch, add up to it; the numbers measured are
    already those of the whole.

    Source: RetinaNet, arXiv:1708.02002, section 4 "Focal Loss" and "Optimization".
    """
    communicator = communicator or Alone()
    xp, config = model.xp, model.config
    N, H, W, _ = batch.images.shape
    size = max(1, -(-N // parts))
    cuts = [slice(start, start + size) for start in range(0, N, size)]

    clock = perf_counter()
    anchors = model.anchors(H, W)
    targets = [build_targets(anchors, batch.boxes[cut], batch.labels[cut], config.matcher) for cut in cuts]
    mine = slice(batch.first, batch.first + N)
    positives = np.zeros(batch.whole, np.int64)
    positives[mine] = [n for target in targets for n in target.positives]
    communicator.all_sum(positives)
    weights, moving = image_weights(config.loss, positives, moving)
    weights = weights[mine]
    measured = Measured(moving=moving, positives=int(positives.sum()), match_seconds=perf_counter() - clock)

    for cut, target in zip(cuts, targets, strict=True):
        clock = perf_counter()
        logits, deltas = model(Tensor(xp.asarray(batch.images[cut])))
        losses = loss(logits, deltas, target, weights[cut], config.loss, config.coder)
        forward_done = perf_counter()  # `loss` has read numbers back, so a GPU is done too
        losses.total.backward()
        measured.classification += losses.classification
        measured.box += losses.box
        measured.forward_seconds += forward_done - clock
        measured.backward_seconds += perf_counter() - forward_done
    totals = np.array([measured.classification, measured.box, batch.dropped])
    communicator.all_sum(totals)
    measured.classification, measured.box, measured.dropped = float(totals[0]), float(totals[1]), int(totals[2])
    return measured
