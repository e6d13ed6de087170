"""Convolution of a map, and of every level of a pyramid at once."""

from __future__ import annotations

import numpy as np

from minidet.autograd import Tensor, record, recording
from minidet.backend import Array, namespace
from minidet.kernels import column_sums, epilogue_gradient, rectify_gradient, scale_rows
from minidet.kernels.convolution import (
    add_input_gradient,
    convolve,
    convolve_input_gradient,
    convolve_weight_gradient,
    geometry_of,
)
from minidet.kernels.precision import sums_in

Sizes = int | tuple[int, int]


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    scale: Array | None = None,
    shortcut: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Cross-correlate every image with every filter, as deep learning calls convolution.

    y[n, p, q, f] = act(scale[f] * sum_{i,j,c} weight[f, i, j, c] * x[n, p*stride + i*dilation - padding,
                                                                   q*stride + j*dilation - padding, c] + bias[f]
                                           + shortcut[n, p, q, f])

    where act is the rectifier if `relu`, else the identity, and pixels outside of the map are 0.

    Shapes:
        x: (N, H, W, C)
        weight: (F, k, l, C // groups)
        bias: (F,)
        scale: (F,), a constant: what a frozen batch norm multiplies by
        shortcut: (N, P, Q, F), what a residual block adds
        returns: (N, P, Q, F) with P = (H + 2*padding - dilation*(k - 1) - 1) // stride + 1, Q likewise
    Backward:
        with g = dL/dy where y > 0 if `relu`, else dL/dy:
        dL/dbias    sums g over images and positions
        dL/dweight  correlates the input windows with scale * g
        dL/dx       spreads scale * g through the same weights, back to where each window was read
        dL/dshortcut is g
    Raises:
        ValueError: if sizes do not fit together, or no window fits into the map.
    """
    if x.ndim != 4 or weight.ndim != 4:
        raise ValueError(f"conv2d: x must be (N, H, W, C) and weight (F, k, k, C), got {x.shape} and {weight.shape}")
    N, H, W, C = x.shape
    geometry = geometry_of(
        ((H, W),), weight.shape[1:3], _pair(stride), _pair(padding), _pair(dilation), groups
    )
    (P, Q), xp = geometry.output_maps[0], x.xp
    if P < 1 or Q < 1:
        raise ValueError(
            f"conv2d: a window of {geometry.size} (dilation {geometry.dilation}) does not fit into a map of "
            f"{(H, W)} with padding {geometry.padding}"
        )
    flat = xp.reshape(x.data, (N, H * W, C))
    return _convolve("conv2d", x, flat, weight, bias, geometry, scale, shortcut, relu, (N, P, Q, weight.shape[0]))


def conv2d_levels(
    x: Tensor,
    maps: tuple[tuple[int, int], ...],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Array | None = None,
    shortcut: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """`conv2d` with stride 1 and "same" padding on every level of a pyramid, in one call.

    Equal to splitting x into its levels, `conv2d` on each, and joining the results.

    Shapes:
        x: (N, S, C), the levels' positions one after the other: S = sum of H_l * W_l
        weight: (F, k, l, C), k and l odd
        shortcut: (N, S, F)
        returns: (N, S, F)
    Backward: as `conv2d`; dL/dweight and dL/dbias sum over levels.
    Raises:
        ValueError: if the maps do not add up to S, or a filter has an even side.
    """
    k, l = weight.shape[1:3]  # noqa: E741
    geometry = geometry_of(tuple(maps), (k, l), padding=(k // 2, l // 2))
    if x.ndim != 3 or geometry.pixels != x.shape[1]:
        raise ValueError(f"conv2d_levels: maps {maps} have {geometry.pixels} positions, x has shape {x.shape}")
    if k % 2 == 0 or l % 2 == 0:
        raise ValueError(f"conv2d_levels: 'same' padding needs odd filters, got {(k, l)}")
    shape = (*x.shape[:2], weight.shape[0])
    return _convolve("conv2d_levels", x, x.data, weight, bias, geometry, scale, shortcut, relu, shape)


def _convolve(op, x, flat, weight, bias, geometry, scale, shortcut, relu, shape) -> Tensor:
    """The body of both ops; `flat` is x as (N, S, C) and `shape` the result's."""
    xp, old, C, F = x.xp, x.shape, flat.shape[2], weight.shape[0]
    if C != weight.shape[3] * geometry.groups or F % geometry.groups:
        raise ValueError(
            f"{op}: x has {C} channels, but weight {weight.shape} with groups={geometry.groups} expects "
            f"{weight.shape[3] * geometry.groups} (and filters that divide into the groups)"
        )
    if shortcut is not None and (shortcut.shape, shortcut.dtype) != (shape, x.dtype):
        raise ValueError(
            f"{op}: the result is {shape} in {x.dtype}, but the shortcut {shortcut.shape} in {shortcut.dtype}"
        )
    # Parameters stay float32; they compute in the dtype of the activations, and what is added to sums in theirs.
    wide = sums_in(x.data)
    offset = None if bias is None else bias.data if bias.dtype == wide else xp.astype(bias.data, wide)
    # Weights in training change before they are used again: what is derived from them is not kept, for all layers
    # at once, but made when it is needed.
    lasting = not (recording() and weight.requires_grad)
    filters, memo = _filters(weight, x.dtype, lasting)
    added = None if shortcut is None else xp.reshape(shortcut.data, (shape[0], -1, F))
    y = convolve(flat, filters, offset, scale, added, relu, geometry, memo if lasting else {})
    needs_x, needs_weight = x.requires_grad, weight.requires_grad
    needs_bias = bias is not None and bias.requires_grad
    needs_shortcut = shortcut is not None and shortcut.requires_grad
    kept = flat if needs_weight else None
    rectified = y if relu else None

    def backward(gy, before=None):
        g, back, back_memo, folded = xp.reshape(gy, (shape[0], -1, F)), filters, memo, False
        if rectified is not None and (scale is None or not needs_shortcut):
            g, gbias = epilogue_gradient(g, rectified, scale)
        else:
            if rectified is not None:
                g = rectify_gradient(g, rectified)
            gbias = column_sums(g) if needs_bias else None
            if folded := scale is not None:
                # Scaling g would be a pass over a map, which a shortcut needs unscaled; the weights are far smaller.
                back, back_memo = _scaled(filters, scale, memo)
        gweight = gx = None
        if needs_weight:
            gweight = convolve_weight_gradient(kept, g, geometry)
            gweight = scale_rows(gweight, scale) if folded else gweight
        if needs_x:
            read = g, back, geometry, back_memo
            if before is None:
                gx = convolve_input_gradient(*read)
            else:
                gx = add_input_gradient(xp.reshape(before, (shape[0], -1, C)), *read)
            gx = xp.reshape(gx, old)
        gradients = (gx, gweight) if bias is None else (gx, gweight, gbias if needs_bias else None)
        return gradients if added is None else (*gradients, xp.reshape(g, shape) if needs_shortcut else None)

    inputs = tuple(tensor for tensor in (x, weight, bias, shortcut) if tensor is not None)
    # Without a rectifier the shortcut is handed the very gradient that came in.
    fresh = added is None or relu
    return record(op, xp.reshape(y, shape), inputs, backward, geometry=geometry, fresh=fresh, adds=True)


def _filters(weight: Tensor, dtype, lasting: bool) -> tuple[Array, dict]:
    """The weights in another type, with a memo of their own; both kept with the weights if those are lasting."""
    if weight.dtype == dtype:
        return weight.data, weight.memo if lasting else {}
    known = weight.memo.get(dtype)
    if known is None:
        known = weight.xp.astype(weight.data, dtype), {}
        if lasting:
            weight.memo[dtype] = known
    return known


def _scaled(filters: Array, scale: Array, memo: dict) -> tuple[Array, dict]:
    """Every filter times its scale, with a memo of its own; kept in `memo` as long as the scale stays the same."""
    known, xp = memo.get("scaled"), namespace(scale)
    # To compare numbers on a device is to wait for it: there filters are scaled once more instead.
    if known is None or not (known[0] is scale or (xp is np and np.array_equal(known[0], scale))):
        known = memo["scaled"] = (scale, scale_rows(filters, scale), {})
    return known[1:]


def _pair(value: Sizes) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
