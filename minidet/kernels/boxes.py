"""Overlap of boxes, and the best overlaps between all anchors and all objects of an image."""

from __future__ import annotations

import numpy as np
from numba import njit

from minidet import backend
from minidet.kernels import cuda
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
    R, dtype = len(anchors), anchors.dtype
    columns = np.zeros((4, -(-R // _LANES), _LANES), dtype)  # filled up with boxes that overlap nothing
    columns.reshape(4, -1)[:, :R] = anchors.T
    best_iou, best_gt = np.zeros(columns.shape[1:], dtype), np.zeros(columns.shape[1:], np.int64)
    gt_best = np.zeros((len(gt), _LANES), dtype)
    _best_matches(columns, np.array(gt, order="C"), best_iou, best_gt, gt_best)
    return best_iou.reshape(-1)[:R], best_gt.reshape(-1)[:R], gt_best.max(axis=1)


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


@claimed_anchors.faster_on("numpy", when=lambda anchors, gt, _: anchors.dtype == gt.dtype)
def _claimed_anchors_numba(anchors, gt, gt_best):
    claimed = np.zeros(len(anchors), np.bool_)
    _claimed_anchors(np.array(anchors.T, order="C"), np.array(gt, order="C"), gt_best, claimed)
    return claimed


@claimed_anchors.faster_on("cupy", when=lambda anchors, gt, _: anchors.dtype == gt.dtype)
def _claimed_anchors_cuda(anchors, gt, gt_best):
    xp, R = backend.namespace(anchors), anchors.shape[0]
    claimed = xp.empty(R, dtype=xp.bool)
    arguments = cuda.contiguous(anchors), cuda.contiguous(gt), gt_best, claimed, R, gt.shape[0]
    cuda.launch(__file__, "claimed_anchors", R, *arguments, real=anchors.dtype)
    return claimed


_ZERO = np.float32(0)  # with an integer 0 Numba would compute in float64


@njit(forceinline=True, error_model="numpy")
def iou_of(x1, y1, x2, y2, area, u1, v1, u2, v2, other_area):
    """IoU of two boxes given by corners and area, rounded exactly as `pairwise_iou` rounds it."""
    intersection = max(min(x2, u2) - max(x1, u1), _ZERO) * max(min(y2, v2) - max(y1, v1), _ZERO)
    union = area + other_area - intersection
    return intersection / union if intersection > _ZERO else _ZERO


# The loops over anchors store choices (`a if better else b`) instead of branching, so that they become vector
# instructions.  A maximum over all of them would not, for its order is fixed: hence one for each lane.


@njit(cache=True, nogil=True, error_model="numpy")
def _best_matches(anchors, gt, best_iou, best_gt, gt_best):
    for g in range(len(gt)):
        u1, v1, u2, v2 = gt[g, 0], gt[g, 1], gt[g, 2], gt[g, 3]
        area = (u2 - u1) * (v2 - v1)
        for b in range(len(best_iou)):
            for r in range(_LANES):
                x1, y1, x2, y2 = anchors[0, b, r], anchors[1, b, r], anchors[2, b, r], anchors[3, b, r]
                iou = iou_of(x1, y1, x2, y2, (x2 - x1) * (y2 - y1), u1, v1, u2, v2, area)
                better = iou > best_iou[b, r]
                best_iou[b, r] = iou if better else best_iou[b, r]
                best_gt[b, r] = g if better else best_gt[b, r]
                gt_best[g, r] = iou if iou > gt_best[g, r] else gt_best[g, r]


@njit(cache=True, nogil=True, error_model="numpy")
def _claimed_anchors(anchors, gt, gt_best, claimed):
    X1, Y1, X2, Y2 = anchors[0], anchors[1], anchors[2], anchors[3]
    for g in range(len(gt)):
        u1, v1, u2, v2, best = gt[g, 0], gt[g, 1], gt[g, 2], gt[g, 3], gt_best[g]
        area = (u2 - u1) * (v2 - v1)
        for r in range(len(claimed)):
            x1, y1, x2, y2 = X1[r], Y1[r], X2[r], Y2[r]
            iou = iou_of(x1, y1, x2, y2, (x2 - x1) * (y2 - y1), u1, v1, u2, v2, area)
            claimed[r] |= iou == best
