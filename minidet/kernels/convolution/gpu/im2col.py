"""The textbook's rows and matrix products, with fewer of them and without copies where a row is a pixel.

All products have two axes: those CuPy gives to the tensor cores.
"""

from __future__ import annotations

from minidet import backend
from minidet.kernels.convolution import definition
from minidet.kernels.convolution.geometry import Geometry, geometry_of
from minidet.kernels.convolution.gpu.cuda import single
from minidet.kernels.windows import gather_windows


def accepts(x, geometry: Geometry) -> bool:
    """One group, and something to compute."""
    return geometry.groups == 1 and x.shape[0] * geometry.output_pixels > 0


def convolve(x, weight, bias, scale, shortcut, relu: bool, geometry: Geometry, memo: dict):
    """`definition.convolve`."""
    xp, N, F = backend.namespace(x), x.shape[0], weight.shape[0]
    filters = xp.matrix_transpose(xp.reshape(weight, (F, -1)))
    products = [xp.reshape(rows @ filters, (N, -1, F)) for rows, _ in _rows(x, geometry, xp)]
    y = products[0] if len(products) == 1 else xp.concat(products, axis=1)
    if scale is not None:
        y = y * single(scale)
    if bias is not None:
        y = y + single(bias)
    if shortcut is not None:
        y = y + single(shortcut)
    y = xp.maximum(y, xp.zeros_like(y)) if relu else y
    return xp.astype(y, x.dtype, copy=False)


def convolve_input_gradient(gy, weight, geometry: Geometry, memo: dict):
    """`definition.convolve_input_gradient`, as a convolution where the stride is 1."""
    xp, N, C = backend.namespace(gy), gy.shape[0], weight.shape[3]
    rules = zip(geometry.size, geometry.padding, geometry.dilation, strict=True)
    back = tuple(dilation * (k - 1) - pad for k, pad, dilation in rules)
    spread = geometry_of(geometry.output_maps, geometry.size, (1, 1), back, geometry.dilation)
    if geometry.stride == (1, 1) and min(back) >= 0 and spread.output_maps == geometry.maps:
        turned = xp.permute_dims(weight[:, ::-1, ::-1, :], (3, 1, 2, 0))  # (C, k, l, F)
        return convolve(gy, turned, None, None, None, False, spread, memo)
    if geometry.size != (1, 1) or geometry.padding != (0, 0):
        return definition.convolve_input_gradient(gy, weight, geometry, memo)
    gx, (down, right) = xp.zeros((N, geometry.pixels, C), dtype=gy.dtype, device=gy.device), geometry.stride
    for (H, W), inside, (P, Q), outside in geometry.levels():  # every output came from one pixel
        map_ = xp.zeros((N, H, W, C), dtype=gy.dtype, device=gy.device)
        points = xp.reshape(gy[:, outside, :], (N * P * Q, -1)) @ xp.reshape(weight, (-1, C))
        map_[:, : (P - 1) * down + 1 : down, : (Q - 1) * right + 1 : right, :] = xp.reshape(points, (N, P, Q, C))
        gx[:, inside, :] = xp.reshape(map_, (N, H * W, C))
    return gx


def convolve_weight_gradient(x, gy, geometry: Geometry):
    """`definition.convolve_weight_gradient`; the sum over levels is float32 also of bfloat16."""
    xp, F = backend.namespace(x), gy.shape[2]
    total = None
    for rows, outside in _rows(x, geometry, xp):
        product = single(xp.matrix_transpose(xp.reshape(gy[:, outside, :], (-1, F))) @ rows)
        total = product if total is None else total + product
    return xp.reshape(total, (F, *geometry.size, x.shape[2]))


def _rows(x, geometry: Geometry, xp):
    """Windows as rows, (N*P*Q, taps * C), and where the outputs lie: level by level, or all at once without a copy."""
    N, _, C = x.shape
    if geometry.is_matrix_product:
        yield xp.reshape(x, (-1, C)), slice(0, geometry.pixels)
        return
    for map_, inside, (P, Q), outside in geometry.levels():
        padded = definition.pad_map(xp.reshape(x[:, inside, :], (N, *map_, C)), geometry.padding, xp)
        windows = gather_windows(padded, geometry.size, geometry.stride, geometry.dilation)
        yield xp.reshape(windows, (N * P * Q, geometry.taps * C)), outside
