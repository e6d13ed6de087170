"""Which anchor is responsible for which object."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from minidet import backend
from minidet.backend import Array
from minidet.kernels import best_matches, claimed_anchors
from minidet.kernels.boxes import claim, match_all, side_by_side
from minidet.kernels.focal import BACKGROUND, IGNORE
from minidet.kernels.kernel import Kernel
from minidet.kernels.parallel import parallel


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
    return assign_images(anchors, gt_boxes, (0, gt_boxes.shape[0]), config)[0, :]


@Kernel
def assign_images(anchors, objects, ends, config: MatcherConfig) -> Array:
    """`assign`, for all images of a batch at once.

    Shapes:
        anchors: (R, 4)
        objects: (M, 4), those of image n from ends[n] to below ends[n + 1]
        ends: N + 1 numbers
        returns: (N, R) int64
    Source: RetinaNet, arXiv:1708.02002, section 4 "Anchors".
    """
    xp = backend.namespace(anchors)
    matches = xp.full((len(ends) - 1, anchors.shape[0]), BACKGROUND, dtype=xp.int64, device=anchors.device)
    images = [n for n, (start, stop) in enumerate(pairwise(ends)) if start < stop]
    if not images:
        return matches
    calls = [(anchors, objects[ends[n] : ends[n + 1], :]) for n in images]
    best_iou, best_gt, gt_best = zip(*(best_matches(*call) for call in calls), strict=True)
    claimed = xp.zeros((), dtype=xp.bool, device=anchors.device)
    if config.low_quality:
        claimed = xp.stack([
            claimed_anchors(*call, _claims(best, config)) for call, best in zip(calls, gt_best, strict=True)
        ])
    decided = _decide(xp.stack(best_iou), xp.stack(best_gt), claimed, config)
    for place, image in enumerate(images):
        matches[image, :] = decided[place, :]
    return matches


def _where(claiming: bool):
    """The rule of a version: without objects there is nothing to do, and nothing to prove it by."""
    return lambda anchors, objects, ends, config: (
        config.low_quality == claiming and anchors.dtype == objects.dtype and ends[0] < ends[-1]
    )


# A version of its own where objects claim anchors, which is proved right with such a rule.
@assign_images.faster_on("numpy", "claiming", when=_where(claiming=True))
@assign_images.faster_on("numpy", when=_where(claiming=False))
def _assign_images_numba(anchors, objects, ends, config: MatcherConfig):
    matches, real = np.empty((len(ends) - 1, len(anchors)), np.int64), anchors.dtype.type
    _assign_image(
        len(matches), side_by_side(anchors), objects, np.asarray(ends), real(config.high), real(config.low),
        config.low_quality, config.zero_iou, matches,
    )  # fmt: skip
    return matches


@parallel(error_model="numpy")
def _assign_image(n, anchors, objects, ends, high, low, low_quality, zero_iou, matches):
    """`assign_from_iou` without its matrix."""
    begin, end, (_, blocks, lanes) = ends[n], ends[n + 1], anchors.shape
    if begin == end:
        matches[n] = BACKGROUND
        return
    best, chosen = np.zeros((blocks, lanes), anchors.dtype), np.zeros((blocks, lanes), np.int64)
    claimed, most = np.zeros((blocks, lanes), np.bool_), np.zeros((end - begin, lanes), anchors.dtype)
    match_all(anchors, objects, begin, end, best, chosen, most)
    for g in range(begin, end if low_quality else begin):
        value = most[g - begin].max()
        if value > 0 or zero_iou:
            claim(anchors, objects[g], value, claimed)
    for r in range(matches.shape[1]):
        place = r // lanes, r % lanes
        others = BACKGROUND if best[place] < low else IGNORE
        matches[n, r] = chosen[place] if claimed[place] or best[place] >= high else others


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
