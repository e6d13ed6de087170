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


@best_matches.faster_on("numpy", when=lambda anchors, gt: anchors.dtype == gt.dtype, many=True)
def _best_matches_numba(calls):
    anchors, gt, ends = _images(calls)
    if anchors is None:
        return None
    best_iou, best_gt = (np.zeros((len(calls), *anchors.shape[1:]), kind) for kind in (gt.dtype, np.int64))
    gt_best = np.zeros((len(gt), _LANES), gt.dtype)
    _best_matches(anchors, gt, ends, best_iou, best_gt, gt_best)
    best_iou, best_gt = (a.reshape(len(calls), -1)[:, : len(calls[0][0])] for a in (best_iou, best_gt))
    return list(zip(best_iou, best_gt, np.split(gt_best.max(axis=1), ends[1:-1]), strict=True))


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


@claimed_anchors.faster_on("numpy", when=lambda anchors, gt, _: anchors.dtype == gt.dtype, many=True)
def _claimed_anchors_numba(calls):
    anchors, gt, ends = _images(calls)
    if anchors is None:
        return None
    claimed = np.zeros((len(calls), *anchors.shape[1:]), np.bool_)
    _claimed_anchors(anchors, gt, ends, np.concatenate([call[2] for call in calls]), claimed)
    return list(claimed.reshape(len(calls), -1)[:, : len(calls[0][0])])


def _images(calls):
    """Anchors by coordinate and lane, None if not all calls have the same; all objects; where each call's begin."""
    anchors, objects = calls[0][0], [call[1] for call in calls]
    columns = np.zeros((4, -(-len(anchors) // _LANES), _LANES), anchors.dtype)  # ends with boxes that overlap nothing
    columns.reshape(4, -1)[:, : len(anchors)] = anchors.T
    alike = all(call[0] is anchors and call[1].dtype == anchors.dtype for call in calls)
    return columns if alike else None, np.concatenate(objects), np.cumsum([0, *map(len, objects)])


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


# The loops over anchors store choices (`a if better else b`) instead of branching, so that they become vector
# instructions.  A maximum over all of them would not, for its order is fixed: hence one for each lane.


@compiled(nogil=True, error_model="numpy")
def _best_matches(anchors, gt, ends, best_iou, best_gt, gt_best):
    for n in range(len(best_iou)):
        for g in range(ends[n], ends[n + 1]):
            u1, v1, u2, v2 = gt[g, 0], gt[g, 1], gt[g, 2], gt[g, 3]
            area, number, most = (u2 - u1) * (v2 - v1), g - ends[n], gt_best[g]
            for b in range(anchors.shape[1]):
                best, chosen = best_iou[n, b], best_gt[n, b]
                for r in range(_LANES):
                    x1, y1, x2, y2 = anchors[0, b, r], anchors[1, b, r], anchors[2, b, r], anchors[3, b, r]
                    iou = iou_of(x1, y1, x2, y2, (x2 - x1) * (y2 - y1), u1, v1, u2, v2, area)
                    better = iou > best[r]
                    best[r] = iou if better else best[r]
                    chosen[r] = number if better else chosen[r]
                    most[r] = iou if iou > most[r] else most[r]


@compiled(nogil=True, error_model="numpy")
def _claimed_anchors(anchors, gt, ends, gt_best, claimed):
    for n in range(len(claimed)):
        for g in range(ends[n], ends[n + 1]):
            u1, v1, u2, v2, best = gt[g, 0], gt[g, 1], gt[g, 2], gt[g, 3], gt_best[g]
            area = (u2 - u1) * (v2 - v1)
            for b in range(anchors.shape[1]):
                for r in range(_LANES):
                    x1, y1, x2, y2 = anchors[0, b, r], anchors[1, b, r], anchors[2, b, r], anchors[3, b, r]
                    iou = iou_of(x1, y1, x2, y2, (x2 - x1) * (y2 - y1), u1, v1, u2, v2, area)
                    claimed[n, b, r] |= iou == best
