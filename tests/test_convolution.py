"""The convolution's definition against plain loops, and every faster version against the definition."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from minidet import backend
from minidet.kernels import convolve, convolve_input_gradient, convolve_weight_gradient, only
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

BOUND = {"winograd": 1e-4, "direct": 1e-5, "stem": 1e-5, "blocked": 1e-5}
"""Error of a float32 version against float64, over sqrt(taps * C) * rms(x) * rms(weight)."""


def naive(x, weight, bias, scale, relu, geometry):
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
    x, weight, bias, scale, _ = problem(rng, geometry, *sizes)
    for b, s, relu in ((None, None, False), (bias, None, True), (bias, scale, False), (None, scale, True)):
        arrays = [None if a is None else xp.asarray(a) for a in (x, weight, b, s)]
        y = definition.convolve(*arrays, relu, geometry, {})
        np.testing.assert_allclose(backend.to_numpy(y), naive(x, weight, b, s, relu, geometry), atol=1e-12)


@pytest.mark.parametrize("library", ["numpy", "array_api_strict"])
@pytest.mark.parametrize("case", HAND_PICKED)
def test_both_gradients_are_the_transposes_of_the_forward_pass(case, library, rng):
    """<conv(x, w), g> = <x, dL/dx> = <w, dL/dw>, because a convolution is linear in x and in w."""
    xp = backend.load(library)
    geometry, *sizes = HAND_PICKED[case]
    x, weight, _, _, gy = map(xp.asarray, problem(rng, geometry, *sizes))
    product = dot(definition.convolve(x, weight, None, None, False, geometry, {}), gy)
    assert dot(x, definition.convolve_input_gradient(gy, weight, geometry, {})) == pytest.approx(product)
    assert dot(weight, definition.convolve_weight_gradient(x, gy, geometry)) == pytest.approx(product)


def dot(a, b) -> float:
    return float(np.sum(backend.to_numpy(a).astype(np.float64) * backend.to_numpy(b)))


FEW, MANY, WHOLE = [1, 2, 3, 5], [8, 9, 16, 17, 31, 32, 36, 40, 64], [32, 64]
SIZES, SQUARE = [(1, 1), (3, 3), (3, 3), (2, 3), (5, 1), (4, 4)], [(3, 3)]
STRIDES, ONES = [(1, 1), (1, 1), (2, 2), (1, 2), (3, 2)], [(1, 1)]
DILATIONS = [(1, 1), (1, 1), (2, 2), (1, 3)]


def random_cases(count: int, channels=MANY, filters=MANY, sizes=SIZES, strides=STRIDES, dilations=DILATIONS):
    """Small random convolutions: odd sizes, tails of every kind, maps of one pixel, several levels."""
    rng = np.random.default_rng(7)
    cases = []
    while len(cases) < count:
        levels = int(rng.integers(1, 4))
        maps = tuple(tuple(map(int, rng.integers(1, 14, 2))) for _ in range(levels))
        size = tuple(map(int, rng.choice(sizes)))
        stride = tuple(map(int, rng.choice(strides)))
        padding = tuple(map(int, rng.integers(0, 3, 2)))
        dilation = tuple(map(int, rng.choice(dilations)))
        geometry = Geometry(maps, size, stride, padding, dilation)
        N = int(rng.integers(1, 6))
        C, F = int(rng.choice(channels)), int(rng.choice(filters))
        if geometry.output_pixels:
            cases.append((geometry, N, C, F))
    return cases


def settle(version, geometry, N, C, F, rng):
    """Hold forward pass and both gradients of a float32 version to the definition in float64."""
    x, weight, bias, scale, gy = problem(rng, geometry, N, C, F, np.float32)
    scale = np.abs(scale) / np.abs(scale).max()
    wide = [a.astype(np.float64) for a in (x, weight, bias, scale, gy)]
    calls = [
        (convolve, (x, weight, bias, scale, True, geometry, {}), (*wide[:4], True, geometry, {}), C),
        (convolve, (x, weight, None, None, False, geometry, {}), (*wide[:2], None, None, False, geometry, {}), C),
        (convolve_input_gradient, (gy, weight, geometry, {}), (wide[4], wide[1], geometry, {}), F),
        (convolve_weight_gradient, (x, gy, geometry), (wide[0], wide[4], geometry), None),
    ]
    ran = 0
    for kernel, arguments, exact, depth in calls:
        if f"numpy:{version}" not in kernel.fast:
            continue
        with only(version):
            name, run = kernel.choose(*arguments)
            if name == "textbook":
                continue
            assert name == f"numpy:{version}"
            got = run(*arguments)
        assert got.dtype == np.float32
        terms = geometry.taps * depth if depth else N * geometry.output_pixels
        rms = [math.sqrt(np.mean(np.square(a))) for a in exact[:2]]
        error = np.abs(got - kernel.textbook(*exact)).max() / (math.sqrt(terms) * math.prod(rms))
        assert error <= BOUND[version], f"{kernel.__name__} {geometry} {N=} {C=} {F=}: {error:.1e}"
        ran += 1
    return ran


@pytest.mark.parametrize("version", BOUND)
def test_a_fast_version_equals_the_definition(version, rng, monkeypatch):
    choices = {}
    if version != "blocked":
        engine(version)
    if version == "stem":
        choices = {"channels": FEW}
    if version == "winograd":  # also where it does not pay
        monkeypatch.setattr("minidet.kernels.convolution.cpu.winograd.LEAST_TILES", 1)
        monkeypatch.setattr("minidet.kernels.convolution.cpu.winograd.PIXELS_PER_TILE", 0)
        choices = dict(channels=WHOLE, filters=WHOLE, sizes=SQUARE, strides=ONES, dilations=ONES)
    assert sum(settle(version, *case, rng) for case in random_cases(60, **choices)) >= 70


def engine(version):
    """Skip where the compiled convolutions are not installed: everything works without them."""
    if f"numpy:{version}" not in convolve.fast:
        pytest.skip("the package is installed without kernels/convolution/cpu")


def test_winograd_transforms_are_a_short_convolution(rng):
    """A'[(G w) * (B' d)] is the four sums of a 1-D convolution of six numbers with three."""
    transform = pytest.importorskip("minidet.kernels.convolution.cpu.transform")
    d, w = rng.normal(size=6), rng.normal(size=3)
    products = np.multiply(transform.weight_transform(w), transform.input_transform(d))
    np.testing.assert_allclose(transform.output_transform(products), np.correlate(d, w), atol=1e-14)


@pytest.mark.parametrize("version", ["direct", "blocked"])
def test_fast_gradients_are_transposes_too(version, rng):
    if version != "blocked":
        engine(version)
    geometry = Geometry(((13, 9), (5, 4), (1, 1)), (3, 3), (2, 2), (1, 1))
    x, weight, _, _, gy = problem(rng, geometry, 2, 20, 24, np.float32)
    with only(version):
        product = dot(convolve(x, weight, None, None, False, geometry, {}), gy)
        assert dot(x, convolve_input_gradient(gy, weight, geometry, {})) == pytest.approx(product, rel=1e-4)
        assert dot(weight, convolve_weight_gradient(x, gy, geometry)) == pytest.approx(product, rel=1e-4)


def test_which_version_runs(rng):
    engine("direct")
    geometry = Geometry(((8, 8),), (3, 3), (1, 1), (1, 1))
    x, weight, *_, gy = problem(rng, geometry, 2, 16, 16, np.float32)
    assert convolve.choose(x, weight, None, None, False, geometry, {})[0] == "numpy:direct"
    assert convolve_input_gradient.choose(gy, weight, geometry, {})[0] == "numpy:direct"
    assert convolve_weight_gradient.choose(x, gy, geometry)[0] == "numpy:direct"
    big = Geometry(((32, 32),), (3, 3), (1, 1), (1, 1))
    large = problem(rng, big, 2, 64, 32, np.float32)
    assert convolve.choose(*large[:2], None, None, False, big, {})[0] == "numpy:winograd"
    assert convolve_input_gradient.choose(large[4], large[1], big, {})[0] == "numpy:winograd"
    photo, filters = np.ones((1, 64, 3), np.float32), np.ones((16, 3, 3, 3), np.float32)
    assert convolve.choose(photo, filters, None, None, False, geometry, {})[0] == "numpy:stem"
    assert convolve_weight_gradient.choose(photo, gy[:1], geometry)[0] == "numpy:stem"
    wide = x.astype(np.float64), weight.astype(np.float64)
    assert convolve.choose(*wide, None, None, False, geometry, {})[0] == "numpy:blocked"
    grouped = Geometry(((8, 8),), (3, 3), groups=2)
    assert convolve.choose(x, weight[..., :8], None, None, False, grouped, {})[0] == "textbook"


@pytest.mark.parametrize(("map_", "version"), [((6, 7), "direct"), ((32, 32), "winograd")])
def test_a_memo_changes_nothing(map_, version, rng):
    engine(version)
    geometry = Geometry((map_, (2, 2)), (3, 3), (1, 1), (1, 1))
    x, weight, bias, _, gy = problem(rng, geometry, 2, 32, 64, np.float32)
    assert convolve.choose(x, weight, bias, None, True, geometry, {})[0] == f"numpy:{version}"
    memo = {}
    for _ in range(2):  # the second time everything derived from the weights is there
        y = convolve(x, weight, bias, None, True, geometry, memo)
        gx = convolve_input_gradient(gy, weight, geometry, memo)
    assert memo
    np.testing.assert_array_equal(y, convolve(x, weight, bias, None, True, geometry, {}))
    np.testing.assert_array_equal(gx, convolve_input_gradient(gy, weight, geometry, {}))


def test_arrays_need_not_lie_in_order(rng):
    """Read-only, transposed and strided arguments give what their copies give."""
    geometry = Geometry(((5, 6),), (3, 3), (1, 1), (1, 1))
    x, weight, *_, gy = problem(rng, geometry, 4, 16, 24, np.float32)
    views = [np.moveaxis(np.moveaxis(a, 0, -1).copy(), -1, 0) for a in (x, weight, gy)]
    views[0].flags.writeable = False
    for kernel, arguments, others in (
        (convolve, (x, weight, None, None, False, geometry, {}), (*views[:2], None, None, False, geometry, {})),
        (convolve_input_gradient, (gy, weight, geometry, {}), (views[2], views[1], geometry, {})),
        (convolve_weight_gradient, (x, gy, geometry), (views[0], views[2], geometry)),
    ):
        np.testing.assert_allclose(kernel(*arguments), kernel(*others), atol=1e-4)


def test_nan_passes_through_the_rectifier(rng):
    """A broken loss must stay visible: max(NaN, 0) is NaN."""
    geometry = Geometry(((4, 4),), (1, 1))
    x, weight, *_ = problem(rng, geometry, 1, 8, 16, np.float32)
    x[0, 5] = np.nan
    y = convolve(x, weight, None, None, True, geometry, {})
    assert np.isnan(y[0, 5]).all() and not np.isnan(np.delete(y, 5, axis=1)).any()


@pytest.mark.parametrize("lanes", [4, 8])
def test_other_vector_widths(lanes):
    engine("direct")
    """The same checks on machines with narrower vectors, which this one can imitate."""
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "fast or memo or nan or lie"]
    environment = {**os.environ, "MINIDET_LANES": str(lanes)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
