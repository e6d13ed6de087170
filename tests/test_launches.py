"""Launches are checked where no GPU is: right ones pass, and every kind of mistake is seen."""

from __future__ import annotations

import numpy as np
import pytest
from fake_launches import SHARED, Parameter, signatures

from minidet import backend, kernels

SOURCE = """
typedef long long Count;
#define KERNELS(T, name) extern "C" __global__ void __launch_bounds__(MOST) many_##name(const T* x, T *y, int n) {}
constexpr int LEAST = 32, MOST = 128;
KERNELS(unsigned char, bytes) KERNELS(float, float)

extern "C" __global__ void one(const REAL *__restrict__ x, REAL *y, const long long *rows, bool *mask,
    long long count, double factor, bool flag)
{
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) { y[i] = factor * x[rows[i]]; mask[i] = flag; }
}
"""
SHARING = 'extern __shared__ char shared[];\nextern "C" __global__ void fold(const float *x, long long n) {}\n'


@pytest.fixture
def there(fake_cupy):
    """The namespace of the fake GPU, and a launch that is right."""
    xp = backend.load("cupy")
    x, y = xp.asarray(np.arange(6, dtype=np.float32)), xp.empty(3, dtype=xp.float32)
    rows, mask = xp.asarray(np.array([5, 0, 3])), xp.zeros(3, dtype=xp.bool)
    one = backend.cuda().RawModule(code=SOURCE, options=("-DREAL=float",)).get_function("one")
    return xp, one, [(1,), (256,), [x, y, rows, mask, 3, 2.0, True]]


def test_signatures_are_read_after_the_macros():
    found = signatures(SOURCE, ("--std=c++17", "-DREAL=double"))
    assert list(found) == ["many_bytes", "many_float", "one"]
    assert found["one"].parameters[0] == Parameter("double", True, True, "x")
    assert [str(p) for p in found["one"].parameters[3:5]] == ["bool *mask", "long long count"]
    assert found["many_bytes"].parameters[1] == Parameter("unsigned char", True, False, "y")
    assert (found["one"].threads, found["many_float"].threads, found["one"].shared) == (1024, 128, False)


def test_a_right_launch_runs(there):
    _, one, (grid, block, args) = there
    one(grid, block, tuple(args))
    np.testing.assert_array_equal(args[1].get(), [10, 0, 6])
    assert args[3].get().all()
    one((1, 1, 1), block, (*args[:4], np.int64(3), np.float64(2), np.bool_(True)))
    one(grid, block, (*args[:3], np.int64(0), 0, 2.0, True))  # a null pointer is one


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, lambda xp, x: np.ones(6, np.float32), "x is a pointer, got ndarray: not an array on the device"),
        (0, lambda xp, x: 7, "x is a pointer, got int"),
        (0, lambda xp, x: None, "x is a pointer, got NoneType"),
        (0, lambda xp, x: xp.astype(x, xp.float64), "x points to float, got float64"),
        (2, lambda xp, x: xp.astype(x, xp.int32), "rows points to long long, got int32"),
        (3, lambda xp, x: xp.astype(x, xp.uint8), "mask points to bool, got uint8"),
        (0, lambda xp, x: xp.asarray(np.ones((6, 2), np.float32))[:, 0], "x: strides"),
        (1, lambda xp, y: xp.broadcast_to(y[:1], (1,)), "y: cannot be written to"),
        (4, lambda xp, n: xp.asarray(3), "count is long long, got ndarray"),
        (4, lambda xp, n: np.int32(3), "count is long long, got int32"),
        (4, lambda xp, n: 3.0, "count is long long, got float"),
        (4, lambda xp, n: True, "count is long long, got bool"),
        (4, lambda xp, n: 2**63, "count: .* has more than 64 bits"),
        (5, lambda xp, f: np.float32(2), "factor is double, got float32"),
        (5, lambda xp, f: 2, "factor is double, got int"),
        (6, lambda xp, f: 1, "flag is bool, got int"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_seen(place, wrong, message, there):
    xp, one, (grid, block, args) = there
    args[place] = wrong(xp, args[place])
    with pytest.raises(AssertionError, match=f"one: {message}"):
        one(grid, block, tuple(args))


@pytest.mark.parametrize("change", [lambda args: args[:-1], lambda args: [*args, 1]], ids=["missing", "one more"])
def test_a_wrong_number_of_arguments_is_seen(change, there):
    _, one, (grid, block, args) = there
    with pytest.raises(AssertionError, match="arguments for 7 parameters"):
        one(grid, block, tuple(change(args)))


@pytest.mark.parametrize(
    ("grid", "block", "message"),
    [
        ((0,), (256,), "grid"), ((2**31,), (256,), "grid"), ((1, 65536), (256,), "grid"), ((1, 1, 65536), (1,), "grid"),
        (1, (256,), "grid"), ((), (256,), "grid"), ((1.0,), (256,), "grid"), ((1, 1, 1, 1), (256,), "grid"),
        ((1,), (1025,), "block"), ((1,), (1, 1, 65), "block"), ((1,), (64, 32), "2048 threads in a block"),
    ],
)  # fmt: skip
def test_sizes_that_cuda_refuses_are_seen(grid, block, message, there):
    _, one, (_, _, args) = there
    with pytest.raises(AssertionError, match=f"one: {message}"):
        one(grid, block, tuple(args))


def test_more_threads_than_a_kernel_was_compiled_for_are_seen(there):
    xp, *_ = there
    many = backend.cuda().RawModule(code=SOURCE, options=("-DREAL=float",)).get_function("many_bytes")
    x = xp.zeros(3, dtype=xp.uint8)
    with pytest.raises(AssertionError, match="many_bytes: 256 threads in a block, at most 128"):
        many((1,), (256,), (x, x, np.int32(3)))


def test_shared_memory_must_be_asked_for(there):
    xp, one, (grid, block, args) = there
    with pytest.raises(AssertionError, match="one: 1024 bytes of shared memory, or there is none"):
        one(grid, block, tuple(args), shared_mem=1024)
    fold = backend.cuda().RawModule(code=SHARING, options=("-DREAL=float",)).get_function("fold")
    args = xp.zeros(3, dtype=xp.float32), 3
    with pytest.raises(AssertionError, match="fold: 0 bytes of shared memory"):
        fold(grid, block, args)
    with pytest.raises(AssertionError, match="of shared memory of 49152"):
        fold(grid, block, args, shared_mem=SHARED + 1)
    fold.max_dynamic_shared_size_bytes = 2 * SHARED
    with pytest.raises(AssertionError, match="of shared memory of 98304"):
        fold(grid, block, args, shared_mem=2 * SHARED + 1)
    fold.max_dynamic_shared_size_bytes = 228 << 10
    with pytest.raises(AssertionError, match="of shared memory of 233472"):
        fold(grid, block, args, shared_mem=SHARED)


def test_a_kernel_is_looked_up_once(fake_cupy, monkeypatch):
    """For a file, a name, a type and a device."""
    xp, asked = backend.load("cupy"), []
    find = fake_cupy.RawModule.get_function
    monkeypatch.setattr(fake_cupy.RawModule, "get_function", lambda self, name: asked.append(name) or find(self, name))
    for device, dtype in [(0, xp.float32), (0, xp.float64), (1, xp.float32)] * 3:
        monkeypatch.setattr(backend.cuda().cuda.runtime, "getDevice", lambda device=device: device)
        kernels.rectify(xp.asarray(np.ones(3), dtype=dtype))
        kernels.rectify_sum(*[xp.asarray(np.ones(3), dtype=dtype)] * 2)
    assert asked == ["rectify", "rectify_sum"] * 3
