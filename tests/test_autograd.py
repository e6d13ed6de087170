"""The tape: what it records, what it computes, and when it lets go of memory."""

from __future__ import annotations

import gc
import threading
import tracemalloc
import weakref

import numpy as np
import pytest

from minidet.autograd import Tensor, checkpoint, no_grad, observe, record
from minidet.ops import exp, matmul, mul, sigmoid, sum


def leaf(*values: float) -> Tensor:
    return Tensor(np.asarray(values), requires_grad=True)


def step(x: Tensor, name: str = "step", factor: float = 1.0, before=lambda: None) -> Tensor:
    """An op y = factor * x that calls `before()` when its backward pass starts."""

    def backward(gy):
        before()
        return (factor * gy,)

    return record(name, factor * x.data, (x,), backward)


@pytest.fixture
def no_collector():
    gc.disable()
    yield
    gc.enable()


# --- what is computed -----------------------------------------------------------------------------


def test_the_graph_is_what_ran():
    """Define-by-run: ordinary Python decides, also a loop whose length depends on values."""
    x = leaf(3.0)
    y, doublings = x, 0
    while float(y.data[0]) < 20:
        y, doublings = y * 2, doublings + 1
    sum(y).backward()
    assert doublings == 3
    assert x.grad.tolist() == [8.0]


def test_gradients_of_a_shared_input_add_up():
    x = leaf(2.0, 3.0)
    sum(x * x + 5 * x).backward()
    assert x.grad.tolist() == [9.0, 11.0]


def test_gradients_add_up_over_backward_passes():
    x = leaf(2.0)
    sum(3 * x).backward()
    sum(4 * x).backward()
    assert x.grad.tolist() == [7.0]


def test_an_op_may_add_to_the_gradient_so_far():
    given = []

    def double(x):
        def backward(gy, before=None):
            given.append(before if before is None else before.tolist())
            return (2 * gy if before is None else before + 2 * gy,)

        return record("double", 2 * x.data, (x,), backward, adds=True)

    def gradient():
        x = leaf(1.0)
        y = x * 1
        (double(y) + (double(y) + y * 5)).backward(np.ones(1))
        return x.grad.tolist()

    assert gradient() == [9.0]
    assert given == [[5.0], [7.0]]
    with observe(lambda phase, node, array: None):
        assert gradient() == [9.0]
    assert given[2:] == [None, None]


def test_an_array_handed_to_two_inputs_is_never_written_to():
    """An add hands one array to both inputs: adding in place would change the other's gradient."""
    a, b = leaf(1.0), leaf(1.0)
    y = a + b
    cotangent = np.ones(1)
    (y + y * 2).backward(cotangent)
    assert cotangent.tolist() == [1.0]
    assert a.grad.tolist() == b.grad.tolist() == [3.0]
    a.grad += 1  # a leaf owns its gradient
    assert b.grad.tolist() == [3.0]
    assert cotangent.tolist() == [1.0]


def test_a_cotangent_for_what_is_not_a_scalar():
    x = leaf(1.0, 2.0)
    (x * x).backward(np.asarray([10.0, 100.0]))
    assert x.grad.tolist() == [20.0, 400.0]


def test_a_leaf_can_be_run_backwards_itself():
    x = Tensor(np.asarray(1.0), requires_grad=True)
    x.backward()
    assert float(x.grad) == 1.0


def test_a_diamond_runs_every_op_once():
    runs = []
    x = leaf(1.0)
    top = step(x, factor=2.0, before=lambda: runs.append("top"))
    left = step(top, before=lambda: runs.append("left"))
    right = step(top, before=lambda: runs.append("right"))
    sum(left + right).backward()
    assert sorted(runs) == ["left", "right", "top"]
    assert runs[-1] == "top"
    assert x.grad.tolist() == [4.0]


def test_constants_cost_nothing():
    """What needs no gradient is not recorded, and nothing behind it is computed."""
    constant = exp(Tensor(np.ones(2)))
    assert constant.node is None
    asked = []

    def backward(gy):
        asked.append("ran")
        return (gy, None)

    x = leaf(1.0, 1.0)
    y = record("pair", x.data + constant.data, (x, constant), backward)
    y.backward(np.ones(2))
    assert asked == ["ran"]
    assert constant.grad is None


def test_a_gradient_has_the_dtype_of_its_input():
    """float32 parameters in a float64 computation, as in a gradient check with a real model."""
    weight = Tensor(np.ones(2, np.float32), requires_grad=True)
    sum(weight * np.ones(2)).backward()
    assert weight.grad.dtype == np.float32


def test_a_chain_of_20000_ops():
    x = leaf(1.0)
    y = x
    for _ in range(20_000):
        y = step(y)
    sum(y).backward()
    assert x.grad.tolist() == [1.0]


def test_a_chain_of_20000_ops_is_dropped_without_recursion():
    y = leaf(1.0)
    for _ in range(20_000):
        y = step(y)
    del y


# --- what is kept, and for how long -----------------------------------------------------------------


def test_dropping_the_loss_frees_the_graph(no_collector):
    x = leaf(1.0, 2.0)
    hidden = exp(sigmoid(x))
    loss = sum(hidden * hidden)
    tensor, array = weakref.ref(hidden), weakref.ref(hidden.data)
    del hidden
    assert tensor() is not None  # the graph holds it ...
    del loss
    assert tensor() is None and array() is None  # ... and nothing else, no cycle


def test_backward_frees_the_graph_though_the_loss_is_kept(no_collector):
    x = leaf(1.0, 2.0)
    hidden = exp(sigmoid(x))
    loss = sum(hidden * hidden)
    tensor, array = weakref.ref(hidden), weakref.ref(hidden.data)
    del hidden
    loss.backward()
    assert tensor() is None and array() is None
    assert float(loss) > 0


def test_memory_falls_while_backward_runs(no_collector):
    made, alive = [], []
    x = y = leaf(*range(3))
    for _ in range(10):
        y = step(y, factor=1.5, before=lambda: alive.append(len([r for r in made if r() is not None])))
        made.append(weakref.ref(y.data))
    loss = sum(y)
    del y
    loss.backward()
    assert alive == [10, 9, 8, 7, 6, 5, 4, 3, 2, 1]
    assert x.grad is not None


def test_a_tape_runs_backwards_once():
    x = leaf(1.0)
    loss = sum(exp(x))
    loss.backward()
    with pytest.raises(RuntimeError, match="sum: this part of the graph was already run backwards"):
        loss.backward()


def test_a_shared_part_runs_backwards_once():
    x = leaf(1.0)
    shared = exp(x)
    sum(shared * 2).backward()
    with pytest.raises(RuntimeError, match="exp: this part of the graph was already run backwards"):
        sum(shared * 3).backward()


def test_no_grad_records_nothing(no_collector):
    x = leaf(1.0)
    with no_grad():
        y = exp(x)
    assert y.node is None and not y.requires_grad
    assert exp(x).requires_grad


def test_no_grad_ends_with_an_error():
    with pytest.raises(ZeroDivisionError), no_grad():
        _ = 1 / 0
    assert exp(leaf(1.0)).requires_grad


def test_no_grad_is_of_one_thread():
    x, seen = leaf(1.0), []
    with no_grad():
        thread = threading.Thread(target=lambda: seen.append(exp(x).requires_grad))
        thread.start()
        thread.join()
    assert seen == [True]


def test_detach_cuts_off():
    x = leaf(1.0)
    y = exp(x)
    cut = y.detach()
    assert cut.data is y.data and cut.node is None and not cut.requires_grad


# --- checkpoint -------------------------------------------------------------------------------------


def block(weight: Tensor):
    return lambda x, shift: sigmoid(matmul(x, weight)) + shift


def test_checkpoint_gives_the_same_gradients(rng):
    arrays = rng.normal(size=(3, 4)), rng.normal(size=(4,)), rng.normal(size=(4, 4))
    results = []
    for run in (lambda f, *inputs: f(*inputs), checkpoint):
        x, shift, weight = (Tensor(a, requires_grad=True) for a in arrays)
        y = run(block(weight), run(block(weight), x, shift), shift)
        sum(y * y).backward()
        results.append([y.data, x.grad, shift.grad, weight.grad])  # weight: inside, not an input
    for plain, again in zip(*results, strict=True):
        np.testing.assert_array_equal(plain, again)


def test_checkpoint_trains_parameters_behind_constant_inputs(rng):
    weight = Tensor(rng.normal(size=(4, 4)), requires_grad=True)
    sum(checkpoint(block(weight), Tensor(np.ones((3, 4))), Tensor(np.ones(4)))).backward()
    assert weight.grad is not None


def test_checkpoint_gives_zero_to_an_input_it_does_not_use():
    x, unused = leaf(1.0), leaf(1.0)
    sum(checkpoint(lambda a, b: a * 2, x, unused)).backward()
    assert x.grad.tolist() == [2.0]
    assert unused.grad.tolist() == [0.0]


def test_checkpoint_of_a_constant_has_no_gradient():
    x = leaf(1.0)
    sum(checkpoint(lambda a: Tensor(a.data), x)).backward()
    assert x.grad.tolist() == [0.0]


def test_checkpoint_under_no_grad_records_nothing():
    with no_grad():
        assert checkpoint(exp, leaf(1.0)).node is None


def test_backward_of_a_checkpoint_works_under_no_grad():
    """What it computes again must be recorded even where recording is off."""
    x = leaf(0.0)
    loss = sum(checkpoint(exp, x))
    with no_grad():
        loss.backward()
    assert x.grad.tolist() == [1.0]


def test_checkpoint_keeps_less():
    def chain(x):
        for _ in range(8):
            x = sigmoid(x)
        return x

    def peak(run) -> int:
        x = Tensor(np.zeros(50_000), requires_grad=True)
        tracemalloc.start()
        y = x
        for _ in range(4):
            y = run(chain, y)
        y.backward(np.ones(50_000))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    # 32 maps are kept without; with it 4, and 8 inside the block that is being computed again.
    assert peak(checkpoint) < 0.6 * peak(lambda f, x: f(x))


# --- observing --------------------------------------------------------------------------------------


def test_observe_sees_outputs_and_gradients_in_order():
    x, w = leaf(2.0), leaf(3.0)
    seen = []
    with observe(lambda phase, node, array: seen.append((phase, node.op, len(node.inputs), float(np.sum(array))))):
        sum(mul(exp(x * 0), w)).backward()
    assert seen == [
        ("forward", "mul", 2, 0.0),
        ("forward", "exp", 1, 1.0),
        ("forward", "mul", 2, 3.0),
        ("forward", "sum", 1, 3.0),
        ("backward", "sum", 1, 1.0),
        ("backward", "mul", 2, 3.0),  # by exp(...), then by w
        ("backward", "mul", 2, 1.0),
        ("backward", "exp", 1, 3.0),
        ("backward", "mul", 2, 0.0),
    ]
    exp(x)
    assert len(seen) == 9  # over with the block


def test_observe_sees_constants_and_no_grad_too():
    seen = []
    with observe(lambda phase, node, array: seen.append(node.op)), no_grad():
        exp(Tensor(np.ones(1)))
    assert seen == ["exp"]


# --- errors that name the op ------------------------------------------------------------------------


def test_backward_needs_something_trainable():
    with pytest.raises(RuntimeError, match="depends on nothing trainable"):
        Tensor(np.asarray(1.0)).backward()


def test_backward_without_a_gradient_needs_a_scalar():
    with pytest.raises(ValueError, match=r"needs a scalar, got shape \(2,\)"):
        leaf(1.0, 2.0).backward()


def test_the_first_gradient_must_have_the_shape():
    with pytest.raises(ValueError, match=r"the gradient has shape \(1,\), the tensor \(2,\)"):
        leaf(1.0, 2.0).backward(np.ones(1))


def test_a_gradient_of_the_wrong_shape_names_the_op():
    x = leaf(1.0, 2.0)
    y = record("crooked", x.data, (x,), lambda gy: (gy[:1],))
    with pytest.raises(RuntimeError, match=r"crooked: gradient has shape \(1,\), input has \(2,\)"):
        y.backward(np.ones(2))


def test_a_missing_gradient_names_the_op():
    x = leaf(1.0)
    y = record("forgetful", x.data, (x,), lambda gy: (None,))
    with pytest.raises(RuntimeError, match="forgetful: backward gave no gradient for an input that needs one"):
        y.backward(np.ones(1))


def test_too_few_gradients_are_noticed():
    x, w = leaf(1.0), leaf(1.0)
    y = record("short", x.data + w.data, (x, w), lambda gy: (gy,))
    with pytest.raises(ValueError, match="shorter"):
        y.backward(np.ones(1))


# --- the tensor -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [[1.0], 2.0, "x", None])
def test_a_tensor_needs_an_array(value):
    with pytest.raises(TypeError, match="expected an array of numpy, cupy, array_api_strict"):
        Tensor(value)


def test_memo_is_emptied_when_the_values_change():
    x = leaf(1.0)
    old = x.memo
    x.memo["packed"] = "old"
    x.data = np.asarray([2.0])
    assert x.memo == {} and old == {"packed": "old"}  # whoever computes with the old values keeps theirs
    x.memo["packed"] = "new"
    x.data[0] = 3.0
    x.touch()
    assert x.memo == {}


def test_properties():
    x = Tensor(np.zeros((2, 3), np.float32))
    assert (x.shape, x.ndim, x.dtype, len(x), x.xp) == ((2, 3), 2, np.float32, 2, np)
    assert float(sum(x)) == 0.0


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (leaf(1.0, 2.5), "Tensor([1.  2.5], shape=(2,), dtype=float64, requires_grad)"),
        (Tensor(np.asarray(2, np.float32)), "Tensor(2.0, shape=(), dtype=float32)"),
        (sum(leaf(1.0, 2.0)), "Tensor(3.0, shape=(), dtype=float64, from sum)"),
        (
            exp(Tensor(np.zeros((2, 2), np.float32))),
            "Tensor([[1. 1.]\n        [1. 1.]], shape=(2, 2), dtype=float32)",
        ),
        (Tensor(np.zeros((0, 3))), "Tensor([], shape=(0, 3), dtype=float64)"),
    ],
)
def test_repr(tensor, text):
    assert repr(tensor) == text


def test_repr_of_a_large_tensor_is_short():
    assert len(repr(Tensor(np.zeros((500, 500))))) < 1000
