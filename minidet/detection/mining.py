"""Hard example mining: to learn from the few anchors that are most wrong, and to drop all others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minidet import backend
from minidet.backend import Array
from minidet.kernels import focal_terms, nms
from minidet.kernels.focal import BACKGROUND, IGNORE


@dataclass(frozen=True)
class MiningConfig:
    """OHEM, which the paper compares the focal loss with.

    Source: RetinaNet, arXiv:1708.02002, section 5.1 "Online Hard Example Mining" and table 1d; Shrivastava et
        al., arXiv:1604.03540.
    """

    batch: int = 128
    """How many anchors of an image are learned from, at most."""
    nms: float = 0.5
    """IoU above which, of two anchors, only that with the larger loss is an example."""
    ratio: int | None = None
    """Background anchors for every positive one: 3 is the table's "OHEM 1:3", as in SSD.  None: the hardest
    of both kinds."""

    def __post_init__(self):
        if self.batch < 1 or not 0 <= self.nms <= 1:
            raise ValueError(f"mining: needs batch >= 1 and 0 <= nms <= 1, got {self.batch} and {self.nms}")
        if self.ratio is not None and not 1 <= self.ratio < self.batch:
            raise ValueError(f"mining: ratio must be at least 1 and below batch, or None, got {self.ratio}")


def hard_labels(
    logits: Array, labels: Array, anchors: Array, config: MiningConfig, *, alpha: float | None, gamma: float
) -> np.ndarray:
    """The labels with every anchor ignored that is not among its image's hard examples, which the host looks for.

    An example is scored by its classification loss, summed over the classes.

    Shapes:
        logits: (N, R, K)
        labels: (N, R) int64
        anchors: (R, 4)
        returns: (N, R) int64
    Source: RetinaNet, arXiv:1708.02002, section 5.1 "Online Hard Example Mining".
    Differs: the paper names neither the boxes that are suppressed nor the batch's unit: here an example's box
        is its anchor, and the batch is one image's.
    """
    xp, (N, _, K) = backend.namespace(logits), logits.shape
    labels, anchors = (xp.asarray(a, device=logits.device) for a in (labels, anchors))
    classes, rows = xp.arange(K, device=logits.device), []
    for n in range(N):  # an image at a time: a batch of these would be as large as all activations
        terms, _ = focal_terms(logits[n, ...], labels[n, :, None] == classes, alpha, gamma)
        rows.append(xp.sum(terms, axis=1))
    # Everything in one copy, and so one wait for a device; float64 holds all of it exactly.
    there = [xp.stack(rows), labels, xp.matrix_transpose(anchors)]
    here = backend.to_numpy(xp.concat([xp.astype(part, xp.float64) for part in there]))
    losses, own = here[:N], here[N : 2 * N].astype(np.int64)
    corners = np.ascontiguousarray(here[2 * N :].T, np.float32 if anchors.dtype == xp.float32 else np.float64)
    hard = np.full_like(own, IGNORE)
    for n in range(N):
        chosen = hard_examples(losses[n], own[n], corners, config)
        hard[n, chosen] = own[n, chosen]
    return hard


def hard_examples(losses: np.ndarray, labels: np.ndarray, anchors: np.ndarray, config: MiningConfig) -> np.ndarray:
    """The anchors that one image is learned from: suppress by loss, then take the hardest.

    Shapes:
        losses: (R,)
        labels: (R,) int64
        anchors: (R, 4)
        returns: (M,) int64 rows, M <= config.batch
    Rule: an anchor is dropped when its IoU with one of larger loss that was kept is > config.nms.  With a
        ratio, first the hardest positives, at most batch / (1 + ratio), then `ratio` negatives for each; an
        image without objects has no examples then.
    Ties: of equal losses the lower row goes first.
    Source: RetinaNet, arXiv:1708.02002, section 5.1 "Online Hard Example Mining".
    """
    order = np.argsort(-losses, kind="stable")
    order = order[labels[order] != IGNORE]
    positives_in_all = np.count_nonzero(labels >= 0)
    seen = 4 * config.batch
    while True:
        # What the hardest suppress does not depend on the rest: seldom must all anchors be compared.
        head = order[:seen]
        kept = head[nms(anchors[head], losses[head], config.nms)]
        if config.ratio is None:
            chosen, complete = kept[: config.batch], len(kept) >= config.batch
        else:
            most = config.batch // (1 + config.ratio)
            positives, negatives = kept[labels[kept] >= 0], kept[labels[kept] == BACKGROUND]
            wanted = config.ratio * min(len(positives), most)
            chosen = np.concatenate([positives[:most], negatives[:wanted]])
            all_seen = len(positives) >= most or np.count_nonzero(labels[head] >= 0) == positives_in_all
            complete = all_seen and len(negatives) >= wanted
        if complete or seen >= len(order):
            return chosen
        seen *= 4
