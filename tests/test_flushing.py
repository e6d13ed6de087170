"""Numbers too small to be normal: CuPy compiles kernels to take them for zeros, and no decision depends on them."""

from __future__ import annotations

import numpy as np
import pytest

from minidet import backend, kernels
from minidet.detection import MatcherConfig, assign

SMALLEST = np.finfo(np.float32).tiny


def both(kernel, xp, *args):
    """What the definition gives on NumPy, and the version in CUDA."""
    there = [xp.asarray(a) if isinstance(a, np.ndarray) else a for a in args]
    assert kernel.choose(*there)[0] == "cupy:fast"
    results = kernel.textbook(*args), kernel(*there)
    want, got = (r if isinstance(r, tuple) else (r,) for r in results)
    return want, tuple(backend.to_numpy(a) for a in got)


def test_kernels_flush_them_to_zero(fake_cupy):
    """As on a GPU: else the tests here, and all others on the fake one, would say nothing of -ftz=true."""
    few = np.float32([SMALLEST / 2, SMALLEST, -SMALLEST / 2])
    (want,), (got,) = both(kernels.rectify_sum, backend.load("cupy"), few, np.zeros(3, np.float32))
    np.testing.assert_array_equal(want, [SMALLEST / 2, SMALLEST, 0])
    np.testing.assert_array_equal(got, [0, SMALLEST, 0])
    assert np.float32(SMALLEST) * np.float32(0.5) > 0  # only there


def test_an_overlap_too_small_to_be_normal_is_none(fake_cupy):
    xp = backend.load("cupy")
    anchors = np.float32([[0, 0, 1e5, 1e5], [0, 0, 10, 10]])
    objects = np.float32([[20, 20, 30, 30], [-1, 0, 1e-30, 1], [0, 0, 9, 9]])
    want, got = both(kernels.best_matches, xp, anchors[:1], objects[1:2])
    assert 0 < want[0][0] < SMALLEST and got[0][0] == got[2][0] == 0
    assert not both(kernels.claimed_anchors, xp, anchors[:1], objects[1:2], np.float32([-1]))[1][0].any()
    for config in (MatcherConfig(), MatcherConfig(low_quality=True)):  # beside others, nothing changes
        np.testing.assert_array_equal(
            backend.to_numpy(assign(xp.asarray(anchors), xp.asarray(objects), config)), assign(anchors, objects, config)
        )


@pytest.mark.parametrize("threshold", [0.0, 1e-37, 0.05])
def test_a_probability_too_small_to_be_normal_does_not_pass(threshold, fake_cupy):
    logits = np.float32([[-100, -90, -80, -88, 3, -70, -2]])
    want, got = both(kernels.best_pairs, backend.load("cupy"), logits, threshold, 7)
    places = np.where(want[1] < SMALLEST, 0, want[0])
    np.testing.assert_array_equal(got[0], places)
    np.testing.assert_allclose(got[1], np.where(want[1] < SMALLEST, -1, want[1]), rtol=1e-5)
    assert (threshold > 0) == (want[1][want[1] > 0].min() >= SMALLEST)


def test_losses_and_maxima_lose_nothing_with_them(fake_cupy, rng):
    xp = backend.load("cupy")
    logits = np.float32([[[-120, -95, -88, 88], [95, 120, -87, 87]]])
    want, got = both(kernels.focal_loss, xp, logits, np.array([[3, 0]]), 0.25, 2.0)
    for w, g in zip(want, got, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=SMALLEST)
    maps = rng.uniform(-3, 3, (1, 6, 6, 2)).astype(np.float32) * SMALLEST
    (want, _), (got, _) = both(kernels.max_pool, xp, maps, 3, 2, 1)
    np.testing.assert_allclose(got, want, rtol=0, atol=SMALLEST)
