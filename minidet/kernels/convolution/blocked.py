"""The textbook's matrix products on NumPy, in blocks that fit the cache and with fewer copies.

Three changes, no new algorithm.  A few images at a time are laid out as rows, so the k*k times larger
matrix is still in the cache when the product reads it.  All levels of a pyramid share one product.  And
at stride 1 the input gradient is again a convolution, of dL/dy with every filter turned around, which
gathers instead of scattering.
"""

from __future__ import annotations

import numpy as np

from minidet.kernels.convolution import definition
from minidet.kernels.convolution.geometry import Geometry
from minidet.kernels.windows import gather_windows

BLOCK = 1 << 20
"""Elements of the row matrix laid out at once: 4 MiB of float32, about what two cores keep in cache."""


def accepts(geometry: Geometry) -> bool:
    """One group: with more, the products are too small for this to matter."""
    return geometry.groups == 1


def convolve(x, weight, bias, scale, shortcut, relu: bool, geometry: Geometry, memo: dict):
    """`definition.convolve`, block by block."""
    N, F = x.shape[0], weight.shape[0]
    filters = weight.reshape(F, -1).T
    y = np.empty((N, geometry.output_pixels, F), dtype=np.result_type(x, weight))
    for images, rows in _blocks(x, geometry):
        block = y[images]
        np.matmul(rows, filters, out=block.reshape(-1, F))
        # The epilogue runs while the block is still in cache.
        if scale is not None:
            block *= scale
        if bias is not None:
            block += bias
        if shortcut is not None:
            block += shortcut[images]
        if relu:
            np.maximum(block, 0, out=block)
    return y


def convolve_input_gradient(gy, weight, geometry: Geometry, memo: dict):
    """`definition.convolve_input_gradient`, as a convolution where the stride is 1."""
    back = tuple(
        dilation * (k - 1) - pad
        for k, pad, dilation in zip(geometry.size, geometry.padding, geometry.dilation, strict=True)
    )
    spread = Geometry(geometry.output_maps, geometry.size, (1, 1), back, geometry.dilation)
    # A map smaller than the window has no output at all, and nothing to grow back from.
    if geometry.stride == (1, 1) and min(back) >= 0 and spread.output_maps == geometry.maps:
        turned = weight[:, ::-1, ::-1, :].transpose(3, 1, 2, 0)  # (C, k, k, F)
        return convolve(gy, np.ascontiguousarray(turned), None, None, None, False, spread, memo)
    if geometry.size == (1, 1) and geometry.padding == (0, 0):
        return _spread_points(gy, weight, geometry)
    return definition.convolve_input_gradient(gy, weight, geometry, memo)


def convolve_weight_gradient(x, gy, geometry: Geometry):
    """`definition.convolve_weight_gradient`, block by block."""
    F, C = gy.shape[2], x.shape[2]
    gweight = np.zeros((F, geometry.taps * C), dtype=np.result_type(x, gy))
    for images, rows in _blocks(x, geometry):
        gweight += gy[images].reshape(-1, F).T @ rows
    return gweight.reshape(F, *geometry.size, C)


def _spread_points(gy, weight, geometry: Geometry):
    """The input gradient of a strided 1x1 convolution: every output came from one pixel."""
    N, C = gy.shape[0], weight.shape[3]
    gx = np.zeros((N, geometry.pixels, C), dtype=np.result_type(gy, weight))
    down, right = geometry.stride
    for map_, inside, (P, Q), output_inside in geometry.levels():
        points = gy[:, output_inside, :].reshape(-1, gy.shape[2]) @ weight.reshape(-1, C)
        gx[:, inside, :].reshape(N, *map_, C)[:, ::down, ::right][:, :P, :Q] = points.reshape(N, P, Q, C)
    return gx


def _blocks(x, geometry: Geometry):
    """Some images at a time, with their windows as rows: (images * S', taps * C).

    The rows live in one buffer that the next block overwrites.
    """
    N, _, C = x.shape
    width = geometry.taps * C
    if geometry.is_matrix_product:
        yield slice(0, N), x.reshape(-1, C)
        return
    step = min(N, max(1, BLOCK // max(1, geometry.output_pixels * width)))
    buffer = np.empty((step, geometry.output_pixels, width), dtype=x.dtype)
    for start in range(0, N, step):
        images = slice(start, min(N, start + step))
        rows = buffer[: images.stop - start]
        for map_, inside, (P, Q), output_inside in geometry.levels():
            level = x[images, inside, :].reshape(len(rows), *map_, C)
            padded = definition.pad_map(level, geometry.padding, np)
            windows = gather_windows(padded, geometry.size, geometry.stride, geometry.dilation)
            rows[:, output_inside, :].reshape(len(rows), P, Q, *geometry.size, C)[...] = windows
        yield images, rows.reshape(-1, width)
