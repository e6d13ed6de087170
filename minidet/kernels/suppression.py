"""Non-maximum suppression: of boxes that overlap too much, keep the best."""

from __future__ import annotations

import numpy as np
from numba import njit

from minidet import backend
from minidet.kernels.boxes import iou_of, pairwise_iou
from minidet.kernels.kernel import Kernel


@Kernel
def nms(boxes, scores, iou_threshold: float):
    """Keep the best box, drop everything that overlaps it too much, repeat.

    Shapes:
        boxes: (D, 4)
        scores: (D,)
        returns: (M,) int64 indices into boxes, best score first
    Units: boxes in pixels, areas without "+ 1".
    Ties: of equal scores the lower index goes first.
    Rule: a box is dropped when IoU > iou_threshold, strictly.  The IoU is computed in the boxes' dtype and
        compared as float64: float32 boxes with IoU 3/10 are dropped at 0.3, for float32(0.3) > 0.3.
    Source: RetinaNet, arXiv:1708.02002, section 4.1 "Inference" (threshold 0.5).
    """
    xp = backend.namespace(boxes)
    order = xp.argsort(-scores, stable=True)
    keep = []
    while order.shape[0] > 0:
        keep.append(int(order[0]))
        best = xp.take(boxes, order[:1], axis=0)
        order = order[1:]
        iou = pairwise_iou(best, xp.take(boxes, order, axis=0))[0, :]
        order = order[xp.astype(iou, xp.float64) <= iou_threshold]
    return xp.asarray(keep, dtype=xp.int64, device=boxes.device)


@nms.faster_on("numpy")
def _nms_numba(boxes, scores, iou_threshold: float):
    return _batched_nms_numba(boxes, scores, np.zeros(len(boxes), np.int64), iou_threshold)


@Kernel
def batched_nms(boxes, scores, labels, iou_threshold: float):
    """`nms` among the boxes of each class by itself.

    Shapes:
        boxes: (D, 4)
        scores: (D,)
        labels: (D,) int64, in 0..K-1
        returns: (M,) int64 indices into boxes, best score first
    Ties: of equal scores the lower index goes first, also between classes.
    Source: RetinaNet, arXiv:1708.02002, section 4.1 "Inference", which does not say "per class"; every
        implementation does.
    Differs: torchvision moves each class to a region of its own and runs one `nms` when there are few boxes;
        the shift costs bits of the coordinates, and so now and then a box.
    """
    xp = backend.namespace(boxes)
    kept = []
    for label in xp.unique_values(labels):
        (members,) = xp.nonzero(labels == label)
        kept.append(xp.take(members, nms(xp.take(boxes, members, axis=0), scores[members], iou_threshold)))
    if not kept:
        return xp.zeros(0, dtype=xp.int64, device=boxes.device)
    keep = xp.sort(xp.astype(xp.concat(kept), xp.int64))
    return xp.take(keep, xp.argsort(-xp.take(scores, keep), stable=True))


@batched_nms.faster_on("numpy")
def _batched_nms_numba(boxes, scores, labels, iou_threshold: float):
    order = np.argsort(-scores, kind="stable")
    ends = np.cumsum(np.bincount(labels))
    starts = np.concatenate([[0], ends]).astype(np.int64)
    keep = np.empty(len(order), np.int64)
    kept = np.empty((5, len(order)), boxes.dtype)
    # float64 by name: a Python float would be compared in the boxes' dtype.
    M = _greedy(np.ascontiguousarray(boxes), order, labels, np.float64(iou_threshold), starts, kept, keep)
    return keep[:M]


@njit(cache=True, nogil=True, error_model="numpy")
def _greedy(boxes, order, labels, iou_threshold, starts, kept, keep):
    """Walk the boxes by score; compare each with the boxes kept so far of its own class only.

    The kept boxes of class k, corners and area, lie in `kept` from starts[k] on; the number of all is returned.
    """
    ends = starts.copy()
    M = 0
    for i in order:
        k = labels[i]
        x1, y1, x2, y2 = boxes[i, 0], boxes[i, 1], boxes[i, 2], boxes[i, 3]
        area = (x2 - x1) * (y2 - y1)
        dropped = False
        for j in range(starts[k], ends[k]):
            iou = iou_of(kept[0, j], kept[1, j], kept[2, j], kept[3, j], kept[4, j], x1, y1, x2, y2, area)
            if iou > iou_threshold:
                dropped = True
                break
        if not dropped:
            j = ends[k]
            kept[0, j], kept[1, j], kept[2, j], kept[3, j], kept[4, j] = x1, y1, x2, y2, area
            ends[k] = j + 1
            keep[M] = i
            M += 1
    return M
