"""Overlap of boxes, and the best overlaps between all anchors and all objects of an image."""

from __future__ import annotations

import numpy as np
from numba import njit

from minidet import backend
from minidet.kernels.kernel import Kernel


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
    return xp.where(intersection > 0, intersection / xp.where(union > 0, union, xp.ones_like(union)), 0 * union)


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
    best_iou = np.zeros(len(anchors), anchors.dtype)
    best_gt = np.zeros(len(anchors), np.int64)
    gt_best = np.zeros(len(gt), anchors.dtype)
    _best_matches(_columns(anchors), gt, best_iou, best_gt, gt_best)
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
    _claimed_anchors(_columns(anchors), gt, gt_best, claimed)
    return claimed


def _columns(boxes):
    """(M, 4) -> (4, M), contiguous: a loop over anchors then reads each coordinate in order."""
    return np.ascontiguousarray(boxes.T)


@njit(inline="always")
def iou_of(x1, y1, x2, y2, area, u1, v1, u2, v2, other_area):
    """IoU of two boxes given by their corners and areas, rounded as `pairwise_iou` rounds it."""
    width = min(x2, u2) - max(x1, u1)
    height = min(y2, v2) - max(y1, v1)
    if width > 0 and height > 0:
        intersection = width * height
        if intersection > 0:  # the product of two tiny sides may be 0
            return intersection / (area + other_area - intersection)
    return 0 * area


@njit(cache=True, nogil=True)
def _best_matches(anchors, gt, best_iou, best_gt, gt_best):
    X1, Y1, X2, Y2 = anchors
    for g in range(len(gt)):
        u1, v1, u2, v2 = gt[g]
        area = (u2 - u1) * (v2 - v1)
        for r in range(len(best_iou)):
            x1, y1, x2, y2 = X1[r], Y1[r], X2[r], Y2[r]
            iou = iou_of(x1, y1, x2, y2, (x2 - x1) * (y2 - y1), u1, v1, u2, v2, area)
            if iou > best_iou[r]:
                best_iou[r] = iou
                best_gt[r] = g
            if iou > gt_best[g]:
                gt_best[g] = iou


@njit(cache=True, nogil=True)
def _claimed_anchors(anchors, gt, gt_best, claimed):
    X1, Y1, X2, Y2 = anchors
    for g in range(len(gt)):
        u1, v1, u2, v2 = gt[g]
        area = (u2 - u1) * (v2 - v1)
        for r in range(len(claimed)):
            x1, y1, x2, y2 = X1[r], Y1[r], X2[r], Y2[r]
            iou = iou_of(x1, y1, x2, y2, (x2 - x1) * (y2 - y1), u1, v1, u2, v2, area)
            if iou == gt_best[g]:
                claimed[r] = True
