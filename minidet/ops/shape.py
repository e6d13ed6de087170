"""Ops that move, pick or sum elements."""

from __future__ import annotations

import builtins
import math
from collections.abc import Sequence

from minidet.autograd import Tensor, record
from minidet.backend import Array
from minidet.kernels import scatter_add


def reshape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The same elements in row-major order under another shape; one size may be -1.

    Shapes: any with the same number of elements.
    Backward: dL/dx = dL/dy in the shape of x.
    """
    xp, old = x.xp, x.shape
    return record("reshape", xp.reshape(x.data, shape), (x,), lambda gy: (xp.reshape(gy, old),))


def permute(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Axes in another order: axis i of y is axis axes[i] of x.

    Shapes: y.shape[i] = x.shape[axes[i]].
    Backward: dL/dx = dL/dy with the axes put back.
    """
    xp = x.xp
    back = tuple(sorted(range(len(axes)), key=lambda i: axes[i]))
    return record(
        "permute", xp.permute_dims(x.data, axes), (x,), lambda gy: (xp.permute_dims(gy, back),)
    )


def broadcast_to(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`x` repeated along axes of size 1, and along new leading axes, up to `shape`.

    Shapes: x must broadcast to `shape`.
    Backward: dL/dx = dL/dy summed over the repeated axes.
    """
    xp, old = x.xp, x.shape
    extra = len(shape) - len(old)
    repeated = tuple(i for i in range(len(shape)) if i < extra or old[i - extra] != shape[i])

    def backward(gy):
        return (xp.reshape(xp.sum(gy, axis=repeated), old),)

    return record("broadcast_to", xp.broadcast_to(x.data, shape), (x,), backward)


def concat(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Tensors one after the other along an axis they already have.

    Shapes: equal except along `axis`.
    Backward: each input gets its own slice of dL/dy.
    Raises:
        ValueError: for an empty sequence.
    """
    if not tensors:
        raise ValueError("concat: needs at least one tensor")
    xp = tensors[0].xp
    axis %= tensors[0].ndim
    sizes = [x.shape[axis] for x in tensors]
    needed = [x.requires_grad for x in tensors]

    def backward(gy):
        slices, start = [], 0
        for size, need in zip(sizes, needed, strict=True):
            slices.append(gy[_along(axis, slice(start, start + size), gy.ndim)] if need else None)
            start += size
        return tuple(slices)

    return record("concat", xp.concat([x.data for x in tensors], axis=axis), tuple(tensors), backward)


def stack(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Tensors of one shape side by side along a new axis.

    Shapes: y has one axis more, of size len(tensors), at position `axis`.
    Backward: each input gets its own slice of dL/dy.
    Raises:
        ValueError: for an empty sequence.
    """
    if not tensors:
        raise ValueError("stack: needs at least one tensor")
    xp = tensors[0].xp
    axis %= tensors[0].ndim + 1
    needed = [x.requires_grad for x in tensors]

    def backward(gy):
        return tuple(gy[_along(axis, i, gy.ndim)] if need else None for i, need in enumerate(needed))

    return record("stack", xp.stack([x.data for x in tensors], axis=axis), tuple(tensors), backward)


def pad(x: Tensor, widths: Sequence[tuple[int, int]]) -> Tensor:
    """Zeros around `x`: widths[i] = (before, after) along axis i.

    Shapes: y.shape[i] = before + x.shape[i] + after.
    Backward: dL/dx is the inside of dL/dy.
    Raises:
        ValueError: if there is not one non-negative pair for each axis.
    """
    if len(widths) != x.ndim or builtins.min(builtins.min(pair) for pair in widths) < 0:
        raise ValueError(f"pad: needs {x.ndim} pairs of non-negative widths, got {widths}")
    xp = x.xp
    inside = tuple(slice(before, before + n) for (before, _), n in zip(widths, x.shape, strict=True))
    padded = xp.zeros(
        tuple(before + n + after for (before, after), n in zip(widths, x.shape, strict=True)),
        dtype=x.dtype,
        device=x.data.device,
    )
    padded[inside] = x.data
    return record("pad", padded, (x,), lambda gy: (gy[inside],))


def take(x: Tensor, index: Array, axis: int = 0) -> Tensor:
    """Rows of `x` by position: y[m] = x[index[m]] along `axis`; an index may repeat.

    Shapes: index: (M,) integers; y has size M along `axis`.
    Backward: dL/dx[i] is the sum of dL/dy[m] over all m with index[m] = i.
    """
    xp, shape = x.xp, x.shape
    axis %= x.ndim
    to_front = (axis, *(i for i in range(x.ndim) if i != axis))
    back = tuple(sorted(range(x.ndim), key=lambda i: to_front[i]))

    def backward(gy):
        rows = xp.permute_dims(gy, to_front)
        zeros = xp.zeros(tuple(shape[i] for i in to_front), dtype=gy.dtype, device=gy.device)
        return (xp.permute_dims(scatter_add(zeros, index, rows), back),)

    return record("take", xp.take(x.data, index, axis=axis), (x,), backward)


def getitem(x: Tensor, key: int | slice | tuple) -> Tensor:
    """A part of `x` by integers, slices and `...`: `x[key]`; use `take` for arrays of positions.

    Shapes: as in NumPy's basic indexing.
    Backward: dL/dx is dL/dy at that part and 0 elsewhere.
    Raises:
        TypeError: for an index that is not an int, a slice or `...`.
    """
    for part in key if isinstance(key, tuple) else (key,):
        if not (part is Ellipsis or isinstance(part, int | slice)):
            raise TypeError(f"getitem: an index must be int, slice or ..., got {type(part).__name__}; see take")
    xp, shape = x.xp, x.shape
    parts = key if isinstance(key, tuple) else (key,)
    if Ellipsis not in parts and len(parts) < x.ndim:
        key = (*parts, ...)  # the standard leaves shorter keys undefined

    def backward(gy):
        gx = xp.zeros(shape, dtype=gy.dtype, device=gy.device)
        gx[key] = gy
        return (gx,)

    return record("getitem", x.data[key], (x,), backward)


def sum(x: Tensor, axis: int | tuple[int, ...] | None = None, *, keepdims: bool = False) -> Tensor:
    """Sum over `axis`, or over everything.

    Shapes: the summed axes go, or stay with size 1.
    Backward: dL/dx = dL/dy repeated along the summed axes.
    """
    xp, shape = x.xp, x.shape
    kept = _kept_shape(shape, axis)

    def backward(gy):
        # A copy: broadcasting gives every element the same address, and others may write to a gradient.
        return (xp.broadcast_to(xp.reshape(gy, kept), shape) + 0,)

    y = xp.sum(x.data, axis=axis, keepdims=keepdims, dtype=x.dtype)
    return record("sum", y, (x,), backward)


def mean(x: Tensor, axis: int | tuple[int, ...] | None = None, *, keepdims: bool = False) -> Tensor:
    """Mean over `axis`, or over everything.

    Shapes: the averaged axes go, or stay with size 1.
    Backward: dL/dx = dL/dy / n repeated along the averaged axes, n elements to a mean.
    """
    kept = _kept_shape(x.shape, axis)
    count = math.prod(x.shape) // builtins.max(1, math.prod(kept))
    return sum(x, axis, keepdims=keepdims) / count


def max(x: Tensor, axis: int | tuple[int, ...] | None = None, *, keepdims: bool = False) -> Tensor:
    """Largest element over `axis`, or over everything.

    Shapes: the reduced axes go, or stay with size 1.
    Ties: equal maxima share the gradient evenly.
    Backward: dL/dx = dL/dy / (number of maxima) at the maxima, 0 elsewhere.
    """
    return _extreme("max", x, axis, keepdims)


def min(x: Tensor, axis: int | tuple[int, ...] | None = None, *, keepdims: bool = False) -> Tensor:
    """Smallest element over `axis`, or over everything.

    Shapes: the reduced axes go, or stay with size 1.
    Ties: equal minima share the gradient evenly.
    Backward: dL/dx = dL/dy / (number of minima) at the minima, 0 elsewhere.
    """
    return _extreme("min", x, axis, keepdims)


def _extreme(op: str, x: Tensor, axis, keepdims: bool) -> Tensor:
    xp = x.xp
    kept = _kept_shape(x.shape, axis)
    y = (xp.max if op == "max" else xp.min)(x.data, axis=axis, keepdims=keepdims)
    winners = x.data == xp.reshape(y, kept)

    def backward(gy):
        ones = xp.astype(winners, gy.dtype)
        shared = xp.sum(ones, axis=axis, keepdims=True, dtype=gy.dtype)
        return (ones * (xp.reshape(gy, kept) / xp.reshape(shared, kept)),)

    return record(op, y, (x,), backward)


def _kept_shape(shape: tuple[int, ...], axis: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape after reducing `axis` with keepdims."""
    if axis is None:
        return (1,) * len(shape)
    axes = {a % len(shape) for a in (axis if isinstance(axis, tuple) else (axis,))}
    return tuple(1 if i in axes else n for i, n in enumerate(shape))


def _along(axis: int, index: int | slice, ndim: int) -> tuple:
    """The key that applies `index` to one axis and takes all of the others."""
    return tuple(index if i == axis else slice(None) for i in range(ndim))


Tensor.__getitem__ = getitem
