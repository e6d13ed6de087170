"""Boxes as the network sees them: shifts and log-scales relative to anchors."""

from __future__ import annotations

import math
from dataclasses import dataclass

from minidet import backend
from minidet.autograd import Tensor, record
from minidet.backend import Array


@dataclass(frozen=True)
class CoderConfig:
    """Units of the deltas.

    Source: Faster R-CNN, arXiv:1506.01497, eq. (2).
    """

    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    """Factors on (dx, dy, dw, dh); 1 / standard deviation in systems that normalise deltas."""
    clip: float = math.log(1000 / 16)
    """Largest dw and dh that `decode` believes, before exp can overflow; a shrinking box has no bound."""

    def __post_init__(self) -> None:
        if min(self.weights) <= 0 or self.clip <= 0:
            raise ValueError(f"coder: weights and clip must be above 0, got {self.weights} and {self.clip}")


def encode_boxes(boxes: Array, anchors: Array, config: CoderConfig) -> Array:
    """The deltas that turn every anchor into its box; `decode_boxes` inverts it.

    dx = (x - x_a) / w_a    dw = log(w / w_a)    with (x, y, w, h) centre and sides; y and h likewise

    Shapes:
        boxes, anchors: (M, 4)
        returns: (M, 4) as (dx, dy, dw, dh)
    Units: deltas have none.
    Source: Faster R-CNN, arXiv:1506.01497, eq. (2).
    """
    xp = backend.namespace(boxes)
    centre, sides = _centre_sides(boxes)
    anchor_centre, anchor_sides = _centre_sides(anchors)
    deltas = xp.concat([(centre - anchor_centre) / anchor_sides, xp.log(sides / anchor_sides)], axis=-1)
    return deltas * _weights(config, deltas)


def decode_boxes(deltas: Array, anchors: Array, config: CoderConfig) -> Array:
    """Every anchor moved and scaled by its deltas.

    x = dx * w_a + x_a    w = exp(min(dw, clip)) * w_a    with (x, y, w, h) centre and sides; y and h likewise

    Shapes:
        deltas: (..., 4) as (dx, dy, dw, dh)
        anchors: (..., 4)
        returns: (..., 4), x1 y1 x2 y2
    Units: pixels, wherever they fall: not clipped to the image.
    Source: Faster R-CNN, arXiv:1506.01497, eq. (2).
    """
    xp = backend.namespace(deltas)
    centre, sides, _ = _decoded(deltas, anchors, config)
    return xp.concat([centre - sides / 2, centre + sides / 2], axis=-1)


def decode_deltas(deltas: Tensor, anchors: Array, config: CoderConfig) -> Tensor:
    """`decode_boxes` as an op.

    Shapes:
        deltas: (..., 4) as (dx, dy, dw, dh)
        anchors: (..., 4)
        returns: (..., 4), x1 y1 x2 y2
    Backward: with gx = gx1 + gx2 and gw = (gx2 - gx1) / 2,
        dL/d(dx) = gx * w_a,  dL/d(dw) = gw * w where dw <= clip, else 0; y and h likewise.
    Source: Faster R-CNN, arXiv:1506.01497, eq. (2).
    """
    xp = deltas.xp
    centre, sides, within = _decoded(deltas.data, anchors, config)
    _, anchor_sides = _centre_sides(anchors)
    boxes = xp.concat([centre - sides / 2, centre + sides / 2], axis=-1)
    slopes = xp.concat([anchor_sides + xp.zeros_like(sides), xp.where(within, sides / 2, 0 * sides)], axis=-1)
    slopes = slopes / _weights(config, sides)

    def backward(gy):
        low, high = gy[..., :2], gy[..., 2:]
        return (xp.concat([low + high, high - low], axis=-1) * slopes,)

    return record("decode_deltas", boxes, (deltas,), backward)


def _decoded(deltas: Array, anchors: Array, config: CoderConfig) -> tuple[Array, Array, Array]:
    """Centre and sides of the decoded boxes, and where dw, dh are not beyond the clip; (..., 2) each."""
    xp = backend.namespace(deltas)
    deltas = deltas / _weights(config, deltas)
    anchor_centre, anchor_sides = _centre_sides(anchors)
    bound = xp.full((), config.clip, dtype=deltas.dtype, device=deltas.device)
    within = deltas[..., 2:] <= bound
    sides = xp.exp(xp.where(within, deltas[..., 2:], bound)) * anchor_sides
    return deltas[..., :2] * anchor_sides + anchor_centre, sides, within


def _centre_sides(boxes: Array) -> tuple[Array, Array]:
    sides = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + sides / 2, sides


def _weights(config: CoderConfig, like: Array) -> Array | float:
    if len(set(config.weights)) == 1:
        return config.weights[0]
    xp = backend.namespace(like)
    return xp.asarray(config.weights, dtype=like.dtype, device=like.device)
