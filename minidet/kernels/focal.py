"""The focal loss and its gradient in closed form, element by element and fused over whole images."""

from __future__ import annotations

import numpy as np
from numba import njit

from minidet import backend
from minidet.kernels.kernel import Kernel

BACKGROUND = -1
"""Label of an anchor without an object: its target is 0 for every class."""

IGNORE = -2
"""Label of an anchor that is neither object nor background: it has no say in the loss."""


@Kernel
def focal_terms(logits, targets, alpha: float | None, gamma: float):
    """Focal loss of every logit, and its derivative.

    With z = x where the target is 1 and z = -x where it is 0, p_t = sigmoid(z) and q = 1 - p_t:

        CE = -log p_t = softplus(-z)        FL = alpha_t * q^gamma * CE
        dFL/dx = +-alpha_t * q^gamma * (-gamma * p_t * CE - q), the sign that of z/x

    log q = -softplus(z), so q^gamma = exp(-gamma * softplus(z)): no power of a number that was rounded to
    0 or 1, and nothing overflows for logits of +-100.

    Shapes:
        logits, targets: any, the same
        returns: loss, gradient; both the shape of logits
    Units: logits; targets 0 or 1; alpha_t is alpha for targets 1, 1 - alpha for 0, and 1 where alpha is None.
    Source: RetinaNet, arXiv:1708.02002, eq. (5) and (10).
    """
    xp = backend.namespace(logits)
    positive = xp.astype(targets, xp.bool)
    one = xp.ones_like(logits)
    sign = xp.where(positive, one, -one)
    weight = one if alpha is None else xp.where(positive, alpha * one, (1 - alpha) * one)
    z = sign * logits
    tail = xp.exp(-xp.abs(z))
    log_tail = xp.log1p(tail)  # softplus(z) = max(z, 0) + log(1 + e^-|z|)
    zero = xp.zeros_like(z)
    cross_entropy = xp.maximum(-z, zero) + log_tail
    weight = weight * xp.exp(-gamma * (xp.maximum(z, zero) + log_tail))
    smaller, larger = tail / (1 + tail), 1 / (1 + tail)  # sigmoid(-|z|), sigmoid(|z|)
    p = xp.where(z > 0, larger, smaller)
    q = xp.where(z > 0, smaller, larger)
    return weight * cross_entropy, -sign * weight * (gamma * p * cross_entropy + q)


@Kernel
def focal_loss(logits, labels, alpha: float | None, gamma: float):
    """Focal loss of every image, summed over its anchors and classes, and its derivative.

    Equals `focal_terms` of one-hot targets, which are never made: an anchor has one class or none.

    Shapes:
        logits: (N, R, K)
        labels: (N, R) int64: the class, BACKGROUND or IGNORE
        returns: loss (N,), gradient (N, R, K)
    Units: logits; alpha weighs objects, 1 - alpha background; None weighs neither.
    Source: RetinaNet, arXiv:1708.02002, sections 3.2 and 4.1.
    """
    xp = backend.namespace(logits)
    classes = xp.arange(logits.shape[2], dtype=labels.dtype, device=logits.device)
    loss, gradient = focal_terms(logits, labels[:, :, None] == classes, alpha, gamma)
    ignored = labels[:, :, None] == IGNORE
    zero = xp.zeros_like(logits)
    return xp.sum(xp.where(ignored, zero, loss), axis=(1, 2)), xp.where(ignored, zero, gradient)


_f32, _i32 = np.float32, np.int32


@focal_loss.faster_on("numpy", when=lambda logits, *_: logits.dtype == np.float32)
def _focal_loss_numba(logits, labels, alpha: float | None, gamma: float):
    N, R, K = logits.shape
    loss, gradient = np.zeros(N, np.float64), np.empty(logits.shape, np.float32)
    objects, background = (1.0, 1.0) if alpha is None else (alpha, 1.0 - alpha)
    _focal_loss(
        np.ascontiguousarray(logits).reshape(-1),
        np.ascontiguousarray(labels).reshape(-1),
        R,
        K,
        _f32(objects),
        _f32(background),
        _f32(gamma),
        loss,
        gradient.reshape(-1),
    )
    return loss.astype(np.float32), gradient


# The loop below is the hot one: every anchor times every class, at every step.  It is written so that the
# compiler turns it into vector instructions, which it cannot do with calls of a mathematical library: hence
# the two polynomials.  "contract" lets it multiply and add at once, "reassoc" sum in several lanes; NaN keeps
# its meaning, so a network that diverges is noticed.
_BLOCK = 2048  # logits whose loss terms wait in the cache to be summed


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract", "reassoc"})
def _focal_loss(logits, labels, R, K, object_weight, background_weight, gamma, loss, gradient):
    rows = max(1, _BLOCK // max(1, K))
    terms = np.empty(rows * K, np.float32)
    for n in range(len(loss)):
        for start in range(n * R, (n + 1) * R, rows):
            stop = min((n + 1) * R, start + rows)
            first, last = start * K, stop * K
            x, g = logits[first:last], gradient[first:last]
            # As if all were background, for almost all are, and a loop without branches is fast ...
            for i in range(len(x)):
                terms[i], slope = _focal_term(-x[i], background_weight, gamma)
                g[i] = -slope
            # ... then the few exceptions.
            for r in range(start, stop):
                i = (r - start) * K
                if 0 <= labels[r] < K:
                    i += labels[r]
                    terms[i], g[i] = _focal_term(x[i], object_weight, gamma)
                elif labels[r] == IGNORE:
                    for j in range(i, i + K):
                        terms[j] = g[j] = _f32(0)
            total = 0.0
            for i in range(len(x)):
                total += terms[i]
            loss[n] += total


@njit(forceinline=True, error_model="numpy", fastmath={"contract"})
def _focal_term(z, weight, gamma):
    """alpha_t * FL and its derivative by z, as in `focal_terms`."""
    size = abs(z)
    tail = _exp_of_negative(-size)
    log_tail = _log1p_of_unit(tail)
    # max(z, 0) = (|z| + z) / 2, exactly; unlike max, it passes NaN on.
    softplus = _f32(0.5) * (size + z) + log_tail
    cross_entropy = _f32(0.5) * (size - z) + log_tail
    larger = _f32(1) / (_f32(1) + tail)
    smaller = tail * larger
    p, q = (larger, smaller) if z > _f32(0) else (smaller, larger)
    weight *= _exp_of_negative(-gamma * softplus)
    return weight * cross_entropy, -weight * (gamma * p * cross_entropy + q)


@njit(forceinline=True, error_model="numpy", fastmath={"contract"})
def _exp_of_negative(x):
    """e^x for x <= 0, and about 1e-38 instead of less; relative error below 2e-7.

    x = k ln 2 + r with |r| <= ln 2 / 2: a polynomial for e^r, and 2^k by writing k into the exponent's bits.
    The coefficients are those of the Cephes library's expf.
    """
    x = x if not x < _f32(-87) else _f32(-87)
    k = _i32(x * _f32(1.44269504) - _f32(0.5))
    r = x - _f32(k) * _f32(0.693359375) + _f32(k) * _f32(2.12194440e-4)  # ln 2 in two parts: r keeps its bits
    y = _f32(1.9875691500e-4)
    y = y * r + _f32(1.3981999507e-3)
    y = y * r + _f32(8.3334519073e-3)
    y = y * r + _f32(4.1665795894e-2)
    y = y * r + _f32(1.6666665459e-1)
    y = y * r + _f32(5.0000001201e-1)
    y = y * r * r + r + _f32(1)
    return y * _i32((k + _i32(127)) << _i32(23)).view(np.float32)


@njit(forceinline=True, error_model="numpy", fastmath={"contract"})
def _log1p_of_unit(x):
    """log(1 + x) for 0 <= x <= 1; relative error below 2e-7.

    2 artanh(s) with s = x / (2 + x) <= 1/3, whose series s + s^3/3 + s^5/5 + ... converges fast.
    """
    s = x / (_f32(2) + x)
    z = s * s
    y = _f32(1 / 15)
    y = y * z + _f32(1 / 13)
    y = y * z + _f32(1 / 11)
    y = y * z + _f32(1 / 9)
    y = y * z + _f32(1 / 7)
    y = y * z + _f32(1 / 5)
    y = y * z + _f32(1 / 3)
    y = y * z + _f32(1)
    return _f32(2) * s * y
