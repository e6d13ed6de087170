"""The focal loss and its gradient in closed form, element by element and fused over whole images."""

from __future__ import annotations

import numpy as np

from minidet import backend
from minidet.kernels import cuda
from minidet.kernels.compiler import inner
from minidet.kernels.kernel import Kernel
from minidet.kernels.parallel import parallel

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
_SHARES = 1 << 15  # an image's sum on a GPU


@focal_loss.faster_on("numpy", when=lambda logits, *_: logits.dtype == np.float32)
def _focal_loss_numba(logits, labels, alpha: float | None, gamma: float):
    N, R, K = logits.shape
    gradient = np.empty(logits.shape, np.float32)
    rows = max(1, _BLOCK // max(1, K))
    sums = np.zeros((N, -(-R // rows)))  # one for each block, not thread: the same for any number of threads
    objects, background = (1.0, 1.0) if alpha is None else (alpha, 1.0 - alpha)
    weights = np.asarray((objects, background, gamma), np.float32)
    _focal_block(sums.size, np.ascontiguousarray(logits), np.ascontiguousarray(labels), rows, weights, sums, gradient)
    return sums.sum(axis=1).astype(np.float32), gradient


@focal_loss.faster_on("cupy", when=lambda logits, *_: 0 < logits.shape[1] * logits.shape[2] < 1 << 32)
def _focal_loss_cuda(logits, labels, alpha: float | None, gamma: float):
    xp, (N, R, K) = backend.namespace(logits), logits.shape
    logits, gradient = cuda.contiguous(logits), xp.empty((N, R, K), dtype=logits.dtype)
    threads = min(R * K, _SHARES)
    sums = xp.empty((N, threads), dtype=xp.float64)
    weights = (1.0, 1.0, gamma) if alpha is None else (alpha, 1.0 - alpha, gamma)
    arguments = logits, cuda.contiguous(labels), gradient, sums, N, threads, R * K, K, *map(float, weights)
    cuda.launch(__file__, "focal_loss", N * threads, *arguments, real=logits.dtype)
    return xp.astype(xp.sum(sums, axis=1), logits.dtype), gradient


# The loop below is the hot one: every anchor times every class, at every step.  It is written so that the
# compiler turns it into vector instructions, which it cannot do with calls of a mathematical library: hence
# the two polynomials.  "contract" lets it multiply and add at once, "reassoc" sum in several lanes; NaN keeps
# its meaning, so a network that diverges is noticed.
_BLOCK = 1 << 11  # logits whose terms are summed in float32


@parallel
def _focal_block(both, all_logits, all_labels, rows, weights, sums, gradients):
    """The loss of some anchors of one image; their gradient is written."""
    n, block = both // sums.shape[1], both % sums.shape[1]
    part = slice(block * rows, (block + 1) * rows)
    logits, labels, gradient = all_logits[n, part], all_labels[n, part], gradients[n, part]
    R, K = logits.shape
    x, g = logits.reshape(-1), gradient.reshape(-1)
    total, r = 0.0, 0
    while r < R:
        if labels[r] == IGNORE:
            gradient[r] = 0
            r += 1
            continue
        stop = r
        # As if all were background, for almost all are, and a loop without branches is fast ...
        while stop < R and labels[stop] != IGNORE:
            stop += 1
        total += _background(x[r * K : stop * K], weights[1], weights[2], g[r * K : stop * K])
        # ... then the few others.
        for i in range(r, stop):
            label = labels[i]
            if 0 <= label < K:
                loss, _ = _focal_term(-logits[i, label], weights[1], weights[2])
                total -= loss
                loss, gradient[i, label] = _focal_term(logits[i, label], weights[0], weights[2])
                total += loss
        r = stop
    sums[n, block] = total


@inner(error_model="numpy", fastmath={"contract", "reassoc", "nsz"})
def _background(x, weight, gamma, g):
    total = _f32(0)
    if gamma == _f32(2):
        for i in range(len(x)):
            cross_entropy, p, q = _focal_parts(-x[i])
            power = weight * q * q
            total += power * cross_entropy
            g[i] = power * (_f32(2) * p * cross_entropy + q)
    else:
        for i in range(len(x)):
            loss, slope = _focal_term(-x[i], weight, gamma)
            total += loss
            g[i] = -slope
    return total


@inner(forceinline=True, error_model="numpy", fastmath={"contract", "nsz"})
def _focal_term(z, weight, gamma):
    """alpha_t * FL and its derivative by z, as in `focal_terms`."""
    cross_entropy, p, q = _focal_parts(z)
    # q^gamma = exp(gamma * log q), where log q = -softplus(z) = -(CE + z)
    weight *= _exp_of_negative(-gamma * (cross_entropy + z))
    return weight * cross_entropy, -weight * (gamma * p * cross_entropy + q)


@inner(forceinline=True, error_model="numpy", fastmath={"contract", "nsz"})
def _focal_parts(z):
    """CE, p_t and q of `focal_terms`."""
    size = abs(z)
    tail = _exp_of_negative(-size)
    larger = _f32(1) / (_f32(1) + tail)
    smaller = tail * larger
    # max(-z, 0) = (|z| - z) / 2, exactly; unlike max, it passes NaN on.
    cross_entropy = _f32(0.5) * (size - z) + _log1p(tail)
    return cross_entropy, larger if z > _f32(0) else smaller, smaller if z > _f32(0) else larger


# Both polynomials are added up in pairs, pairs of pairs and so on (Estrin's scheme).  That takes no fewer
# operations than Horner's, where each waits for the one before, but several run at the same time.


@inner(forceinline=True, error_model="numpy", fastmath={"contract", "nsz"})
def _exp_of_negative(x):
    """e^x for x <= 0, and about 1e-38 instead of less; relative error below 2e-7.

    x = k ln 2 + r with |r| <= ln 2 / 2: a polynomial for e^r, and 2^k by writing k into the exponent's bits.
    The coefficients are those of the Cephes library's expf.
    """
    x = x if not x < _f32(-87) else _f32(-87)
    k = _i32(x * _f32(1.44269504) - _f32(0.5))
    r = x - _f32(k) * _f32(0.693359375) + _f32(k) * _f32(2.12194440e-4)  # ln 2 in two parts: r keeps its bits
    square = r * r
    low = _f32(5.0000001201e-1) + _f32(1.6666665459e-1) * r
    middle = _f32(4.1665795894e-2) + _f32(8.3334519073e-3) * r
    high = _f32(1.3981999507e-3) + _f32(1.9875691500e-4) * r
    y = ((high * square + middle) * square + low) * square + (r + _f32(1))
    return y * _i32((k + _i32(127)) << _i32(23)).view(np.float32)


@inner(forceinline=True, error_model="numpy", fastmath={"contract", "nsz"})
def _log1p(x):
    """log(1 + x) for 0 <= x <= 1; relative error below 2.5e-7.

    x times a polynomial that is 1 at 0 and elsewhere off by the same relative error up and down, 3.3e-8.
    """
    square = x * x
    first = _f32(1) + _f32(-0.49999648332595825) * x
    second = _f32(0.3332132399082184) + _f32(-0.24857163429260254) * x
    third = _f32(0.191536545753479) + _f32(-0.13753803074359894) * x
    fourth = _f32(0.07920453697443008) + _f32(-0.03006579354405403) * x
    fifth = _f32(0.005364824552088976)
    fourth_power = square * square
    upper = third + fourth * square + fifth * fourth_power
    return x * (first + second * square + upper * fourth_power)
