"""Convolution on tensor cores by our own kernel: implicit.cu, and here what surrounds it.

It never lays out a row: a block of threads copies the pieces of windows that it multiplies next.  The gradient of
the input is the same kernel with another plan, whatever the stride.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from minidet import backend
from minidet.kernels.convolution.geometry import Geometry
from minidet.kernels.convolution.gpu import cuda
from minidet.kernels.convolution.gpu.cuda import ready, single

FILE = "implicit.cu"
TILE, THREADS, SHARED_BYTES, MOST_LEVELS = 128, 256, 3 * 16384, 8  # as in the .cu file
SLAB_BYTES = 64

BLOCKS = 512
"""Blocks of threads that a weight gradient is shared out to, about: two on each multiprocessor, twice over."""

CHANNELS = 8
"""Channels come in pieces of 16 bytes and results in pairs: their numbers are filled up to a multiple of this."""


def accepts(x, geometry: Geometry, channels: int, filters: int) -> bool:
    """Whether the kernels can do this; `x` is the input or the gradient of the output."""
    return (
        (cuda.is_bfloat16(x) or (x.dtype == np.float32 and backend.tf32()))
        and geometry.groups == 1
        and len(geometry.maps) <= MOST_LEVELS
        and 0 < x.shape[0] * max(geometry.pixels, geometry.output_pixels) < 2**31
        and min(geometry.pixels, geometry.output_pixels) > 0
        and cuda.capability(cuda.device()) >= 80
    )


def convolve(x, weight, bias, scale, shortcut, relu: bool, geometry: Geometry, memo: dict):
    """`definition.convolve`."""
    F = weight.shape[0]
    if "implicit" not in memo:
        memo["implicit"] = ready(_full(_full(weight, 3), 0))
    y = _run(x, memo["implicit"], bias, scale, shortcut, relu, geometry.output_pixels, forward_plan, geometry)
    return y if y.shape[2] == F else ready(y[:, :, :F])


def convolve_input_gradient(gy, weight, geometry: Geometry, memo: dict):
    """`definition.convolve_input_gradient`."""
    C, xp = weight.shape[3], backend.namespace(gy)
    if "implicit transposed" not in memo:  # a row per channel, along which the kernel sums over filters
        memo["implicit transposed"] = ready(xp.permute_dims(_full(_full(weight, 3), 0), (3, 1, 2, 0)))
    filters = memo["implicit transposed"]
    gx = _run(gy, filters, None, None, None, False, geometry.pixels, input_gradient_plan, geometry)
    return gx if gx.shape[2] == C else ready(gx[:, :, :C])


def convolve_weight_gradient(x, gy, geometry: Geometry):
    """`definition.convolve_weight_gradient`, in float32 also of bfloat16: sums over all pixels leave unrounded."""
    gweight = _correlated(_full(x, 2), _full(gy, 2), geometry)
    return gweight[: gy.shape[2], :, :, : x.shape[2]]


def _correlated(x, gy, geometry: Geometry):
    N, _, C = x.shape
    F, xp = gy.shape[2], backend.namespace(x)
    length, pixels = geometry.taps * C, N * geometry.output_pixels
    tiles, slab = -(-F // TILE) * -(-length // TILE), SLAB_BYTES // x.dtype.itemsize
    # Each block sums over so many pixels, in whole slabs, and writes a share of the gradient.
    share = slab * max(8, -(-pixels * tiles // (BLOCKS * slab)))
    shares = xp.empty((-(-pixels // share), F, *geometry.size, C), dtype=xp.float32, device=x.device)
    args = (ready(x), ready(gy), shares, _plan(forward_plan, geometry, N, C, F, x), share)
    cuda.launch(FILE, f"correlate_{cuda.numbers(x)}", (tiles, shares.shape[0]), THREADS, SHARED_BYTES, args)
    return xp.sum(shares, axis=0) if shares.shape[0] > 1 else shares[0, ...]


def _run(x, weight, bias, scale, shortcut, relu: bool, pixels: int, make, geometry: Geometry):
    """The forward kernel by the plan that `make` makes; the result has so many pixels."""
    x, N, F, C = _full(x, 2), x.shape[0], weight.shape[0], weight.shape[3]
    bias, scale = (a if a is None else ready(_full(single(a), 0)) for a in (bias, scale))
    shortcut = None if shortcut is None else ready(_full(shortcut, 2))
    y = backend.namespace(x).empty((N, pixels, F), dtype=x.dtype, device=x.device)
    args = (ready(x), weight, scale, bias, shortcut, y, _plan(make, geometry, N, C, F, x), int(relu))
    blocks = -(-N * pixels // TILE) * -(-F // TILE)
    cuda.launch(FILE, f"convolve_{cuda.numbers(x)}", (blocks, 1), THREADS, SHARED_BYTES, args)
    return y


def _full(a, axis: int):
    """`a` with zeros after its end along an axis, up to a multiple of CHANNELS."""
    count = a.shape[axis]
    if count % CHANNELS == 0:
        return a
    shape = (*a.shape[:axis], -(-count // CHANNELS) * CHANNELS, *a.shape[axis + 1 :])
    full = backend.namespace(a).zeros(shape, dtype=a.dtype, device=a.device)
    full[(*(slice(None),) * axis, slice(count))] = a
    return full


def forward_plan(geometry: Geometry, images: int, channels: int, filters: int) -> np.ndarray:
    """The struct Plan of implicit.cu: output p reads row p * stride + i * dilation - padding."""
    levels = [(*map_, inside.start, *out, outside.start) for map_, inside, out, outside in geometry.levels()]
    return _struct(
        (images, channels, filters, *geometry.size),
        (geometry.stride, geometry.dilation, [-n for n in geometry.padding], (1, 1)),
        (geometry.pixels, geometry.output_pixels),
        levels,
    )


def input_gradient_plan(geometry: Geometry, images: int, channels: int, filters: int) -> np.ndarray:
    """Row h was read by output (h - i * dilation + padding) / stride, where that is a whole number."""
    levels = [(*out, outside.start, *map_, inside.start) for map_, inside, out, outside in geometry.levels()]
    return _struct(
        (images, channels, filters, *geometry.size),
        ((1, 1), [-n for n in geometry.dilation], geometry.padding, geometry.stride),
        (geometry.output_pixels, geometry.pixels),
        levels,
    )


def _struct(sizes, rules, pixels, levels) -> np.ndarray:
    unused = (0,) * (6 * (MOST_LEVELS - len(levels)))
    numbers = (*sizes, *sum(map(tuple, rules), ()), *pixels, len(levels), *sum(levels, ()), *unused)
    return np.asarray(numbers, np.int32)


def _plan(make, geometry: Geometry, images: int, channels: int, filters: int, x):
    xp = backend.namespace(x)
    return _moved(make, geometry, images, channels, filters, xp, cuda.device())


@lru_cache(maxsize=4096)
def _moved(make, geometry: Geometry, images: int, channels: int, filters: int, xp, device: int):
    """A plan on the device, copied there once."""
    return xp.asarray(make(geometry, images, channels, filters))
