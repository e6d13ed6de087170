"""From the network's outputs to a short list of boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minidet.detection.coder import CoderConfig, decode_boxes
from minidet.kernels import batched_nms

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
    logits: np.ndarray,
    deltas: np.ndarray,
    anchors: np.ndarray,
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
    return [
        _one_image(logits[n], deltas[n], anchors, level_counts, image_sizes[n], config, coder)
        for n in range(len(logits))
    ]


def _one_image(logits, deltas, anchors, level_counts, image_size, config, coder) -> Detections:
    _, found = candidates(logits, deltas, anchors, level_counts, image_size, config, coder)
    keep = batched_nms(found.boxes, found.scores, found.labels, config.nms_threshold)
    found = found.take(keep[: config.max_detections])
    if config.clip == "after_nms":
        found = clip(found, image_size)
    return drop_empty(found) if config.drop_empty else found


def candidates(logits, deltas, anchors, level_counts, image_size, config, coder) -> tuple[np.ndarray, Detections]:
    """What goes into the suppression of one image, and which anchor each box came from.

    Shapes:
        logits: (R, K)
        deltas: (R, 4)
        anchors: (R, 4)
        returns: (D,) int64, and D detections, level by level
    Source: RetinaNet, arXiv:1708.02002, section 4.1 "Inference".
    """
    K = logits.shape[1]
    pairs, scores, start = [], [], 0
    for count in level_counts:
        level_pairs, level_scores = _best_pairs(logits[start : start + count].reshape(-1), config)
        pairs.append(start * K + level_pairs)
        scores.append(level_scores)
        start += count
    rows, labels = np.divmod(np.concatenate(pairs), K)
    found = Detections(decode_boxes(deltas[rows], anchors[rows], coder), np.concatenate(scores), labels)
    if config.clip == "before_nms":
        found = clip(found, image_size)
    return rows, found


def clip(found: Detections, image_size: tuple[int, int]) -> Detections:
    """Boxes cut at the borders of an image of (height, width)."""
    height, width = image_size
    limits = np.asarray([width, height, width, height], found.boxes.dtype)
    return Detections(np.clip(found.boxes, 0, limits), found.scores, found.labels)


def drop_empty(found: Detections) -> Detections:
    """Without the boxes whose width or height is 0."""
    sides = found.boxes[:, 2:] - found.boxes[:, :2]
    return found.take(np.flatnonzero((sides > 0).all(axis=1)))


def _best_pairs(logits: np.ndarray, config: PostprocessConfig) -> tuple[np.ndarray, np.ndarray]:
    """Positions and probabilities of one level's best (anchor, class) pairs, best first."""
    # Few of millions pass: compare logits with a threshold that is surely too low, and apply the exact rule,
    # on probabilities, to those few.
    t = config.score_threshold
    surely = -math.inf if t <= 0 else math.log(t / (1 - t)) - 0.01
    pairs = np.flatnonzero(logits > surely)
    tail = np.exp(-np.abs(logits[pairs]))
    scores = np.where(logits[pairs] >= 0, 1 / (1 + tail), tail / (1 + tail))
    above = scores > t
    pairs, scores = pairs[above], scores[above]
    if len(pairs) > config.top_k:
        rows = _largest(scores, config.top_k)
        pairs, scores = pairs[rows], scores[rows]
    order = np.argsort(-scores, kind="stable")
    return pairs[order], scores[order]


def _largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Positions of the `count` largest, ascending; of equal ones at the limit the first."""
    limit = np.partition(scores, len(scores) - count)[len(scores) - count]
    above, equal = np.flatnonzero(scores > limit), np.flatnonzero(scores == limit)
    return np.sort(np.concatenate([above, equal[: count - len(above)]]))
