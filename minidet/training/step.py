"""One step's gradient: match, forward, loss, backward, in as many parts as memory asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from time import perf_counter

from minidet import backend
from minidet.autograd import Tensor
from minidet.backend import Array
from minidet.data.loader import Batch, cuts
from minidet.detection.criterion import build_targets, image_weights, loss
from minidet.models import RetinaNet
from minidet.training.communicator import Alone, Communicator


@dataclass
class Measured:
    """What a step's gradient cost and gave.

    The numbers stay on the device that computes them until `read`; up to then the seconds of a device are those in
    which its work was ordered, not done.
    """

    classification: Array | float = 0.0
    box: Array | float = 0.0
    positives: Array | int = 0
    dropped: Array | int = 0
    moving: Array | float = 0.0
    """The positives' moving average after this batch."""
    norm: Array | float = 0.0
    """The gradient's, which whoever clips it fills in."""
    match_seconds: float = 0.0
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0

    @property
    def loss(self) -> Array | float:
        """The number that is minimised."""
        return self.classification + self.box

    def read(self) -> Measured:
        """The same in Python's numbers: all that a step has to say, in the one wait for a device that it has."""
        names = ("classification", "box", "positives", "dropped", "moving", "norm")
        numbers = dict(zip(names, backend.read([getattr(self, name) for name in names]), strict=True))
        return replace(self, **numbers | {name: int(numbers[name]) for name in ("positives", "dropped")})


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
    clock = perf_counter()
    anchors = model.anchors(H, W, xp)
    pieces = cuts(N, parts)
    targets = [build_targets(anchors, batch.boxes[cut], batch.labels[cut], config.matcher) for cut in pieces]
    mine = slice(batch.first, batch.first + N)
    positives = xp.zeros(batch.whole, dtype=xp.int64)
    if targets:
        positives[mine] = xp.concat([target.positives for target in targets])
    communicator.all_sum(positives)
    weights, moving = image_weights(config.loss, positives, moving)
    weights = weights[mine]
    measured = Measured(moving=moving, positives=xp.sum(positives), match_seconds=perf_counter() - clock)

    totals = xp.zeros(3, dtype=xp.float64)  # both losses, and the boxes dropped
    totals[2] = batch.dropped
    for cut, target in zip(pieces, targets, strict=True):
        clock = perf_counter()
        logits, deltas = model(Tensor(xp.asarray(batch.images[cut])))
        losses = loss(logits, deltas, target, weights[cut], config.loss, config.coder)
        forward_done = perf_counter()
        losses.total.backward()
        totals[0] += losses.classification
        totals[1] += losses.box
        measured.forward_seconds += forward_done - clock
        measured.backward_seconds += perf_counter() - forward_done
    communicator.all_sum(totals)
    measured.classification, measured.box, measured.dropped = totals[0], totals[1], totals[2]
    return measured
