"""The gradient checker itself: it must fail on wrong gradients, or its silence means nothing."""

from __future__ import annotations

import numpy as np
import pytest
from gradients import STEP, assert_gradients_match, away_from

from minidet import backend
from minidet.autograd import Tensor, record
from minidet.ops import mul, softmax

numpy = backend.load("numpy")


def with_backward(values, backward):
    """An op that computes `values(x)` and claims `backward(gy)` as its gradient."""
    return lambda x: record("suspect", values(x.data), (x,), lambda gy: (backward(gy, x.data),))


def test_a_right_gradient_passes(rng):
    square = with_backward(lambda x: x * x, lambda gy, x: 2 * x * gy)
    assert_gradients_match(square, rng.normal(size=(3, 4)), xp=numpy, rng=rng)


@pytest.mark.parametrize("error", [1e-4, -1e-4])
def test_a_slightly_wrong_gradient_fails(rng, error):
    square = with_backward(lambda x: x * x, lambda gy, x: (2 + error) * x * gy)
    with pytest.raises(AssertionError, match="gradient of input 0"):
        assert_gradients_match(square, rng.normal(size=(3, 4)), xp=numpy, rng=rng)


def test_a_zero_gradient_of_softmax_fails(rng):
    # The gradient of softmax(x).sum() is 0: a checker that sums sees nothing wrong here.
    broken = with_backward(lambda x: softmax(Tensor(x)).data, lambda gy, x: 0 * gy)
    with pytest.raises(AssertionError, match="gradient of input 0"):
        assert_gradients_match(broken, rng.normal(size=(3, 4)), xp=numpy, rng=rng)


def test_swapped_elements_fail(rng):
    mirrored = with_backward(lambda x: x * x, lambda gy, x: (2 * x * gy)[::-1])
    with pytest.raises(AssertionError, match="gradient of input 0"):
        assert_gradients_match(mirrored, rng.normal(size=4), xp=numpy, rng=rng)


def test_the_wrong_input_is_named(rng):
    def product(a, b):
        return record("suspect", a.data * b.data, (a, b), lambda gy: (gy * b.data, gy * b.data))

    with pytest.raises(AssertionError, match="gradient of input 1"):
        assert_gradients_match(product, rng.normal(size=3), rng.normal(size=3), xp=numpy, rng=rng)


def test_an_unused_input_is_noticed(rng):
    with pytest.raises(AssertionError, match="input 1 received no gradient"):
        assert_gradients_match(
            lambda a, b: mul(a, a), rng.normal(size=3), rng.normal(size=3), xp=numpy, rng=rng
        )


def test_float32_is_refused(rng):
    with pytest.raises(AssertionError, match="differences need float64"):
        assert_gradients_match(softmax, rng.normal(size=3).astype(np.float32), xp=numpy, rng=rng)


def test_away_from_leaves_a_gap_on_both_sides(rng):
    values = rng.normal(size=1000)
    moved = away_from(values, kink=0.3)
    assert np.abs(moved - 0.3).min() > 0.0499 > 10 * STEP
    assert ((moved >= 0.3) == (values >= 0.3)).all()
    far = np.abs(values - 0.3) >= 0.05
    assert (moved[far] == values[far]).all()
