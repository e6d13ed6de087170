"""Element-wise functions of one tensor, and softmax."""

from __future__ import annotations

from minidet.autograd import Tensor, record
from minidet.kernels import probabilities, rectify, rectify_gradient, rectify_sum


def exp(x: Tensor) -> Tensor:
    """Exponential, y = e^x.

    Shapes: any; y has the shape of x.
    Backward: dL/dx = dL/dy * y.
    """
    y = x.xp.exp(x.data)
    return record("exp", y, (x,), lambda gy: (gy * y,))


def log(x: Tensor) -> Tensor:
    """Natural logarithm, y = ln x.

    Shapes: any; y has the shape of x.
    Backward: dL/dx = dL/dy / x.
    """
    values = x.data
    return record("log", x.xp.log(values), (x,), lambda gy: (gy / values,))


def sqrt(x: Tensor) -> Tensor:
    """Square root.

    Shapes: any; y has the shape of x.
    Backward: dL/dx = dL/dy / (2 y).
    """
    y = x.xp.sqrt(x.data)
    return record("sqrt", y, (x,), lambda gy: (gy / (2 * y),))


def abs(x: Tensor) -> Tensor:
    """Absolute value.

    Shapes: any; y has the shape of x.
    Backward: dL/dx = dL/dy * sign(x).  At the kink x = 0 we choose 0.
    """
    xp, values = x.xp, x.data
    return record("abs", xp.abs(values), (x,), lambda gy: (gy * xp.sign(values),))


def relu(x: Tensor) -> Tensor:
    """Rectifier, y = max(x, 0), element by element.

    Shapes: any; y has the shape of x.
    Backward: dL/dx = dL/dy where y > 0, else 0.  At the kink x = 0 we choose 0.
    """
    # y itself tells where x was positive, and the next op keeps it anyway: no mask to store.
    y = rectify(x.data)
    return record("relu", y, (x,), lambda gy: (rectify_gradient(gy, y),), fresh=True)


def add_relu(a: Tensor, b: Tensor) -> Tensor:
    """Rectified sum, y = max(a + b, 0), element by element, in one pass: the end of a residual block with a norm.

    Shapes: b: the shape of a; so has y.
    Backward: dL/da = dL/db = dL/dy where y > 0, else 0.
    Raises:
        ValueError: if the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"add_relu: shapes {a.shape} and {b.shape} differ")
    y, needed = rectify_sum(a.data, b.data), (a.requires_grad, b.requires_grad)

    def backward(gy):
        g = rectify_gradient(gy, y)
        return tuple(g if need else None for need in needed)

    return record("add_relu", y, (a, b), backward)


def sigmoid(x: Tensor) -> Tensor:
    """Logistic function, y = 1 / (1 + e^-x), without overflow for any x.

    Shapes: any; y has the shape of x.
    Backward: dL/dx = dL/dy * y * (1 - y).
    """
    y = probabilities(x.data)
    return record("sigmoid", y, (x,), lambda gy: (gy * (y * (1 - y)),))


def log_sigmoid(x: Tensor) -> Tensor:
    """Logarithm of the logistic function, y = ln sigmoid(x) = min(x, 0) - ln(1 + e^-|x|).

    Shapes: any; y has the shape of x.
    Backward: dL/dx = dL/dy * sigmoid(-x).
    """
    xp, values = x.xp, x.data
    y = -xp.log1p(xp.exp(-xp.abs(values))) - xp.where(values < 0, -values, 0 * values)
    return record("log_sigmoid", y, (x,), lambda gy: (gy * probabilities(-values),))


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    """Positive numbers that sum to 1 along `axis`: y_i = e^x_i / sum_j e^x_j.

    Shapes: any; y has the shape of x.
    Backward: dL/dx_i = y_i * (dL/dy_i - sum_j dL/dy_j y_j).
    """
    xp = x.xp
    powers = xp.exp(x.data - xp.max(x.data, axis=axis, keepdims=True))
    y = powers / xp.sum(powers, axis=axis, keepdims=True)

    def backward(gy):
        return (y * (gy - xp.sum(gy * y, axis=axis, keepdims=True)),)

    return record("softmax", y, (x,), backward)


def astype(x: Tensor, dtype) -> Tensor:
    """The same values in another floating-point type.

    Shapes: any; y has the shape of x, and is x where it has that type already.
    Backward: dL/dx = dL/dy in the type of x.
    """
    xp, old = x.xp, x.dtype
    if old == dtype:
        return x
    return record("astype", xp.astype(x.data, dtype), (x,), lambda gy: (xp.astype(gy, old),))
