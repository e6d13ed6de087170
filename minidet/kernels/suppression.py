"""Non-maximum suppression: of boxes that overlap too much, keep the best."""

from __future__ import annotations

import numpy as np

from minidet import backend
from minidet.kernels.boxes import iou_of, pairwise_iou
from minidet.kernels.compiler import compiled
from minidet.kernels.kernel import Kernel
from minidet.kernels.parallel import parallel


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


@nms.faster_on("numpy", when=lambda boxes, *_: boxes.dtype.kind == "f")
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


@batched_nms.faster_on("numpy", when=lambda boxes, *_: boxes.dtype.kind == "f")
def _batched_nms_numba(boxes, scores, labels, iou_threshold: float):
    order = np.argsort(-scores)
    if not (np.diff(scores[order]) < 0).all():  # a stable sort is slower, and needed only at ties
        order = np.argsort(-scores, kind="stable")
    # The largest number of this type that is not above: an IoU of this type is above both or above neither.
    threshold = boxes.dtype.type(iou_threshold)
    if float(threshold) > iou_threshold:
        threshold = np.nextafter(threshold, -np.inf, dtype=boxes.dtype)
    ends = np.cumsum(np.bincount(labels))
    rivals, alive = np.empty(len(order), np.int64), np.zeros(len(order), np.bool_)
    kept = np.zeros((len(order) // _LANES + len(ends), 5, _LANES), boxes.dtype)
    _by_class(order, labels, np.concatenate([[0], ends[:-1]]), rivals)
    _greedy(len(ends), np.ascontiguousarray(boxes), order, rivals, threshold, ends, kept, alive)
    return order[alive]


@compiled
def _by_class(order, labels, next_of_class, rivals):
    """Where in `order` the boxes of class 0 are, then those of class 1, ..., each class best first."""
    for place in range(len(order)):
        k = labels[order[place]]
        rivals[next_of_class[k]] = place
        next_of_class[k] += 1


_LANES = 16  # kept boxes that a box is compared with at once


@parallel(error_model="numpy")
def _greedy(k, boxes, order, rivals, iou_threshold, ends, kept, alive):
    """Walk the boxes of class k, best first; each that overlaps none of those kept so far is kept.

    Of those, corners and area lie in blocks of _LANES, and a box is compared with a whole block without branches, so
    that the compiler makes vector instructions of it; a lane still empty is a box without area and overlaps nothing.
    """
    start = ends[k - 1] if k > 0 else 0
    mine = kept[start // _LANES + k :]  # however many lanes of the classes before remain empty
    count = 0
    for place in rivals[start : ends[k]]:
        i = order[place]
        x1, y1, x2, y2 = boxes[i, 0], boxes[i, 1], boxes[i, 2], boxes[i, 3]
        area = (x2 - x1) * (y2 - y1)
        dropped = False
        for b in range(-(-count // _LANES)):
            for j in range(_LANES):
                u1, v1, u2, v2 = mine[b, 0, j], mine[b, 1, j], mine[b, 2, j], mine[b, 3, j]
                iou = iou_of(u1, v1, u2, v2, mine[b, 4, j], x1, y1, x2, y2, area)
                dropped |= iou > iou_threshold
            if dropped:
                break
        if not dropped:
            b, j = count // _LANES, count % _LANES
            mine[b, 0, j], mine[b, 1, j], mine[b, 2, j], mine[b, 3, j], mine[b, 4, j] = x1, y1, x2, y2, area
            alive[place] = True
            count += 1
