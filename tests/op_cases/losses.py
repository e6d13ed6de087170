"""Cases of ops/losses.py, with the formulas of the papers."""

from __future__ import annotations

from functools import partial

import numpy as np
from gradients import away_from

from minidet import ops
from minidet.kernels.focal import BACKGROUND, IGNORE
from op_cases.activation import sigmoid
from op_cases.case import Case, like, normal

TARGETS = np.asarray([[1, 0, 0], [0, 1, 1]])
LABELS = np.asarray([[0, 2, BACKGROUND, IGNORE], [BACKGROUND, BACKGROUND, 1, IGNORE]])
CENTER = np.asarray([[0.5, -1.0, 0.0], [2.0, 0.1, -0.3]])
OBJECTS = np.asarray(
    [[1.0, 1, 4, 4], [0.5, 0.5, 9, 9], [20, 1, 22, 4], [1.5, 30, 3, 33], [1, 2, 2, 5], [2, 2, 2.5, 2.25]]
)


def weights(targets, alpha):
    return 1.0 if alpha is None else np.where(targets, alpha, 1 - alpha)


def focal(x, targets, alpha, gamma):
    """RetinaNet, eq. (5): -alpha_t (1 - p_t)^gamma log p_t."""
    p = np.where(targets, sigmoid(x), 1 - sigmoid(x))
    return -weights(targets, alpha) * (1 - p) ** gamma * np.log(p)


def focal_sum(x, alpha, gamma):
    one_hot = LABELS[..., None] == np.arange(x.shape[2])
    return (focal(x, one_hot, alpha, gamma) * (LABELS != IGNORE)[..., None]).sum(axis=(1, 2))


def focal_star(x, alpha, gamma, beta):
    """RetinaNet, eq. (7) and (8): -alpha_t log sigmoid(gamma x_t + beta) / gamma."""
    return -weights(TARGETS, alpha) * np.log(sigmoid(gamma * np.where(TARGETS, x, -x) + beta)) / gamma


def smooth_l1(x, target, beta):
    d = np.abs(x - target)
    return np.where(d < beta, d**2 / (2 * beta or 1), d - beta / 2)


def giou(boxes, target):
    """1 - GIoU, a pair of boxes at a time."""
    losses = []
    for (x1, y1, x2, y2), (u1, v1, u2, v2) in zip(boxes.reshape(-1, 4), target.reshape(-1, 4), strict=True):
        intersection = max(0, min(x2, u2) - max(x1, u1)) * max(0, min(y2, v2) - max(y1, v1))
        union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - intersection
        hull = (max(x2, u2) - min(x1, u1)) * (max(y2, v2) - min(y1, v1))
        losses.append(1 - intersection / union + (hull - union) / hull)
    return np.asarray(losses).reshape(boxes.shape[:-1])


def against(op, name, label, target, formula, inputs, **how) -> Case:
    """A loss whose second argument is an array of the shape of the first."""

    def call(x):
        return op(x, like(x, target), **how)

    return Case(name, label, call, lambda x: formula(x, target, **how), inputs)


def focal_cases(alpha, gamma) -> list[Case]:
    how, label = {"alpha": alpha, "gamma": gamma}, f"{alpha}-{gamma}"

    def sums(x):
        return ops.sigmoid_focal_loss_sum(x, x.xp.asarray(LABELS), **how)

    elements = ops.sigmoid_focal_loss
    return [
        against(elements, "sigmoid_focal_loss", label, TARGETS, focal, normal((2, 3), scale=2), **how),
        Case("sigmoid_focal_loss_sum", label, sums, partial(focal_sum, **how), normal((2, 4, 3), scale=2)),
    ]


def focal_star_case(alpha, gamma, beta) -> Case:
    how = {"alpha": alpha, "gamma": gamma, "beta": beta}

    def call(x):
        return ops.focal_star(x, like(x, TARGETS), **how)

    return Case("focal_star", f"{alpha}-{gamma}-{beta}", call, partial(focal_star, **how), normal((2, 3)))


def smooth_l1_case(beta) -> Case:
    def inputs(rng):  # off the points where two pieces meet
        errors = away_from(rng.normal(size=(2, 3)), 0)
        return [CENTER + away_from(away_from(errors, beta, 0.01), -beta, 0.01)]

    return against(ops.smooth_l1, "smooth_l1", f"{beta:.2f}", CENTER, smooth_l1, inputs, beta=beta)


def boxes(*shape):
    def inputs(rng):
        corner, size = rng.uniform(0, 3, (*shape, 2)), rng.uniform(1, 4, (*shape, 2))
        return [np.concatenate([corner, corner + size], axis=-1)]

    return inputs


def bce(x, targets):
    """RetinaNet, eq. (1)."""
    return focal(x, targets, None, 0)


def l1(x, target):
    return np.abs(x - target)


giou_loss = partial(ops.giou_loss, eps=0.0)
NONE = np.zeros((0, 4))

CASES = [
    against(ops.bce_with_logits, "bce_with_logits", "matrix", TARGETS, bce, normal((2, 3), scale=2)),
    *focal_cases(0.25, 2.0),
    *focal_cases(None, 2.0),
    *focal_cases(0.75, 0.5),
    *focal_cases(0.25, 0.0),
    *focal_cases(0.5, 5.0),
    focal_star_case(None, 2.0, 1.0),
    focal_star_case(0.25, 4.0, 0.0),
    focal_star_case(0.25, 0.5, -1.0),
    smooth_l1_case(0.0),
    smooth_l1_case(1 / 9),
    smooth_l1_case(1.0),
    against(ops.l1, "l1", "matrix", CENTER, l1, lambda rng: [CENTER + away_from(rng.normal(size=(2, 3)), 0)]),
    against(giou_loss, "giou_loss", "rows", OBJECTS, giou, boxes(6)),
    against(giou_loss, "giou_loss", "more-axes", OBJECTS.reshape(2, 3, 4), giou, boxes(2, 3)),
    against(ops.l1, "l1", "empty", NONE, l1, normal((0, 4))),
    against(ops.smooth_l1, "smooth_l1", "empty", NONE, smooth_l1, normal((0, 4)), beta=0.1),
    against(giou_loss, "giou_loss", "empty", NONE, giou, normal((0, 4))),
]
