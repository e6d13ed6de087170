"""Which of this engine's convolutions runs, and when: the only file choose.py knows.

    winograd4  float32, one group, 3x3 at stride 1, enough tiles: F(4x4, 3x3), but for very many weights
    winograd2  the same with very many weights, or too few tiles of 4x4: F(2x2, 3x3)
    direct     float32, one group, at least LEAST_CHANNELS channels on either side
    stem       float32, one group, fewer channels than that; not the gradient of its input, which nobody needs
    grouped    the direct convolution of each group by itself, where groups have that many channels

Everything else (float64, groups of few channels) is left to whoever registers next.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numba
import numpy as np

from minidet.kernels.convolution.cpu import winograd
from minidet.kernels.convolution.cpu.direct import NOTHING, gathered_product
from minidet.kernels.convolution.cpu.lanes import LANES
from minidet.kernels.convolution.cpu.panels import padded
from minidet.kernels.convolution.cpu.plan import forward_plan, input_gradient_plan
from minidet.kernels.convolution.cpu.stem import row_gradients, row_products
from minidet.kernels.convolution.cpu.weight_gradient import outer_products
from minidet.kernels.convolution.cpu.winograd_gradient import pointwise_products
from minidet.kernels.convolution.geometry import Geometry
from minidet.kernels.kernel import Kernel

LEAST_CHANNELS = 8
"""With fewer, the loop over the channels of one tap is too short for its own set-up."""


def register(convolve: Kernel, input_gradient: Kernel, weight_gradient: Kernel, add_input_gradient: Kernel) -> None:
    """Put this engine's versions into the kernels, fastest first."""
    for side in (4, 2):
        version = f"winograd{side}"
        convolve.faster_on(
            "numpy", version, when=lambda x, w, *rest, side=side: winograd_accepts(x, w, rest[-2], side)
        )(partial(winograd_forward, side=side))
        input_gradient.faster_on(
            "numpy", version, when=lambda gy, w, g, memo, side=side: winograd_gradient_accepts(gy, w, g, side)
        )(partial(winograd_input_gradient, side=side))
        add_input_gradient.faster_on(
            "numpy", version, when=lambda before, gy, w, g, memo, side=side: winograd_gradient_accepts(gy, w, g, side)
        )(lambda before, *args, side=side: winograd_input_gradient(*args, before, side=side))
        weight_gradient.faster_on(
            "numpy", version, when=lambda x, gy, g, side=side: winograd_weight_gradient_accepts(x, gy, g, side)
        )(partial(winograd_weight_gradient, side=side))
    convolve.faster_on(
        "numpy", "direct", when=lambda x, weight, *rest: direct_accepts(x, weight, rest[-2])
    )(direct)
    convolve.faster_on(
        "numpy", "stem", when=lambda x, weight, *rest: stem_accepts(x, weight, rest[-2])
    )(stem)
    input_gradient.faster_on(
        "numpy", "direct", when=lambda gy, weight, g, memo: direct_accepts(gy, weight, g)
    )(direct_input_gradient)
    add_input_gradient.faster_on(
        "numpy", "direct", when=lambda before, gy, weight, g, memo: direct_accepts(gy, weight, g)
    )(lambda before, *args: direct_input_gradient(*args, before))
    weight_gradient.faster_on("numpy", "direct", when=weight_gradient_accepts)(direct_weight_gradient)
    weight_gradient.faster_on("numpy", "stem", when=stem_accepts)(stem_weight_gradient)
    convolve.faster_on(
        "numpy", "grouped", when=lambda x, weight, *rest: grouped_accepts(x, weight, rest[-2])
    )(grouped)
    input_gradient.faster_on(
        "numpy", "grouped", when=lambda gy, weight, g, memo: grouped_accepts(gy, weight, g)
    )(grouped_input_gradient)
    weight_gradient.faster_on("numpy", "grouped", when=grouped_weight_gradient_accepts)(grouped_weight_gradient)


def winograd_accepts(x, weight, geometry: Geometry, side: int) -> bool:
    """Whether Winograd's convolution may run, and pays."""
    # Most convolutions are not 3x3: what is asked first costs least.
    return geometry.size == (3, 3) and direct_accepts(x, weight, geometry) and winograd.worthwhile(
        geometry, x.shape[0], weight.shape[0] * weight.shape[3], side, winograd.LEAST_TILES
    )


def winograd_gradient_accepts(gy, weight, geometry: Geometry, side: int) -> bool:
    """The same for the convolution that makes the input gradient; a map smaller than 3x3 may have none."""
    if geometry.size != (3, 3):
        return False
    spread = winograd.spread(geometry)
    return winograd_accepts(gy, weight, spread, side) and spread.output_maps == geometry.maps


def winograd_weight_gradient_accepts(x, gy, geometry: Geometry, side: int) -> bool:
    """Whether Winograd's gradient of the weights may run, and pays."""
    return geometry.size == (3, 3) and weight_gradient_accepts(x, gy, geometry) and winograd.worthwhile(
        geometry, x.shape[0], x.shape[2] * gy.shape[2], side, winograd.LEAST_IN_GRADIENT
    )


def winograd_forward(x, weight, bias, scale, shortcut, relu: bool, geometry: Geometry, memo: dict, *, side: int):
    """`definition.convolve` of 3x3 filters at stride 1."""
    plan = winograd.tiling(geometry, x.shape[0], side)
    ends = {"scale": scale, "bias": bias, "shortcut": _added(shortcut), "relu": relu}
    return winograd.tiled_product(_ready(x), plan, _ready(weight), memo, geometry.output_pixels, **ends)


def winograd_input_gradient(gy, weight, geometry: Geometry, memo: dict, before=None, *, side: int):
    """`definition.convolve_input_gradient` of 3x3 filters at stride 1, plus what was there before."""
    plan = winograd.tiling(winograd.spread(geometry), gy.shape[0], side)
    how = {"shortcut": _added(before), "turned": True}
    return winograd.tiled_product(_ready(gy), plan, _ready(weight), memo, geometry.pixels, **how)


def winograd_weight_gradient(x, gy, geometry: Geometry, *, side: int):
    """`definition.convolve_weight_gradient` of 3x3 filters at stride 1."""
    return pointwise_products(_ready(x), _ready(gy), winograd.tiling(geometry, x.shape[0], side))


def direct_accepts(x, weight, geometry: Geometry) -> bool:
    """Whether the direct convolution may run; the same rule for x and for the gradient of y."""
    return _plain(x, weight, geometry) and min(weight.shape[0], weight.shape[3]) >= LEAST_CHANNELS


def weight_gradient_accepts(x, gy, geometry: Geometry) -> bool:
    """Whether the direct gradient of the weights may run."""
    return _plain(x, gy, geometry) and min(x.shape[2], gy.shape[2]) >= LEAST_CHANNELS


def direct(x, weight, bias, scale, shortcut, relu: bool, geometry: Geometry, memo: dict):
    """`definition.convolve`."""
    plan = forward_plan(geometry, x.shape[0])
    ends = {"scale": scale, "bias": bias, "shortcut": _added(shortcut), "relu": relu}
    return gathered_product(_ready(x), plan, _taps(weight), memo, **ends)


def direct_input_gradient(gy, weight, geometry: Geometry, memo: dict, before=None):
    """`definition.convolve_input_gradient`, plus what was there before: the product over the table of who read whom."""
    plan = input_gradient_plan(geometry, gy.shape[0])
    return gathered_product(_ready(gy), plan, _taps(weight), memo, shortcut=_added(before), turned=True)


def direct_weight_gradient(x, gy, geometry: Geometry):
    """`definition.convolve_weight_gradient`."""
    plan = forward_plan(geometry, x.shape[0])
    C, F = x.shape[2], gy.shape[2]
    return outer_products(_ready(x), _ready(gy), plan, depth=C).reshape(F, *geometry.size, C)


def stem_accepts(x, other, geometry: Geometry) -> bool:
    """Whether a row of the window may be one tap: few channels, side by side."""
    return _plain(x, other, geometry) and x.shape[2] < LEAST_CHANNELS and geometry.dilation[1] == 1


def stem(x, weight, bias, scale, shortcut, relu: bool, geometry: Geometry, memo: dict):
    """`definition.convolve` over few channels."""
    ends = {"scale": scale, "bias": bias, "shortcut": _added(shortcut), "relu": relu}
    return row_products(_ready(x), _ready(weight), memo, geometry, **ends)


def stem_weight_gradient(x, gy, geometry: Geometry):
    """`definition.convolve_weight_gradient` over few channels."""
    F = gy.shape[2]
    if F % LANES:
        whole = np.zeros((*gy.shape[:2], padded(F)), dtype=np.float32)
        whole[:, :, :F] = gy
        gy = whole
    return row_gradients(_ready(x), _ready(gy), geometry)[:F]


def grouped_accepts(x, weight, geometry: Geometry) -> bool:
    """Whether the direct convolution may run in every group; the same rule for x and for the gradient of y."""
    groups = geometry.groups
    least = min(weight.shape[0] // groups, weight.shape[3])
    return groups > 1 and _plain(x, weight, replace(geometry, groups=1)) and least >= LEAST_CHANNELS


def grouped_weight_gradient_accepts(x, gy, geometry: Geometry) -> bool:
    """Whether the direct gradient of the weights may run in every group."""
    groups = geometry.groups
    least = min(x.shape[2], gy.shape[2]) // groups
    return groups > 1 and _plain(x, gy, replace(geometry, groups=1)) and least >= LEAST_CHANNELS


def grouped(x, weight, bias, scale, shortcut, relu: bool, geometry: Geometry, memo: dict):
    """`definition.convolve` with groups: each is a convolution by itself."""
    one, groups = replace(geometry, groups=1), geometry.groups
    filters = _share(weight.shape[0], groups)
    parts = []
    for i, (c, f) in enumerate(zip(_share(x.shape[2], groups), filters, strict=True)):
        ends = _part(bias, f), _part(scale, f), None if shortcut is None else shortcut[..., f], relu
        parts.append(direct(x[..., c], weight[f], *ends, one, memo.setdefault(("group", i), {})))
    return np.concatenate(parts, axis=2)


def grouped_input_gradient(gy, weight, geometry: Geometry, memo: dict):
    """`definition.convolve_input_gradient` with groups."""
    one, groups = replace(geometry, groups=1), geometry.groups
    parts = [
        direct_input_gradient(gy[..., f], weight[f], one, memo.setdefault(("group", i), {}))
        for i, f in enumerate(_share(gy.shape[2], groups))
    ]
    return np.concatenate(parts, axis=2)


def grouped_weight_gradient(x, gy, geometry: Geometry):
    """`definition.convolve_weight_gradient` with groups."""
    one, groups = replace(geometry, groups=1), geometry.groups
    pairs = zip(_share(x.shape[2], groups), _share(gy.shape[2], groups), strict=True)
    return np.concatenate([direct_weight_gradient(x[..., c], gy[..., f], one) for c, f in pairs])


def _share(channels: int, groups: int) -> list[slice]:
    """The channels of every group."""
    each = channels // groups
    return [slice(i * each, (i + 1) * each) for i in range(groups)]


def _part(values, share: slice):
    return None if values is None else values[share]


def _plain(a, b, geometry: Geometry) -> bool:
    """What every version here needs.  Without the compiler there are no intrinsics."""
    return (
        a.dtype == np.float32
        and b.dtype == np.float32
        and geometry.groups == 1
        and a.shape[0] * geometry.pixels * geometry.output_pixels > 0
        and not numba.config.DISABLE_JIT
    )


def _taps(weight):
    """(F, k, k, C) -> (F, taps, C)."""
    F, k, l, C = weight.shape  # noqa: E741
    return _ready(weight).reshape(F, k * l, C)


def _added(shortcut):
    """The shortcut, flat."""
    return NOTHING if shortcut is None else _ready(shortcut).reshape(-1)


def _ready(array):
    """`array` itself where it is contiguous and writeable, else a copy: one compiled function for all."""
    return array if array.flags.c_contiguous and array.flags.writeable else np.array(array, order="C")
