"""Convolution as the textbook writes it: lay every window out as a row, then multiply matrices.

These three functions are the specification.  Whatever runs instead of them (choose.py says what, when
and why) must give the same answer.
"""

from __future__ import annotations

from minidet import backend
from minidet.kernels.convolution.geometry import Geometry
from minidet.kernels.windows import gather_windows, scatter_windows


def convolve(x, weight, bias, scale, shortcut, relu: bool, geometry: Geometry, memo: dict):
    """Cross-correlate every level with every filter, then scale, add bias and shortcut, and rectify.

    y[n, p, q, f] = act(scale[f] * sum_{i,j,c} weight[f, i, j, c] * x[n, p*stride + i*dilation - padding,
                                                                   q*stride + j*dilation - padding, c] + bias[f]
                              + shortcut[n, p, q, f])

    with zeros outside of the map, and with groups > 1 the sum over c only over the filter's own group.

    Shapes:
        x: (N, S, C), S = geometry.pixels
        weight: (F, k, k, C // groups)
        bias: (F,) or None
        scale: (F,) or None for 1
        shortcut: (N, S', F) or None for 0
        returns: (N, S', F), S' = geometry.output_pixels
    """
    xp = backend.namespace(x)
    F = weight.shape[0]
    filters = _filters(weight, geometry.groups, xp)                         # (groups, taps * C/groups, F/groups)
    levels = []
    for map_, inside, (P, Q), _ in geometry.levels():
        rows = _rows(x[:, inside, :], map_, geometry, xp)                   # (groups, N*P*Q, taps * C/groups)
        y = xp.permute_dims(_products(rows, filters, xp), (1, 0, 2))         # (N*P*Q, groups, F/groups)
        levels.append(xp.reshape(y, (x.shape[0], P * Q, F)))
    y = levels[0] if len(levels) == 1 else xp.concat(levels, axis=1)
    if scale is not None:
        y = y * scale
    if bias is not None:
        y = y + bias
    if shortcut is not None:
        y = y + shortcut
    return xp.maximum(y, xp.zeros_like(y)) if relu else y


def convolve_input_gradient(gy, weight, geometry: Geometry, memo: dict):
    """dL/dx: every output spreads its gradient through the filter, back to the pixels it was read from.

    Shapes:
        gy: (N, S', F)
        weight: (F, k, k, C // groups)
        returns: (N, S, C)
    """
    xp = backend.namespace(gy)
    N = gy.shape[0]
    groups, C = geometry.groups, weight.shape[3] * geometry.groups
    filters = xp.matrix_transpose(_filters(weight, groups, xp))             # (groups, F/groups, taps * C/groups)
    (k, l), (down, right) = geometry.size, geometry.padding                 # noqa: E741
    levels = []
    for (H, W), _, (P, Q), inside in geometry.levels():
        rows = _products(_group_rows(gy[:, inside, :], groups, xp), filters, xp)  # (groups, N*P*Q, taps * C/groups)
        windows = xp.reshape(rows, (groups, N, P, Q, k, l, C // groups))
        windows = xp.reshape(xp.permute_dims(windows, (1, 2, 3, 4, 5, 0, 6)), (N, P, Q, k, l, C))
        padded = scatter_windows(windows, H + 2 * down, W + 2 * right, geometry.stride, geometry.dilation)
        levels.append(xp.reshape(padded[:, down : down + H, right : right + W, :], (N, H * W, C)))
    return levels[0] if len(levels) == 1 else xp.concat(levels, axis=1)


def convolve_weight_gradient(x, gy, geometry: Geometry):
    """dL/dweight: the input's windows, correlated with the gradient of the outputs they made.

    Shapes:
        x: (N, S, C)
        gy: (N, S', F)
        returns: (F, k, k, C // groups)
    """
    xp = backend.namespace(x)
    groups, F, C = geometry.groups, gy.shape[2], x.shape[2]
    gweight = xp.zeros((groups, F // groups, geometry.taps * (C // groups)), dtype=gy.dtype, device=gy.device)
    for map_, inside, _, output_inside in geometry.levels():
        rows = _rows(x[:, inside, :], map_, geometry, xp)
        columns = xp.matrix_transpose(_group_rows(gy[:, output_inside, :], groups, xp))
        gweight = gweight + _products(columns, rows, xp)
    return xp.reshape(gweight, (F, *geometry.size, C // groups))


def pad_map(x, padding: tuple[int, int], xp):
    """Surround height and width of (N, H, W, C) with zeros (the standard has no `pad`)."""
    if padding == (0, 0):
        return x
    N, H, W, C = x.shape
    down, right = padding
    padded = xp.zeros((N, H + 2 * down, W + 2 * right, C), dtype=x.dtype, device=x.device)
    padded[:, down : down + H, right : right + W, :] = x
    return padded


def _rows(x, map_: tuple[int, int], geometry: Geometry, xp):
    """Every window of one level as a row, per group: (groups, N*P*Q, taps * C/groups)."""
    N, _, C = x.shape
    groups = geometry.groups
    padded = pad_map(xp.reshape(x, (N, *map_, C)), geometry.padding, xp)
    windows = gather_windows(padded, geometry.size, geometry.stride, geometry.dilation)
    P, Q = windows.shape[1:3]
    if groups == 1:
        return xp.reshape(windows, (1, N * P * Q, geometry.taps * C))
    windows = xp.reshape(windows, (N * P * Q, geometry.taps, groups, C // groups))
    return xp.reshape(
        xp.permute_dims(windows, (2, 0, 1, 3)), (groups, N * P * Q, geometry.taps * (C // groups))
    )


def _group_rows(y, groups: int, xp):
    """(N, S, F) -> (groups, N*S, F/groups): the filters of a group side by side."""
    N, S, F = y.shape
    return xp.permute_dims(xp.reshape(y, (N * S, groups, F // groups)), (1, 0, 2))


def _products(a, b, xp):
    """a @ b in every group.  GPU libraries give products of two axes to the tensor cores, and not of three."""
    if a.shape[0] == 1:
        return xp.expand_dims(a[0, ...] @ b[0, ...], axis=0)
    return xp.stack([a[group, ...] @ b[group, ...] for group in range(a.shape[0])])


def _filters(weight, groups: int, xp):
    """(F, k, k, C/groups) -> (groups, taps * C/groups, F/groups): a column per filter."""
    F = weight.shape[0]
    return xp.matrix_transpose(xp.reshape(weight, (groups, F // groups, -1)))
