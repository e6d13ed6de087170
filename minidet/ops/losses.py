"""Losses of logits and boxes, element by element: they know no anchors and reduce nothing unless they say so.

Targets are constants: plain arrays of the same library, without a gradient.
"""

from __future__ import annotations

from minidet.autograd import Tensor, record
from minidet.backend import Array
from minidet.kernels import focal_loss, focal_terms, scale_rows


def bce_with_logits(logits: Tensor, targets: Array) -> Tensor:
    """Binary cross-entropy, -log sigmoid(x) where the target is 1 and -log sigmoid(-x) where it is 0.

    Shapes: targets: the shape of logits; so has the result.
    Units: logits; targets in [0, 1], y = softplus(x) - t * x.
    Backward: dL/dx = dL/dy * (sigmoid(x) - t).
    Source: RetinaNet, arXiv:1708.02002, eq. (1) and (9).
    """
    xp, x = logits.xp, logits.data
    tail = xp.exp(-xp.abs(x))
    t = xp.astype(targets, x.dtype)
    y = xp.maximum(x, xp.zeros_like(x)) - t * x + xp.log1p(tail)  # never the exp of a large number
    slope = xp.where(x >= 0, 1 / (1 + tail), tail / (1 + tail)) - t
    return record("bce_with_logits", y, (logits,), lambda gy: (gy * slope,))


def sigmoid_focal_loss(logits: Tensor, targets: Array, *, alpha: float | None = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss of every logit, -alpha_t (1 - p_t)^gamma log p_t.

    Shapes: targets: the shape of logits; so has the result.
    Units: logits; targets 0 or 1.
    Backward: dL/dx = dL/dy * alpha_t * s (1 - p_t)^gamma (gamma p_t log p_t + p_t - 1), s = +1 for targets 1,
        -1 for 0: in closed form, computed with the loss.
    Source: RetinaNet, arXiv:1708.02002, eq. (5) and (10).
    """
    y, slope = focal_terms(logits.data, targets, alpha, gamma)
    return record("sigmoid_focal_loss", y, (logits,), lambda gy: (gy * slope,))


def sigmoid_focal_loss_sum(logits: Tensor, labels: Array, *, alpha: float | None = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss of every image, summed over its anchors and classes, in one pass over the logits.

    Shapes:
        logits: (N, R, K)
        labels: (N, R) int64: the class, or BACKGROUND or IGNORE of `minidet.kernels.focal`
        returns: (N,)
    Backward: as in `sigmoid_focal_loss`; 0 at ignored anchors.
    Source: RetinaNet, arXiv:1708.02002, eq. (5) and (10), section 3.2 on fusing.
    """
    xp, (N, R, K) = logits.xp, logits.shape
    y, slope = focal_loss(logits.data, labels, alpha, gamma)

    def backward(gy):
        of_anchor = xp.reshape(xp.broadcast_to(gy[:, None], (N, R)), (N * R,))
        return (xp.reshape(scale_rows(xp.reshape(slope, (N * R, K)), of_anchor), (N, R, K)),)

    return record("sigmoid_focal_loss_sum", y, (logits,), backward)


def focal_star(
    logits: Tensor, targets: Array, *, alpha: float | None = None, gamma: float = 2.0, beta: float = 1.0
) -> Tensor:
    """The paper's other focal loss, FL* = -alpha_t log(p_t*) / gamma with p_t* = sigmoid(gamma x_t + beta).

    Shapes: targets: the shape of logits; so has the result.
    Units: logits; targets 0 or 1; x_t is x for targets 1 and -x for 0.
    Backward: dL/dx = dL/dy * alpha_t * s (p_t* - 1), s = +1 for targets 1, -1 for 0.
    Source: RetinaNet, arXiv:1708.02002, appendices A and B, eq. (7), (8) and (11).
    Raises:
        ValueError: unless gamma > 0.
    """
    if not gamma > 0:
        raise ValueError(f"focal_star: gamma divides the loss and must be positive, got {gamma}")
    xp, x = logits.xp, logits.data
    one = xp.ones_like(x)
    positive = xp.astype(targets, xp.bool)
    sign = xp.where(positive, one, -one)
    weight = one if alpha is None else xp.where(positive, alpha * one, (1 - alpha) * one)
    z = gamma * sign * x + beta
    tail = xp.exp(-xp.abs(z))
    y = weight * (xp.maximum(-z, xp.zeros_like(z)) + xp.log1p(tail)) / gamma
    slope = -weight * sign * xp.where(z >= 0, tail, one) / (1 + tail)  # 1 - sigmoid(z)
    return record("focal_star", y, (logits,), lambda gy: (gy * slope,))


def l1(x: Tensor, target: Array) -> Tensor:
    """Absolute error, y = |x - target|.

    Shapes: target: the shape of x; so has y.
    Backward: dL/dx = dL/dy * sign(x - target).  At the kink x = target we choose 0.
    """
    xp = x.xp
    error = x.data - target
    return record("l1", xp.abs(error), (x,), lambda gy: (gy * _sign(error, xp),))


def smooth_l1(x: Tensor, target: Array, *, beta: float) -> Tensor:
    """Absolute error, made quadratic where it is small: y = d^2 / (2 beta) for |d| < beta, else |d| - beta / 2.

    Shapes: target: the shape of x; so has y.
    Backward: dL/dx = dL/dy * clamp(d / beta, -1, 1), d = x - target.
    Source: Fast R-CNN, arXiv:1504.08083, eq. (3), which has beta = 1.
    Raises:
        ValueError: if beta is negative.
    """
    if beta < 0:
        raise ValueError(f"smooth_l1: beta must not be negative, got {beta}")
    if beta == 0:  # the limit; d / beta would be 0 / 0
        return l1(x, target)
    xp = x.xp
    error = x.data - target
    size = xp.abs(error)
    near = size < beta
    y = xp.where(near, error * error * (0.5 / beta), size - 0.5 * beta)
    return record("smooth_l1", y, (x,), lambda gy: (gy * xp.where(near, error / beta, _sign(error, xp)),))


def giou_loss(boxes: Tensor, target: Array, *, eps: float = 1e-7) -> Tensor:
    """1 - GIoU: how little two boxes overlap, and how far apart they are when they do not.

    GIoU = I / (U + eps) - (C - U) / (C + eps): intersection, union, and area of the smallest box around both.

    Shapes:
        boxes: (..., 4)
        target: (..., 4)
        returns: (...,), in [0, 2]
    Units: any; eps is an area in the same units.
    Backward: the chain rule through I, U = A + B - I and C; where a side of `boxes` and of `target` coincide,
        max and min give each half of the gradient, as PyTorch does.
    Source: Rezatofighi et al., arXiv:1902.09630, algorithms 1 and 2; eps as in torchvision.
    """
    xp = boxes.xp
    b, t = boxes.data, xp.astype(target, boxes.dtype)
    low, high = b[..., :2], b[..., 2:]
    overlap = xp.minimum(high, t[..., 2:]) - xp.maximum(low, t[..., :2])
    sides = high - low
    target_sides = t[..., 2:] - t[..., :2]
    hull = xp.maximum(high, t[..., 2:]) - xp.minimum(low, t[..., :2])
    # PyTorch's rule for touching boxes: an overlap of exactly 0 is no overlap and has no gradient.
    touch = xp.all(overlap > 0, axis=-1)
    overlap = xp.where(touch[..., None], overlap, xp.zeros_like(overlap))
    intersection, enclosing = _area(overlap), _area(hull)
    union = _area(sides) + _area(target_sides) - intersection
    y = 1 - intersection / (union + eps) + (enclosing - union) / (enclosing + eps)

    def backward(gy):
        # dy/dI, dy/dU, dy/dC, taking I, U and C as independent ...
        by_union = intersection / (union + eps) ** 2 - 1 / (enclosing + eps)
        by_intersection = -1 / (union + eps) - by_union  # ... then U = A + B - I
        by_enclosing = (union + eps) / (enclosing + eps) ** 2
        # The derivative of an area by one side is the other side.
        to_overlap = (gy * by_intersection)[..., None] * xp.flip(overlap, axis=-1)
        to_sides = (gy * by_union)[..., None] * xp.flip(sides, axis=-1)
        to_hull = (gy * by_enclosing)[..., None] * xp.flip(hull, axis=-1)
        inside_low = _share(low - t[..., :2], xp)  # 1 where this box's corner bounds the overlap
        inside_high = _share(t[..., 2:] - high, xp)
        glow = -to_sides - to_overlap * inside_low - to_hull * (1 - inside_low)
        ghigh = to_sides + to_overlap * inside_high + to_hull * (1 - inside_high)
        return (xp.concat([glow, ghigh], axis=-1),)

    return record("giou_loss", y, (boxes,), backward)


def _area(sides: Array) -> Array:
    return sides[..., 0] * sides[..., 1]


def _share(difference: Array, xp) -> Array:
    """1 where positive, 0 where negative, a half at 0."""
    return (_sign(difference, xp) + 1) / 2


def _sign(x: Array, xp) -> Array:
    """-1, 0 or 1.  The standard's makes a NaN of a NaN, for which CuPy has to be asked where they are."""
    return xp.astype(x > 0, x.dtype) - xp.astype(x < 0, x.dtype)
