"""The convolution's definition against plain loops, and what every version of it must cope with."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from minidet import backend
from minidet.kernels import convolve, convolve_input_gradient, convolve_weight_gradient
from minidet.kernels.convolution import Geometry, definition

HAND_PICKED = {
    "one pixel": (Geometry(((1, 1),), (1, 1)), 3, 2, 4),
    "rectangle": (Geometry(((5, 7),), (3, 2), (2, 1), (1, 0)), 2, 3, 5),
    "dilated": (Geometry(((9, 8),), (3, 3), (1, 2), (2, 1), (2, 3)), 1, 2, 3),
    "grouped": (Geometry(((4, 5),), (3, 3), (1, 1), (1, 1), (1, 1), groups=2), 2, 4, 6),
    "depthwise": (Geometry(((6, 4),), (3, 3), (2, 2), (1, 1), (1, 1), groups=4), 2, 4, 4),
    "pyramid": (Geometry(((6, 5), (3, 3), (1, 1)), (3, 3), (1, 1), (1, 1)), 2, 3, 2),
}
"""Geometry, images, channels, filters."""


def naive(x, weight, bias, scale, shortcut, relu, geometry):
    """Seven loops, one multiplication each."""
    N, F = x.shape[0], weight.shape[0]
    in_group, out_group = weight.shape[3], F // geometry.groups
    y = np.zeros((N, geometry.output_pixels, F))
    for (H, W), inside, (P, Q), outside in geometry.levels():
        for n, p, q, f in itertools.product(range(N), range(P), range(Q), range(F)):
            total = 0.0
            for i, j, c in itertools.product(*map(range, (*geometry.size, in_group))):
                h = p * geometry.stride[0] + i * geometry.dilation[0] - geometry.padding[0]
                w = q * geometry.stride[1] + j * geometry.dilation[1] - geometry.padding[1]
                if 0 <= h < H and 0 <= w < W:
                    channel = f // out_group * in_group + c
                    total += weight[f, i, j, c] * x[n, inside.start + h * W + w, channel]
            y[n, outside.start + p * Q + q, f] = total
    y = y if scale is None else y * scale
    y = y if bias is None else y + bias
    y = y if shortcut is None else y + shortcut
    return np.maximum(y, 0) if relu else y


def problem(rng, geometry, N, C, F, dtype=np.float64):
    """x, weight, bias, scale and dL/dy of a convolution."""
    shapes = (N, geometry.pixels, C), (F, *geometry.size, C // geometry.groups), (F,), (F,)
    return [rng.normal(size=shape).astype(dtype) for shape in (*shapes, (N, geometry.output_pixels, F))]


@pytest.mark.parametrize("library", ["numpy", "array_api_strict"])
@pytest.mark.parametrize("case", HAND_PICKED)
def test_the_definition_is_seven_loops(case, library, rng):
    xp = backend.load(library)
    geometry, *sizes = HAND_PICKED[case]
    x, weight, bias, scale, more = problem(rng, geometry, *sizes)
    for b, s, m in ((None,) * 3, (bias, None, None), (bias, scale, more), (None, scale, None), (None, None, more)):
        for relu in (False, True):
            arrays = [None if a is None else xp.asarray(a) for a in (x, weight, b, s, m)]
            y = definition.convolve(*arrays, relu, geometry, {})
            np.testing.assert_allclose(backend.to_numpy(y), naive(x, weight, b, s, m, relu, geometry), atol=1e-12)


@pytest.mark.parametrize("library", ["numpy", "array_api_strict"])
@pytest.mark.parametrize("case", HAND_PICKED)
def test_both_gradients_are_the_transposes_of_the_forward_pass(case, library, rng):
    """<conv(x, w), g> = <x, dL/dx> = <w, dL/dw>, because a convolution is linear in x and in w."""
    xp = backend.load(library)
    geometry, *sizes = HAND_PICKED[case]
    x, weight, _, _, gy = map(xp.asarray, problem(rng, geometry, *sizes))
    product = dot(definition.convolve(x, weight, None, None, None, False, geometry, {}), gy)
    assert dot(x, definition.convolve_input_gradient(gy, weight, geometry, {})) == pytest.approx(product)
    assert dot(weight, definition.convolve_weight_gradient(x, gy, geometry)) == pytest.approx(product)


def dot(a, b) -> float:
    return float(np.sum(backend.to_numpy(a).astype(np.float64) * backend.to_numpy(b)))


def engine(version):
    """Skip where the compiled convolutions are not installed: everything works without them."""
    if f"numpy:{version}" not in convolve.fast:
        pytest.skip("the package is installed without kernels/convolution/cpu")


@pytest.mark.parametrize("side", [4, 2])
def test_winograd_transforms_are_a_short_convolution(side, rng):
    """A'[(G w) * (B' d)] is a 1-D convolution with three weights; A and G' transpose what A' and G do."""
    transform = pytest.importorskip("minidet.kernels.convolution.cpu.transform")
    of_input, of_weight, of_output, of_gradient, of_weight_gradient = (
        getattr(transform, f"{name}_of_{side}") for name in ("input", "weight", "output", "gradient", "weight_gradient")
    )
    d, w = rng.normal(size=side + 2), rng.normal(size=3)
    products = np.multiply(of_weight(w), of_input(d))
    np.testing.assert_allclose(of_output(products), np.correlate(d, w), atol=1e-14)
    matrix = np.array(of_output(np.eye(side + 2)))
    np.testing.assert_allclose(np.array(of_gradient(np.eye(side))), matrix.T, atol=0)
    matrix = np.array(of_weight(np.eye(3)))
    np.testing.assert_allclose(np.array(of_weight_gradient(np.eye(side + 2))), matrix.T, atol=1e-16)


@pytest.mark.parametrize(("map_", "version"), [((6, 7), "direct"), ((32, 32), "winograd4")])
def test_a_memo_changes_nothing(map_, version, rng):
    engine(version)
    geometry = Geometry((map_, (2, 2)), (3, 3), (1, 1), (1, 1))
    x, weight, bias, _, gy = problem(rng, geometry, 2, 32, 64, np.float32)
    assert convolve.choose(x, weight, bias, None, None, True, geometry, {})[0] == f"numpy:{version}"
    memo = {}
    for _ in range(2):  # the second time everything derived from the weights is there
        y = convolve(x, weight, bias, None, None, True, geometry, memo)
        gx = convolve_input_gradient(gy, weight, geometry, memo)
    assert memo
    np.testing.assert_array_equal(y, convolve(x, weight, bias, None, None, True, geometry, {}))
    np.testing.assert_array_equal(gx, convolve_input_gradient(gy, weight, geometry, {}))


def test_arrays_need_not_lie_in_order(rng):
    """Read-only, transposed and strided arguments give what their copies give."""
    geometry = Geometry(((5, 6),), (3, 3), (1, 1), (1, 1))
    x, weight, *_, gy = problem(rng, geometry, 4, 16, 24, np.float32)
    views = [np.moveaxis(np.moveaxis(a, 0, -1).copy(), -1, 0) for a in (x, weight, gy)]
    views[0].flags.writeable, rest = False, (geometry, {})
    for kernel, arguments, others in (
        (convolve, (x, weight, None, None, gy, False, *rest), (*views[:2], None, None, views[2], False, *rest)),
        (convolve_input_gradient, (gy, weight, geometry, {}), (views[2], views[1], geometry, {})),
        (convolve_weight_gradient, (x, gy, geometry), (views[0], views[2], geometry)),
    ):
        np.testing.assert_allclose(kernel(*arguments), kernel(*others), atol=1e-4)


def test_nan_passes_through_the_rectifier(rng):
    """A broken loss must stay visible: max(NaN, 0) is NaN."""
    geometry = Geometry(((4, 4),), (1, 1))
    x, weight, *_ = problem(rng, geometry, 1, 8, 16, np.float32)
    x[0, 5] = np.nan
    y = convolve(x, weight, None, None, None, True, geometry, {})
    assert np.isnan(y[0, 5]).all() and not np.isnan(np.delete(y, 5, axis=1)).any()
