"""Which anchor is responsible for which object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minidet import backend
from minidet.backend import Array
from minidet.kernels import best_matches, claimed_anchors
from minidet.kernels.focal import BACKGROUND, IGNORE


@dataclass(frozen=True)
class MatcherConfig:
    """How much an anchor must overlap an object to be responsible for it.

    Source: RetinaNet, arXiv:1708.02002, section 4 "Anchors".
    """

    high: float = 0.5
    """IoU from which an anchor is an object's: >=."""
    low: float = 0.4
    """IoU below which it is background: <.  Between the two it is ignored."""
    low_quality: bool = False
    """Whether the best anchors of every object are positive however little they overlap it.  The paper's
    rule does not say so; torchvision and detectron2 do."""
    zero_iou: bool = False
    """Whether "however little" includes not at all.  An object that overlaps no anchor has best IoU 0, which
    every anchor attains: all become positive.  A trap in both systems, reproduced on request."""

    def __post_init__(self):
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"matcher: needs 0 <= low <= high <= 1, got low={self.low}, high={self.high}")


def assign(anchors: Array, gt_boxes: Array, config: MatcherConfig) -> Array:
    """The object each anchor is responsible for.

    Shapes:
        anchors: (R, 4)
        gt_boxes: (G, 4), G may be 0
        returns: (R,) int64: index into gt_boxes, BACKGROUND or IGNORE
    Rule: positive where the anchor's best IoU >= high, background where < low, ignored between; thresholds
        are compared in the dtype of the anchors.
    Ties: of objects overlapped equally the first wins.  With low_quality, all anchors that attain an object's
        best IoU become positive, each for *its own* best object, which may be another.
    Source: RetinaNet, arXiv:1708.02002, section 4 "Anchors".
    """
    return assign_images(anchors, [gt_boxes], config)[0, :]


def assign_images(anchors: Array, gt_boxes: Sequence[Array], config: MatcherConfig) -> Array:
    """`assign`, for all images of a batch at once.

    Shapes:
        anchors: (R, 4)
        gt_boxes: N arrays (G, 4), G may be 0
        returns: (N, R) int64
    Source: RetinaNet, arXiv:1708.02002, section 4 "Anchors".
    """
    xp = backend.namespace(anchors)
    matches = xp.full((len(gt_boxes), anchors.shape[0]), BACKGROUND, dtype=xp.int64, device=anchors.device)
    images = [n for n, gt in enumerate(gt_boxes) if gt.shape[0]]
    if not images:
        return matches
    calls = [(anchors, gt_boxes[n]) for n in images]
    best_iou, best_gt, gt_best = zip(*best_matches.each(calls), strict=True)
    claimed = xp.zeros((), dtype=xp.bool, device=anchors.device)
    if config.low_quality:
        calls = [(*call, _claims(best, config)) for call, best in zip(calls, gt_best, strict=True)]
        claimed = xp.stack(claimed_anchors.each(calls))
    decided = _decide(xp.stack(best_iou), xp.stack(best_gt), claimed, config)
    for place, image in enumerate(images):
        matches[image, :] = decided[place, :]
    return matches


def assign_from_iou(iou: Array, config: MatcherConfig) -> Array:
    """`assign` from a matrix of overlaps: the definition written out, for chapters and tests.

    Shapes:
        iou: (G, R) with G >= 1
        returns: (R,) int64: index of an object, BACKGROUND or IGNORE
    Source: RetinaNet, arXiv:1708.02002, section 4 "Anchors".
    """
    xp = backend.namespace(iou)
    best_gt = xp.astype(xp.argmax(iou, axis=0), xp.int64)
    claimed = xp.zeros_like(best_gt, dtype=xp.bool)
    if config.low_quality:
        claimed = xp.any(iou == _claims(xp.max(iou, axis=1), config)[:, None], axis=0)
    return _decide(xp.max(iou, axis=0), best_gt, claimed, config)


def _claims(gt_best: Array, config: MatcherConfig) -> Array:
    """The IoU with which each object claims anchors; -1, which no anchor has, where it may claim none."""
    xp = backend.namespace(gt_best)
    return gt_best if config.zero_iou else xp.where(gt_best > 0, gt_best, -xp.ones_like(gt_best))


def _decide(best_iou: Array, best_gt: Array, claimed: Array, config: MatcherConfig) -> Array:
    xp = backend.namespace(best_iou)
    background, ignore = (xp.full((), n, dtype=xp.int64, device=best_gt.device) for n in (BACKGROUND, IGNORE))
    others = xp.where(best_iou < config.low, background, ignore)
    return xp.where(claimed | (best_iou >= config.high), best_gt, others)
