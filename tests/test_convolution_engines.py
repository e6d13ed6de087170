"""Every fast convolution, over random geometry: right to a stated bound, transposes of each other, repeatable."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numba
import numpy as np
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from minidet.kernels import add_input_gradient, convolve, convolve_input_gradient, convolve_weight_gradient, only
from minidet.kernels.convolution import Geometry

KERNELS = (convolve, convolve_input_gradient, convolve_weight_gradient, add_input_gradient)
VERSIONS = list(dict.fromkeys(
    name.removeprefix("numpy:") for kernel in KERNELS for name in kernel.fast if name.startswith("numpy:")
))  # fmt: skip

BOUND = {"winograd4": 1e-4}
"""Largest error against float64, over sqrt(terms in a sum) * rms of both factors, of the versions that are allowed
more than ORDINARY: Winograd's F(4x4, 3x3) subtracts large numbers from one another."""

ORDINARY = 1e-5

WHEN_IT_PAYS = ("winograd.LEAST_TILES", "winograd.LEAST_IN_GRADIENT", "winograd.LEAST_FULL")
"""Limits in kernels/convolution/cpu that are switched off here: a version must be right also where it is slow."""

FEW, MANY = [1, 2, 3, 5], [8, 9, 16, 17, 31, 32, 36, 40, 64]
SIZES, STRIDES = [(3, 3), (1, 1), (2, 3), (5, 1), (4, 4)], [(1, 1), (2, 2), (1, 2), (3, 2)]
DILATIONS = [(1, 1), (2, 2), (1, 3)]


@st.composite
def problems(draw, channels=MANY, filters=MANY, sizes=SIZES, strides=STRIDES, dilations=DILATIONS, groups=(1,)):
    """Geometry, images, channels, filters, seed: odd sizes, tails of every kind, maps of one pixel, several levels."""
    side = st.integers(1, 13)
    maps = draw(st.lists(st.tuples(side, side), min_size=1, max_size=3))
    size, stride, dilation = (draw(st.sampled_from(choices)) for choices in (sizes, strides, dilations))
    padding, parts = draw(st.tuples(*2 * [st.integers(0, 2)])), draw(st.sampled_from(groups))
    geometry = Geometry(tuple(maps), size, stride, padding, dilation, parts)
    assume(geometry.output_pixels > 0)
    C, F = (parts * draw(st.sampled_from(choices)) for choices in (channels, filters))
    return geometry, draw(st.integers(1, 5)), C, F, draw(st.integers(0, 2**32 - 1))


def likes(version: str) -> dict:
    """What to draw for a version that takes only some convolutions."""
    if version.startswith("winograd"):
        return {"sizes": [(3, 3)], "strides": [(1, 1)], "dilations": [(1, 1)]}
    if version == "grouped":
        return {"groups": (2, 3)}
    return {"channels": FEW, "dilations": [(1, 1), (2, 1)]} if version == "stem" else {}


def arrays(geometry, N, C, F, seed):
    """x, weight, bias, scale and dL/dy in float32."""
    shapes = (N, geometry.pixels, C), (F, *geometry.size, C // geometry.groups), (F,), (F,)
    rng = np.random.default_rng(seed)
    drawn = [rng.normal(size=shape).astype(np.float32) for shape in (*shapes, (N, geometry.output_pixels, F))]
    drawn[3] = np.clip(np.abs(drawn[3]), 0, 1)
    return drawn


def calls(geometry, x, weight, bias, scale, gy):
    """The kernels' arguments for these arrays; forward also with everything that may follow it."""
    yield convolve, (x, weight, None, None, None, False, geometry, {})
    yield convolve_input_gradient, (gy, weight, geometry, {})
    yield convolve_weight_gradient, (x, gy, geometry)
    yield convolve, (x, weight, bias, scale, gy, True, geometry, {})  # gy will do for a shortcut
    yield add_input_gradient, (x, gy, weight, geometry, {})


def scale_of_error(kernel, geometry, x, weight, gy) -> float:
    """What rounding errors grow with: the root of the number of terms, times the size of both factors."""
    kernel = convolve_input_gradient if kernel is add_input_gradient else kernel
    channels = {convolve: weight.shape[3], convolve_input_gradient: weight.shape[0] // geometry.groups}
    terms = geometry.taps * channels[kernel] if kernel in channels else gy.shape[0] * gy.shape[1]
    factors = {convolve: (x, weight), convolve_input_gradient: (gy, weight), convolve_weight_gradient: (x, gy)}
    return math.sqrt(terms) * math.prod(
        math.sqrt(np.mean(np.square(a, dtype=np.float64))) for a in factors[kernel]
    )


def settle(problem, version: str | None, ran: Counter) -> None:
    """Hold what runs to the definition in float64; count what ran, for every kernel."""
    geometry = problem[0]
    x, weight, _, _, gy = narrow = arrays(*problem)
    wide = [a.astype(np.float64) for a in narrow]
    products, slack = [], 0.0
    for (kernel, arguments), (_, exact) in zip(calls(geometry, *narrow), calls(geometry, *wide), strict=True):
        with only(version):
            name, run = kernel.choose(*arguments)
        want = kernel.textbook(*exact)
        got = want
        if version is None or name != "textbook":
            name = name.removeprefix("numpy:")
            assert version in (None, name)
            got = run(*arguments)
            assert got.dtype == np.float32
            limit = BOUND.get(name, ORDINARY) * scale_of_error(kernel, geometry, x, weight, gy)
            error = np.abs(got - want).max()
            assert error <= limit, f"{kernel.__name__} by {name}: {error / limit:.1f} times the bound"
            ran[kernel.__name__, name] += 1
            event(f"{kernel.__name__} {name}")
        if len(products) < 3:  # without bias, scale and rectifier it is linear in both factors
            other = {convolve: wide[4], convolve_input_gradient: wide[0], convolve_weight_gradient: wide[1]}[
                kernel
            ]
            products.append(np.sum(got * other))
            slack += (
                np.abs(other).sum() * BOUND.get(name, ORDINARY) * scale_of_error(kernel, geometry, x, weight, gy)
            )
    assert np.ptp(products) <= slack, f"<conv(x, w), g>, <x, dx>, <w, dw> are {products}"


def search(examples: int, drawn, version, **how) -> Counter:
    """`settle` on that many problems; how often each version ran."""
    ran = Counter()

    @settings(max_examples=examples, deadline=None, database=None, **how)
    @given(drawn)
    def all_hold(problem):
        settle(problem, version, ran)

    all_hold()
    return ran


@pytest.fixture
def everywhere(monkeypatch):
    """Winograd runs also where it does not pay, blocks of images are of one or two, sums come in chunks, and threads
    share few tiles."""
    pytest.importorskip(
        "minidet.kernels.convolution.cpu.winograd", reason="the fast convolutions are not installed"
    )
    for limit in WHEN_IT_PAYS:
        monkeypatch.setattr(f"minidet.kernels.convolution.cpu.{limit}", 0)
    monkeypatch.setattr("minidet.kernels.convolution.cpu.direct.DEEP", 40)
    monkeypatch.setattr("minidet.kernels.convolution.cpu.winograd_gradient.MUCH_TO_SUM", 1)
    monkeypatch.setattr("minidet.kernels.convolution.cpu.winograd_gradient.SCRATCH", 0)
    monkeypatch.setattr("minidet.kernels.convolution.blocked.BLOCK", 3000)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_is_right_and_its_passes_are_transposes(version, everywhere):
    ran = search(50, problems(**likes(version)), version, derandomize=True)
    offered = {(kernel.__name__, version) for kernel in KERNELS if f"numpy:{version}" in kernel.fast}
    assert set(ran) == offered
    assert min(ran.values()) >= 20, f"too few of the problems reach this version: {ran}"


def test_whichever_version_is_chosen_is_right():
    """Groups and all: without anybody asking for a version."""
    drawn = problems(FEW + MANY, FEW + MANY, groups=(1, 1, 2, 3))
    ran = search(60, drawn, None, derandomize=True)
    assert {name for kernel, name in ran if kernel == "convolve"} >= {"textbook"}
    assert sum(ran.values()) == 5 * 60


@pytest.mark.slow
@pytest.mark.parametrize("version", [*VERSIONS, None])
def test_the_same_on_many_more_problems(version, everywhere):
    drawn = (
        problems(FEW + MANY, FEW + MANY, groups=(1, 1, 2, 3)) if version is None else problems(**likes(version))
    )
    assert search(500, drawn, version)


def test_which_version_runs():
    pytest.importorskip(
        "minidet.kernels.convolution.cpu.winograd", reason="the fast convolutions are not installed"
    )

    def chosen(map_, N, C, F, dtype=np.float32, groups=1):
        geometry = Geometry((map_,), (3, 3), (1, 1), (1, 1), groups=groups)
        narrow = [a.astype(dtype) for a in arrays(geometry, N, C, F, 0)]
        three = list(calls(geometry, *narrow))[:3]
        return [kernel.choose(*arguments)[0].removeprefix("numpy:") for kernel, arguments in three]

    assert chosen((8, 8), 2, 16, 16) == ["direct", "direct", "winograd2"]
    assert chosen((32, 32), 2, 64, 32) == ["winograd4", "winograd4", "winograd4"]
    assert chosen((24, 24), 1, 512, 512) == ["winograd2", "winograd2", "winograd2"]
    assert chosen((16, 16), 1, 32, 32) == ["winograd2", "winograd2", "winograd4"]
    assert chosen((7, 70), 1, 32, 32) == ["winograd4", "winograd4", "winograd4"]
    assert chosen((1, 140), 1, 32, 32) == ["winograd2", "winograd2", "winograd2"]  # half of a tile is used
    assert chosen((1, 139), 1, 32, 32) == ["direct", "direct", "direct"]
    assert chosen((32, 32), 2, 32, 64, groups=4) == ["grouped", "grouped", "grouped"]
    assert chosen((32, 32), 2, 16, 64, groups=4) == ["textbook", "textbook", "textbook"]
    assert chosen((8, 8), 1, 3, 16)[::2] == ["stem", "stem"]
    assert chosen((32, 32), 2, 64, 32, np.float64) == ["blocked", "blocked", "blocked"]


@pytest.mark.parametrize("version", VERSIONS)
def test_results_repeat_and_do_not_depend_on_the_threads(version, everywhere):
    groups = 2 if version == "grouped" else 1
    geometry = Geometry(((17, 23), (9, 12), (1, 1)), (3, 3), (1, 1), (1, 1), groups=groups)
    C = 3 if version == "stem" else 32
    narrow = arrays(geometry, 3, C, 32, 0)
    x, weight, _, _, gy = narrow
    threads, ran = numba.get_num_threads(), 0
    for kernel, arguments in calls(geometry, *narrow):
        with only(version):
            name, run = kernel.choose(*arguments)
        if name == "textbook":
            continue
        first, again = run(*arguments), run(*arguments)
        np.testing.assert_array_equal(first, again)
        try:
            numba.set_num_threads(1)
            alone = run(*arguments)
        finally:
            numba.set_num_threads(threads)
        limit = BOUND.get(version, ORDINARY) * scale_of_error(kernel, geometry, x, weight, gy)
        assert np.abs(alone - first).max() <= limit
        ran += 1
    assert ran


EVERYTHING = "transposes or chosen or memo or nan or lie"
MOST = "transposes and (direct or grouped or winograd2 or stem)"  # half of all compiling is for winograd4


@pytest.mark.parametrize(
    ("lanes", "which"),
    [(8, MOST), *(pytest.param(lanes, EVERYTHING, marks=pytest.mark.slow) for lanes in (4, 8, 16))],
)
def test_other_vector_widths(lanes, which):
    """The same checks on machines with narrower vectors, which this one can imitate, and with the widest."""
    lanes_here = pytest.importorskip("minidet.kernels.convolution.cpu.lanes").LANES
    if lanes == lanes_here:
        pytest.skip("this is the width of this machine, which every other test here uses")
    here = Path(__file__)
    files = [str(here), str(here.with_name("test_convolution.py"))]
    command = [sys.executable, "-m", "pytest", "-q", *files, "-k", which]
    environment = {**os.environ, "MINIDET_LANES": str(lanes)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_stem_reads_nothing_of_what_memory_held_before(monkeypatch):
    """Some numbers are read behind the last row, also where fewer rows are padded than there is room for."""
    stem = pytest.importorskip("minidet.kernels.convolution.cpu.stem")
    geometry = Geometry(((3, 40),), (1, 3), (1, 1), (0, 0))
    x, gy, sums = np.ones((1, 120, 1), np.float32), np.ones((1, 3 * 38, 16), np.float32), []
    monkeypatch.setattr(stem, "aligned", lambda *shape: sums.append(np.empty(shape, np.float32)) or sums[-1])
    threads = numba.get_num_threads()
    try:
        numba.set_num_threads(1)  # which then runs here, and gets what this thread gave back
        for _ in range(20):
            held = [np.full(size, np.nan, np.float32) for size in range(100, 700, 8)]
            del held
            stem.row_gradients(x, gy, geometry)
    finally:
        numba.set_num_threads(threads)
    assert np.isfinite(sums).all()
