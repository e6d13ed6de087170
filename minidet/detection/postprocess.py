"""From the network's outputs to a short list of boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minidet import backend
from minidet.backend import Array
from minidet.detection.coder import CoderConfig, decode_boxes
from minidet.kernels import batched_nms, best_pairs

CLIPS = ("before_nms", "after_nms", "never")


@dataclass(frozen=True)
class PostprocessConfig:
    """Which of all scores become detections.

    Source: RetinaNet, arXiv:1708.02002, section 4.1 "Inference", unless a field says otherwise.
    """

    score_threshold: float = 0.05
    """A probability; pairs of anchor and class with more than this go on: >."""
    top_k: int = 1000
    """How many pairs a pyramid level may send on."""
    nms_threshold: float = 0.5
    """IoU above which the box with the lower score is dropped: >."""
    max_detections: int = 100
    """Per image; the paper does not say, COCO's evaluation counts 100."""
    clip: str = "before_nms"
    """One of CLIPS: when boxes are cut at the borders of the image (torchvision before, detectron2 after)."""
    drop_empty: bool = False
    """Whether boxes without area are dropped at the very end (detectron2)."""

    def __post_init__(self):
        if self.clip not in CLIPS:
            raise ValueError(f"postprocess: clip must be one of {', '.join(CLIPS)}, got {self.clip!r}")
        if not (0 <= self.score_threshold < 1 and 0 <= self.nms_threshold <= 1):
            raise ValueError(f"postprocess: thresholds must lie in [0, 1], got {self}")
        if self.top_k < 1 or self.max_detections < 1:
            raise ValueError(f"postprocess: top_k and max_detections must be at least 1, got {self}")


@dataclass(frozen=True)
class Detections:
    """The objects found in one image, best score first.

    Shapes:
        boxes: (D, 4)
        scores: (D,)
        labels: (D,) int64, contiguous classes
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, rows: np.ndarray) -> Detections:
        """The detections at these positions, in this order."""
        return Detections(self.boxes[rows], self.scores[rows], self.labels[rows])


def postprocess(
    logits: Array,
    deltas: Array,
    anchors: Array,
    level_counts: Sequence[int],
    image_sizes: Sequence[tuple[int, int]],
    config: PostprocessConfig,
    coder: CoderConfig,
) -> list[Detections]:
    """The detections of every image of a batch.

    Per level: probabilities above the threshold, the top k pairs of (anchor, class), their boxes.  Then all
    levels together: non-maximum suppression per class, and the best of the survivors.

    Shapes:
        logits: (N, R, K)
        deltas: (N, R, 4)
        anchors: (R, 4)
        level_counts: L numbers that add up to R
        image_sizes: N pairs (height, width)
    Units: boxes and sizes in pixels of the network input; the size is that of the image without padding.
    Ties: of equal scores the lower level, then the lower anchor, then the lower class goes first.
    Source: RetinaNet, arXiv:1708.02002, section 4.1 "Inference".
    """
    found = candidates(logits, deltas, anchors, level_counts, image_sizes, config, coder)
    return [_survivors(one, size, config) for (_, one), size in zip(found, image_sizes, strict=True)]


def _survivors(found: Detections, image_size: tuple[int, int], config: PostprocessConfig) -> Detections:
    keep = batched_nms(found.boxes, found.scores, found.labels, config.nms_threshold)
    found = found.take(keep[: config.max_detections])
    if config.clip == "after_nms":
        found = clip(found, image_size)
    return drop_empty(found) if config.drop_empty else found


def candidates(
    logits, deltas, anchors, level_counts, image_sizes, config, coder
) -> list[tuple[np.ndarray, Detections]]:
    """What goes into the suppression of each image, and which anchor each box came from.

    A device finds them, and sends all at once: who suppresses whom, one box after the other, the host decides.

    Shapes:
        logits: (N, R, K)
        deltas: (N, R, 4)
        anchors: (R, 4)
        returns: for each image (D,) int64, and D detections, level by level
    Source: RetinaNet, arXiv:1708.02002, section 4.1 "Inference".
    """
    xp, (N, R, K) = backend.namespace(logits), logits.shape
    pairs, scores, start = [], [], 0
    for count in level_counts:
        level = xp.reshape(logits[:, start : start + count, :], (N, count * K))
        positions, best = best_pairs(level, config.score_threshold, config.top_k)
        pairs.append(positions + start * K)
        scores.append(best)
        start += count
    pairs, scores = xp.concat(pairs, axis=1), xp.concat(scores, axis=1)
    if xp is np:  # which sees, without waiting, the places that no image fills
        filled = np.any(scores > 0, axis=0)
        pairs, scores = pairs[:, filled], scores[:, filled]
    rows, device = pairs // K, logits.device
    places = rows + R * xp.arange(N, dtype=xp.int64, device=device)[:, None]
    moved = xp.take(xp.reshape(deltas, (N * R, 4)), xp.reshape(places, (-1,)), axis=0)
    fixed = xp.take(xp.asarray(anchors, device=device), xp.reshape(rows, (-1,)), axis=0)
    boxes = xp.reshape(decode_boxes(moved, fixed, coder), (*rows.shape, 4))
    # One array, and so one copy: rows and classes are numbers that a float32 holds exactly, being below 2^24.
    columns = [xp.astype(part, boxes.dtype)[:, :, None] for part in (scores, rows, pairs % K)]
    result = []
    for one, size in zip(backend.to_numpy(xp.concat([boxes, *columns], axis=2)), image_sizes, strict=True):
        one = one[one[:, 4] > 0]
        found = Detections(one[:, :4].copy(), one[:, 4].copy(), one[:, 6].astype(np.int64))
        result.append((one[:, 5].astype(np.int64), clip(found, size) if config.clip == "before_nms" else found))
    return result


def clip(found: Detections, image_size: tuple[int, int]) -> Detections:
    """Boxes cut at the borders of an image of (height, width)."""
    height, width = image_size
    limits = np.asarray([width, height, width, height], found.boxes.dtype)
    return Detections(np.clip(found.boxes, 0, limits), found.scores, found.labels)


def drop_empty(found: Detections) -> Detections:
    """Without the boxes whose width or height is 0."""
    sides = found.boxes[:, 2:] - found.boxes[:, :2]
    return found.take(np.flatnonzero((sides > 0).all(axis=1)))
