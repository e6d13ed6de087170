"""Every op: its value against the plain formula, its gradient against differences, and its edges."""

from __future__ import annotations

import re

import numpy as np
import pytest
from gradients import assert_gradients_match
from op_cases import CASES, Case

from minidet import backend, ops
from minidet.autograd import Tensor, no_grad

numpy = backend.load("numpy")
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_library = pytest.mark.parametrize("xp", [numpy, backend.load("array_api_strict")], ids=backend.name_of)


def tensors(arrays, xp, dtype=np.float64, requires_grad=True) -> list[Tensor]:
    return [Tensor(xp.asarray(np.asarray(a, dtype)), requires_grad=requires_grad) for a in arrays]


def test_every_op_has_a_case():
    assert {case.op for case in CASES} == set(ops.__all__)


def test_cases_have_names_of_their_own():
    assert len({str(case) for case in CASES}) == len(CASES)


@each_library
@each_case
def test_value(case: Case, xp, rng):
    arrays = case.inputs(rng)
    y, want = case.call(*tensors(arrays, xp)), np.asarray(case.formula(*arrays))
    assert y.shape == want.shape
    np.testing.assert_allclose(backend.to_numpy(y.data), want, rtol=1e-11, atol=1e-12)


@each_library
@each_case
def test_gradient(case: Case, xp, rng):
    assert_gradients_match(case.call, *case.inputs(rng), xp=xp, rng=rng)


@each_case
def test_float32_stays_float32(case: Case, rng):
    inputs = tensors(case.inputs(rng), numpy, np.float32)
    y = case.call(*inputs)
    assert y.dtype == np.float32
    y.backward(rng.normal(size=y.shape).astype(np.float32))  # of ones, a norm's is 0 but for rounding
    assert all(x.grad.dtype == np.float32 for x in inputs)


@each_case
def test_nothing_is_computed_that_nobody_asked_for(case: Case, rng):
    """Each input alone gets the gradient it gets with the others; the closures give None for the rest."""
    arrays = case.inputs(rng)
    together = tensors(arrays, numpy)
    y = case.call(*together)
    cotangent = rng.normal(size=y.shape)
    y.backward(cotangent)
    for i, both in enumerate(together):
        alone = tensors(arrays, numpy, requires_grad=False)
        alone[i].requires_grad = True
        y = case.call(*alone)
        watch_for_waste(y)
        y.backward(cotangent)
        np.testing.assert_allclose(alone[i].grad, both.grad, rtol=1e-12, atol=1e-12)
        assert all(x.grad is None for j, x in enumerate(alone) if j != i)
    assert case.call(*tensors(arrays, numpy, requires_grad=False)).node is None
    with no_grad():
        assert case.call(*tensors(arrays, numpy)).node is None


def watch_for_waste(root: Tensor) -> None:
    """From now on, a closure behind `root` that returns a gradient for a constant fails."""
    stack = [root]
    while stack:
        node = stack.pop().node
        if node is None:
            continue
        stack += node.inputs

        def watched(gy, node=node, inputs=node.inputs, backward=node.backward):
            gradients = backward(gy)
            for x, g in zip(inputs, gradients, strict=True):
                assert x.requires_grad or g is None, f"{node.op} computed a gradient of a constant"
            return gradients

        node.backward = watched


@each_case
def test_nothing_that_was_handed_in_is_written_to(case: Case, rng):
    arrays = case.inputs(rng)
    inputs = tensors([array.copy() for array in arrays], numpy)
    y = case.call(*inputs)
    cotangent = rng.normal(size=y.shape)
    handed = cotangent.copy()
    y.backward(handed)
    for x in inputs:
        x.grad += 1  # the gradient is the leaf's own: this reaches nobody else
    np.testing.assert_array_equal(handed, cotangent)
    for x, array in zip(inputs, arrays, strict=True):
        np.testing.assert_array_equal(x.data, array)


@each_case
def test_gradients_called_fresh_are_nobody_elses(case: Case, rng):
    inputs = tensors(case.inputs(rng), numpy)
    y = case.call(*inputs)
    if y.node and y.node.fresh:
        cotangent = rng.normal(size=y.shape)
        gradients = [g for g in y.node.backward(cotangent) if g is not None]
        held = [cotangent, y.data, *(x.data for x in inputs), *gradients, *y.node.backward(cotangent)]
        for n, g in enumerate(gradients):
            assert not any(np.shares_memory(g, other) for other in held[: 2 + len(inputs) + n] if other is not None)
            assert not any(np.shares_memory(g, other) for other in held[3 + len(inputs) + n :] if other is not None)


def test_sums_of_gradients_write_to_nothing_that_is_held(rng):
    """`add` hands one array to both sides; `relu` makes its own: they meet at x in either order."""
    for call in (lambda x: ops.relu(x) + (x + x), lambda x: (x + x) + ops.relu(x)):
        x = Tensor(rng.uniform(1, 2, (200, 200)), requires_grad=True)
        cotangent = rng.normal(size=x.shape)
        handed = cotangent.copy()
        call(x).backward(cotangent)
        np.testing.assert_array_equal(cotangent, handed)
        np.testing.assert_allclose(x.grad, 3 * handed, rtol=1e-12)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "div", "maximum", "minimum"])
@pytest.mark.parametrize(("a", "b"), [((2, 3), (2, 4)), ((3,), (2, 1, 2)), ((0, 2), (3, 2))])
def test_shapes_that_do_not_broadcast_are_named_with_the_op(op, a, b):
    text = re.escape(f"{op}: shapes {a} and {b} do not broadcast")
    with pytest.raises(ValueError, match=f"^{text}$"):
        getattr(ops, op)(Tensor(np.zeros(a)), Tensor(np.zeros(b)))


def test_a_residual_has_the_shape_of_its_block():
    with pytest.raises(ValueError, match=r"^add_relu: shapes \(2, 3\) and \(3,\) differ$"):
        ops.add_relu(Tensor(np.zeros((2, 3))), Tensor(np.zeros(3)))


def test_a_shortcut_has_the_shape_and_the_type_of_the_result():
    x, weight = Tensor(np.zeros((1, 4, 4, 2))), Tensor(np.zeros((3, 3, 3, 2)))
    with pytest.raises(ValueError, match=r"^conv2d: the result is \(1, 4, 4, 3\) in float64, but the shortcut"):
        ops.conv2d(x, weight, padding=1, shortcut=x)
    with pytest.raises(ValueError, match=r"^conv2d_levels: .* but the shortcut \(1, 16, 3\) in float32$"):
        shortcut = Tensor(np.zeros((1, 16, 3), np.float32))
        ops.conv2d_levels(Tensor(np.zeros((1, 16, 2))), ((4, 4),), weight, shortcut=shortcut)


def test_a_condition_must_broadcast_too():
    with pytest.raises(ValueError, match=r"where: shapes \(2, 1\) and \(\) and \(3, 1\) do not broadcast"):
        ops.where(np.ones((3, 1), bool), Tensor(np.zeros((2, 1))), 0.0)


# --- operators --------------------------------------------------------------------------------------


@each_library
def test_operators(xp):
    x = Tensor(xp.asarray([[1.0, 2.0], [3.0, 4.0]]))
    array = xp.asarray([10.0, 20.0])
    results = {
        "x + x": (x + x, [[2, 4], [6, 8]]),
        "x + 1": (x + 1, [[2, 3], [4, 5]]),
        "1 + x": (1 + x, [[2, 3], [4, 5]]),
        "x + array": (x + array, [[11, 22], [13, 24]]),
        "x - 1": (x - 1, [[0, 1], [2, 3]]),
        "1 - x": (1 - x, [[0, -1], [-2, -3]]),
        "x * 2": (x * 2, [[2, 4], [6, 8]]),
        "2 * x": (2 * x, [[2, 4], [6, 8]]),
        "x / 2": (x / 2, [[0.5, 1], [1.5, 2]]),
        "12 / x": (12 / x, [[12, 6], [4, 3]]),
        "-x": (-x, [[-1, -2], [-3, -4]]),
        "x**2": (x**2, [[1, 4], [9, 16]]),
        "x @ x": (x @ x, [[7, 10], [15, 22]]),
        "x[1]": (x[1], [3, 4]),
        "x[:, 0]": (x[:, 0], [1, 3]),
    }
    for text, (y, want) in results.items():
        assert backend.to_numpy(y.data).tolist() == want, text


def test_an_array_on_the_left_leaves_it_to_the_tensor():
    """NumPy would loop over the elements and make an array of Tensors."""
    x = Tensor(np.asarray([1.0, 2.0]), requires_grad=True)
    for y in (np.ones(2) + x, np.ones(2) - x, np.ones(2) * x, np.ones(2) / x, np.float64(2) * x):
        assert isinstance(y, Tensor) and y.shape == (2,)


def test_a_number_does_not_change_the_dtype():
    x = Tensor(np.ones(2, np.float32))
    assert {(x * 2.5).dtype, (1 / x).dtype, ops.maximum(x, 0.1).dtype, (x**0.5).dtype} == {np.dtype(np.float32)}


def test_a_part_of_a_tensor_by_an_array_is_refused():
    x = Tensor(np.ones((3, 2)))
    with pytest.raises(TypeError, match=r"an index must be int, slice or \.\.\., got ndarray; see take"):
        _ = x[np.asarray([0, 1])]
    with pytest.raises(TypeError, match="got list"):
        _ = x[[0, 1], 0]


# --- edges ------------------------------------------------------------------------------------------


def gradient_of(f, *arrays):
    inputs = tensors(arrays, numpy)
    ops.sum(f(*inputs)).backward()
    return [x.grad.tolist() for x in inputs]


def test_ties_share_the_gradient():
    a, b = [1.0, 2.0, 3.0], [1.0, 3.0, 2.0]
    assert gradient_of(ops.maximum, a, b) == [[0.5, 0, 1], [0.5, 1, 0]]
    assert gradient_of(ops.minimum, a, b) == [[0.5, 1, 0], [0.5, 0, 1]]
    assert gradient_of(ops.max, [2.0, 5, 5, 1, 5, 5]) == [[0, 0.25, 0.25, 0, 0.25, 0.25]]
    assert gradient_of(lambda x: ops.min(x, axis=1), [[1.0, 1], [3, 2]]) == [[[0.5, 0.5], [0, 1]]]


def test_kinks_have_gradient_zero():
    assert gradient_of(ops.relu, [-1.0, 0, 2]) == [[0, 0, 1]]
    assert gradient_of(ops.abs, [-1.0, 0, 2]) == [[-1, 0, 1]]
    assert gradient_of(lambda x: ops.l1(x, np.zeros(3)), [-1.0, 0, 2]) == [[-1, 0, 1]]
    assert gradient_of(lambda x: ops.smooth_l1(x, np.zeros(3), beta=0.0), [-1.0, 0, 2]) == [[-1, 0, 1]]


def test_a_power_of_zero_has_no_gradient_even_at_zero():
    assert gradient_of(lambda x: ops.power(x, 0), [0.0, 2.0]) == [[0, 0]]


def test_the_first_of_equal_maxima_in_a_window_gets_the_gradient():
    (gx,) = gradient_of(lambda x: ops.max_pool2d(x, 2), np.ones((1, 2, 2, 1)))
    assert np.ravel(gx).tolist() == [1, 0, 0, 0]


def test_padding_never_wins_a_pooling():
    y = ops.max_pool2d(Tensor(np.full((1, 1, 1, 1), -5.0)), 3, stride=2, padding=1)
    assert y.data.tolist() == [[[[-5.0]]]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("op", "low", "high"),
    [
        (ops.sigmoid, 0.0, 1.0),
        (ops.log_sigmoid, -1000.0, 0.0),
        (lambda x: ops.bce_with_logits(x, np.zeros(2)), 0.0, 1000.0),
        (lambda x: ops.sigmoid_focal_loss(x, np.zeros(2)), 0.0, 750.0),
        (lambda x: ops.focal_star(x, np.zeros(2)), 0.0, 999.5),
        (lambda x: ops.softmax(ops.reshape(x, (2, 1)), axis=0), 0.0, 1.0),
    ],
    ids=["sigmoid", "log_sigmoid", "bce_with_logits", "sigmoid_focal_loss", "focal_star", "softmax"],
)
def test_large_logits_neither_overflow_nor_vanish(op, low, high, dtype):
    x = Tensor(np.asarray([-1000, 1000], dtype), requires_grad=True)
    y = op(x)
    np.testing.assert_allclose(np.ravel(y.data), [low, high], rtol=1e-6)
    y.backward(np.ones_like(y.data))
    assert np.isfinite(x.grad).all()


@each_library
def test_astype_gives_the_gradient_back_in_the_old_type(xp):
    x = Tensor(xp.asarray([1.0, 2.0], dtype=xp.float32), requires_grad=True)
    y = ops.astype(x, xp.float64)
    assert y.dtype == xp.float64
    y.backward(xp.asarray([3.0, 4.0], dtype=xp.float64))
    assert x.grad.dtype == xp.float32
    assert backend.to_numpy(x.grad).tolist() == [3, 4]


@each_library
def test_float32_parameters_compute_in_the_type_of_the_activations(xp, rng):
    x = Tensor(xp.asarray(rng.normal(size=(1, 3, 3, 4))), requires_grad=True)
    weight, vector = (
        Tensor(xp.asarray(rng.normal(size=shape), dtype=xp.float32), requires_grad=True)
        for shape in ((2, 1, 1, 4), (4,))
    )
    ones = xp.ones((4,), dtype=xp.float32)
    for y in (
        ops.conv2d(x, weight, vector[:2]),
        ops.batch_norm(x, vector, vector, ones, ones, eps=1e-5),
        ops.batch_norm_training(x, vector, vector, eps=1e-5)[0],
        ops.group_norm(x, vector, vector, groups=2),
    ):
        assert y.dtype == xp.float64
        y.backward(xp.ones_like(y.data))
        assert vector.grad.dtype == xp.float32


def test_batch_norm_gives_the_statistics_that_the_running_ones_need(rng):
    """The biased variance normalizes, the unbiased one is for later."""
    x = rng.normal(2, 3, size=(3, 2, 2, 4))
    one = Tensor(np.ones(4))
    _, mean, variance = ops.batch_norm_training(Tensor(x), one, one, eps=0.0)
    np.testing.assert_allclose(mean, x.mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(variance, x.var(axis=(0, 1, 2), ddof=1))


def test_batch_norm_of_many_positions_keeps_its_digits(rng):
    """Float32 numbers added one after the other would lose digits: 32,768 of them ten times this bound."""
    x = rng.normal(3, 1, size=(2, 128, 128, 4)).astype(np.float32)
    g = rng.normal(3, 1, size=x.shape).astype(np.float32)

    def run(dtype):
        tensors = [Tensor(a.astype(dtype), requires_grad=True) for a in (x, np.ones(4), np.zeros(4))]
        y, mean, variance = ops.batch_norm_training(*tensors, eps=1e-5)
        y.backward(g.astype(dtype))
        return mean, variance, tensors[2].grad

    for single, double in zip(run(np.float32), run(np.float64), strict=True):
        np.testing.assert_allclose(single, double, rtol=5e-7)


def test_conv2d_knows_when_a_weight_has_changed(rng):
    """Whatever a kernel derived from the old values and left in the memo."""
    x = Tensor(rng.normal(size=(1, 9, 9, 16)).astype(np.float32))
    weight = Tensor(rng.normal(size=(16, 3, 3, 16)).astype(np.float32), requires_grad=True)
    first = ops.conv2d(x, weight, padding=1).data
    weight.data = 2 * weight.data
    np.testing.assert_allclose(ops.conv2d(x, weight, padding=1).data, 2 * first, rtol=1e-4, atol=1e-4)
    weight.data *= 2
    weight.touch()
    np.testing.assert_allclose(ops.conv2d(x, weight, padding=1).data, 4 * first, rtol=1e-4, atol=1e-4)


# --- errors -----------------------------------------------------------------------------------------


def zeros(*shape: int) -> Tensor:
    return Tensor(np.zeros(shape))


BAD_CALLS = {
    "matmul-vector": (lambda: zeros(3) @ zeros(3, 2), r"matmul: cannot multiply .* \(3,\) and \(3, 2\)"),
    "matmul-inner": (lambda: zeros(2, 3) @ zeros(2, 3), r"matmul: cannot multiply .* \(2, 3\) and \(2, 3\)"),
    "concat-nothing": (lambda: ops.concat([]), "concat: needs at least one tensor"),
    "stack-nothing": (lambda: ops.stack([]), "stack: needs at least one tensor"),
    "pad-axes": (lambda: ops.pad(zeros(2, 2), ((1, 1),)), "pad: needs 2 pairs of non-negative widths"),
    "pad-negative": (lambda: ops.pad(zeros(2), ((0, -1),)), "pad: needs 1 pairs of non-negative widths"),
    "conv-axes": (
        lambda: ops.conv2d(zeros(4, 4, 1), zeros(1, 3, 3, 1)),
        r"conv2d: x must be \(N, H, W, C\) and weight \(F, k, k, C\), got \(4, 4, 1\) and \(1, 3, 3, 1\)",
    ),
    "conv-channels": (
        lambda: ops.conv2d(zeros(1, 4, 4, 3), zeros(2, 3, 3, 4)),
        r"conv2d: x has 3 channels, but weight \(2, 3, 3, 4\) with groups=1 expects 4",
    ),
    "conv-groups": (
        lambda: ops.conv2d(zeros(1, 4, 4, 4), zeros(3, 3, 3, 2), groups=2),
        "filters that divide into the groups",
    ),
    "conv-no-window": (
        lambda: ops.conv2d(zeros(1, 4, 4, 1), zeros(1, 3, 3, 1), dilation=2),
        r"conv2d: a window of \(3, 3\) \(dilation \(2, 2\)\) does not fit into a map of \(4, 4\)",
    ),
    "levels-positions": (
        lambda: ops.conv2d_levels(zeros(1, 5, 1), ((2, 2),), zeros(1, 3, 3, 1)),
        r"conv2d_levels: maps \(\(2, 2\),\) have 4 positions, x has shape \(1, 5, 1\)",
    ),
    "levels-even": (
        lambda: ops.conv2d_levels(zeros(1, 4, 1), ((2, 2),), zeros(1, 2, 3, 1)),
        r"conv2d_levels: 'same' padding needs odd filters, got \(2, 3\)",
    ),
    "levels-channels": (
        lambda: ops.conv2d_levels(zeros(1, 4, 2), ((2, 2),), zeros(1, 3, 3, 1)),
        "conv2d_levels: x has 2 channels",
    ),
    "pool-padding": (
        lambda: ops.max_pool2d(zeros(1, 4, 4, 1), 2, padding=2),
        r"max_pool2d: size 2 with padding 2 does not suit a map of \(4, 4\)",
    ),
    "pool-no-window": (lambda: ops.max_pool2d(zeros(1, 2, 4, 1), 3), "max_pool2d: size 3 with padding 0"),
    "pool-too-large": (lambda: ops.max_pool2d(zeros(1, 17, 17, 1), 17), "max_pool2d: size 17: a byte numbers"),
    "batch-norm-one-value": (
        lambda: ops.batch_norm_training(zeros(1, 1, 1, 2), zeros(2), zeros(2), eps=1e-5),
        r"batch_norm: needs more than one value per channel in training, got shape \(1, 1, 1, 2\)",
    ),
    "group-norm-groups": (
        lambda: ops.group_norm(zeros(1, 2, 2, 3), zeros(3), zeros(3), groups=2),
        "group_norm: 3 channels do not divide into 2 groups",
    ),
    "group-norm-shortcut": (
        lambda: ops.group_norm(zeros(1, 2, 2, 4), zeros(4), zeros(4), groups=2, shortcut=zeros(1, 2, 1, 4)),
        r"group_norm: x is \(1, 2, 2, 4\) in float64, but the shortcut \(1, 2, 1, 4\) in float64",
    ),
    "smooth-l1-beta": (lambda: ops.smooth_l1(zeros(2), np.zeros(2), beta=-1.0), "beta must not be negative, got -1"),
    "focal-star-gamma": (lambda: ops.focal_star(zeros(2), np.zeros(2), gamma=0.0), "gamma .* must be positive"),
}


@pytest.mark.parametrize(("call", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@each_library
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_a_map_that_several_convolutions_read_add_up(stride, dtype, xp, rng):
    """Each adds to what the others gave, in one pass over the map where its kernel can."""
    shapes = (2, 9, 12, 16), (16, 1, 1, 16), (16, 3, 3, 16), (2, 9, 12, 16), (2, -(-9 // stride), -(-12 // stride), 16)
    x, small, large, *cotangents = (xp.asarray(rng.normal(size=shape), dtype=getattr(xp, dtype)) for shape in shapes)

    def gradients(first, second, third):
        y = ops.conv2d(second, Tensor(large), padding=1, shortcut=third)
        z = ops.conv2d(first, Tensor(small), stride=stride)
        ops.add(ops.sum(ops.mul(y, cotangents[0])), ops.sum(ops.mul(z, cotangents[1]))).backward()

    shared, apart = Tensor(x, requires_grad=True), [Tensor(x, requires_grad=True) for _ in range(3)]
    gradients(shared, shared, shared)
    gradients(*apart)
    got, (a, b, c) = backend.to_numpy(shared.grad), (backend.to_numpy(leaf.grad) for leaf in apart)
    np.testing.assert_allclose(got, a + b + c, rtol=0, atol=1e-4 if dtype == "float32" else 1e-12)
