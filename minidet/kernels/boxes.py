"""Overlap of boxes, and the best overlaps between all anchors and all objects of an image."""

from __future__ import annotations

import numpy as np

from minidet import backend
from minidet.kernels import cuda
from minidet.kernels.compiler import compiled, inner
from minidet.kernels.kernel import Kernel

_LANES = 128  # anchors that the fast version handles side by side


def areas(boxes):
    """Area of every box.

    Shapes:
        boxes: (M, 4)
        returns: (M,)
    Units: (x2 - x1) * (y2 - y1), no "+ 1".
    """
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise_iou(boxes1, boxes2):
    """Intersection over union of every box with every other.

    Shapes:
        boxes1: (R, 4)
        boxes2: (G, 4)
        returns: (R, G), in [0, 1]
    Rule: two boxes that are both empty have IoU 0, not 0/0.
    """
    xp = backend.namespace(boxes1)
    corner1 = xp.maximum(boxes1[:, None, :2], boxes2[None, :, :2])
    corner2 = xp.minimum(boxes1[:, None, 2:], boxes2[None, :, 2:])
    sides = corner2 - corner1
    sides = xp.where(sides > 0, sides, xp.zeros_like(sides))
    intersection = sides[..., 0] * sides[..., 1]
    union = areas(boxes1)[:, None] + areas(boxes2)[None, :] - intersection
    return intersection / xp.where(union > 0, union, xp.ones_like(union))


@Kernel
def best_matches(anchors, gt):
    """For every anchor the object it overlaps best, and for every object its best overlap.

    Shapes:
        anchors: (R, 4)
        gt: (G, 4) with G >= 1
        returns: best_iou (R,), best_gt (R,) int64, gt_best (G,)
    Ties: of equal overlaps the first object wins; an anchor that overlaps nothing has best_gt 0, best_iou 0.
    """
    xp = backend.namespace(anchors)
    iou = pairwise_iou(anchors, gt)
    best_gt = xp.astype(xp.argmax(iou, axis=1), xp.int64)
    return xp.max(iou, axis=1), best_gt, xp.max(iou, axis=0)


@best_matches.faster_on("numpy", when=lambda anchors, gt: anchors.dtype == gt.dtype)
def _best_matches_numba(anchors, gt):
    lanes = side_by_side(anchors)
    best_iou, best_gt = np.zeros(lanes.shape[1:], gt.dtype), np.zeros(lanes.shape[1:], np.int64)
    gt_best = np.zeros((len(gt), _LANES), gt.dtype)
    match_all(lanes, gt, 0, len(gt), best_iou, best_gt, gt_best)
    best_iou, best_gt = (a.reshape(-1)[: len(anchors)] for a in (best_iou, best_gt))
    return best_iou, best_gt, gt_best.max(axis=1)


@best_matches.faster_on("cupy", when=lambda anchors, gt: anchors.dtype == gt.dtype)
def _best_matches_cuda(anchors, gt):
    xp, R, dtype = backend.namespace(anchors), anchors.shape[0], anchors.dtype
    best_iou, best_gt = xp.empty(R, dtype=dtype), xp.empty(R, dtype=xp.int64)
    gt_best = xp.zeros(gt.shape[0], dtype=dtype)
    arguments = cuda.contiguous(anchors), cuda.contiguous(gt), best_iou, best_gt, gt_best, R, gt.shape[0]
    cuda.launch(__file__, "best_matches", R, *arguments, real=dtype)
    return best_iou, best_gt, gt_best


@Kernel
def claimed_anchors(anchors, gt, gt_best):
    """Whether an anchor overlaps some object exactly as much as that object's given value.

    With `gt_best` of `best_matches` these are the best anchors of the objects, all of them where several tie.

    Shapes:
        anchors: (R, 4)
        gt: (G, 4)
        gt_best: (G,)
        returns: (R,) bool
    """
    xp = backend.namespace(anchors)
    return xp.any(pairwise_iou(anchors, gt) == gt_best[None, :], axis=1)


@claimed_anchors.faster_on("cupy", when=lambda anchors, gt, _: anchors.dtype == gt.dtype)
def _claimed_anchors_cuda(anchors, gt, gt_best):
    xp, R = backend.namespace(anchors), anchors.shape[0]
    claimed = xp.empty(R, dtype=xp.bool)
    arguments = cuda.contiguous(anchors), cuda.contiguous(gt), gt_best, claimed, R, gt.shape[0]
    cuda.launch(__file__, "claimed_anchors", R, *arguments, real=anchors.dtype)
    return claimed


_ZERO = np.float32(0)  # with an integer 0 Numba would compute in float64


@inner(forceinline=True, error_model="numpy")
def iou_of(x1, y1, x2, y2, area, u1, v1, u2, v2, other_area):
    """IoU of two boxes given by corners and area, rounded exactly as `pairwise_iou` rounds it."""
    intersection = max(min(x2, u2) - max(x1, u1), _ZERO) * max(min(y2, v2) - max(y1, v1), _ZERO)
    union = area + other_area - intersection
    return intersection / union if intersection > _ZERO else _ZERO


def side_by_side(anchors):
    """Anchors (R, 4) by coordinate, block and lane; the last block ends with boxes that overlap nothing."""
    columns = np.zeros((4, -(-len(anchors) // _LANES), _LANES), anchors.dtype)
    columns.reshape(4, -1)[:, : len(anchors)] = anchors.T
    return columns


# The loops over anchors store choices (`a if better else b`) instead of branching, so that they become vector
# instructions.  A maximum over all of them would not, for its order is fixed: hence one for each lane.


@compiled(nogil=True, error_model="numpy")
def match_all(anchors, objects, begin, end, best_iou, best_gt, gt_best):
    """`best_matches` of some of the objects, numbered from 0.

    `best_iou` and `best_gt` are (block, lane), `gt_best` (object, lane): all zeros at first.
    """
    for g in range(begin, end):
        u1, v1, u2, v2 = objects[g, 0], objects[g, 1], objects[g, 2], objects[g, 3]
        area, number, most = (u2 - u1) * (v2 - v1), g - begin, gt_best[g - begin]
        for b in range(anchors.shape[1]):
            best, chosen = best_iou[b], best_gt[b]
            for r in range(_LANES):
                x1, y1, x2, y2 = anchors[0, b, r], anchors[1, b, r], anchors[2, b, r], anchors[3, b, r]
                iou = iou_of(x1, y1, x2, y2, (x2 - x1) * (y2 - y1), u1, v1, u2, v2, area)
                better = iou > best[r]
                best[r] = iou if better else best[r]
                chosen[r] = number if better else chosen[r]
                most[r] = iou if iou > most[r] else most[r]


@compiled(nogil=True, error_model="numpy")
def claim(anchors, box, best, claimed):
    """Mark the anchors, (block, lane), that overlap one object just so much."""
    u1, v1, u2, v2 = box[0], box[1], box[2], box[3]
    area = (u2 - u1) * (v2 - v1)
    for b in range(anchors.shape[1]):
        for r in range(_LANES):
            x1, y1, x2, y2 = anchors[0, b, r], anchors[1, b, r], anchors[2, b, r], anchors[3, b, r]
            iou = iou_of(x1, y1, x2, y2, (x2 - x1) * (y2 - y1), u1, v1, u2, v2, area)
            claimed[b, r] |= iou == best
