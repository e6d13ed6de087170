"""A fast kernel is compared with its definition before a new CPU trusts it."""

from __future__ import annotations

import importlib
import resource

import numba
import numpy as np
import pytest

from minidet.kernels import compiler, trust
from minidet.kernels.kernel import Kernel


@pytest.fixture(autouse=True)
def unseen_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(trust, "_trusted", None)


def doubling(fast):
    @Kernel
    def double(x):
        return x * 2

    calls = []

    @double.faster_on("numpy")
    def _double(x):
        calls.append(x)
        return fast(x)

    return double, calls


def test_a_right_kernel_proves_itself_once(monkeypatch):
    double, calls = doubling(lambda x: x + x)
    assert trust.first_run()
    definitions = []
    textbook = double.textbook
    double.textbook = lambda x: definitions.append(1) or textbook(x)
    x = np.ones(5)
    for _ in range(3):
        assert double(x).tolist() == [2] * 5
    assert (len(calls), len(definitions)) == (3, 1)
    assert not trust.first_run()
    monkeypatch.setattr(trust, "_trusted", None)  # another process on this CPU
    double(x)
    assert len(definitions) == 1


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda x: x * 2.1, "off by 0.1"),
        (lambda x: (x * 2).astype(np.float32), "float32"),
        (lambda x: np.full_like(x, np.nan), "infinite or NaN"),
        (lambda x: (x, x), "2 results instead of 1"),
    ],
)
def test_a_wrong_kernel_is_not_used(wrong, why):
    double, calls = doubling(wrong)
    with pytest.warns(RuntimeWarning, match=f"double/numpy:fast/float64 disagrees with its definition.*{why}"):
        assert double(np.ones(5)).tolist() == [2] * 5
    assert double(np.ones(5)).tolist() == [2] * 5
    assert len(calls) == 1


def test_decisions_must_be_equal():
    @Kernel
    def order(x):
        return np.argsort(x)

    order.faster_on("numpy")(lambda x: np.argsort(-x))
    with pytest.warns(RuntimeWarning, match="decisions differ"):
        assert order(np.arange(4.0)).tolist() == [0, 1, 2, 3]


def test_what_a_wrong_kernel_wrote_is_put_right():
    @Kernel
    def increase(x):
        x += 1

    @increase.faster_on("numpy")
    def _increase(x):
        x += 2

    x = np.zeros(3)
    with pytest.warns(RuntimeWarning, match="off by 1"):
        increase(x)
    assert x.tolist() == [1, 1, 1]


def test_a_kernel_that_writes_is_not_run_twice_on_the_same_array():
    @Kernel
    def increase(x):
        x += 1

    @increase.faster_on("numpy")
    def _increase(x):
        x[...] = x + 1

    x = np.zeros(3)
    increase(x)
    assert x.tolist() == [1, 1, 1]


def test_large_arguments_wait_for_a_smaller_call(monkeypatch):
    monkeypatch.setattr(trust, "MOST_ELEMENTS", 10)
    double, _ = doubling(lambda x: x + x)
    double(np.ones(11))
    assert not trust._trusted
    double(np.ones(9))
    assert len(trust._trusted) == 1


def test_arrays_without_elements_prove_nothing():
    double, _ = doubling(lambda x: x * 3)
    assert double(np.ones(0)).size == 0
    assert not trust._trusted
    with pytest.warns(RuntimeWarning, match="disagrees"):
        double(np.ones(1))


def test_python_does_not_vouch_for_what_is_compiled(monkeypatch):
    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)
    double, _ = doubling(lambda x: x + x)
    double(np.ones(5))
    assert not trust.first_run()  # nothing will be compiled
    monkeypatch.setattr(trust, "_trusted", None)  # the next process
    monkeypatch.setattr(numba.config, "DISABLE_JIT", False)
    assert trust.first_run()


def test_without_a_place_to_remember_it_says_so(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(blocked))
    double, _ = doubling(lambda x: x + x)
    with pytest.warns(UserWarning, match="cannot remember"):
        double(np.ones(5))


def test_slow_threads_are_advised_against(monkeypatch):
    assert compiler.thread_pool_advice() is None
    real = importlib.import_module

    def missing(name):
        if name.startswith("numba.np.ufunc."):
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(compiler.importlib, "import_module", missing)
    assert "pip install tbb" in compiler.thread_pool_advice()


@pytest.mark.skipif(not compiler.keep_freed_memory(), reason="another C library than glibc, or told otherwise")
def test_freed_memory_is_used_again():
    def pages_fetched():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        arrays = [np.ones(1 << 20) for _ in range(8)]  # 8 MiB each
        del arrays
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    pages_fetched()
    assert pages_fetched() < 100


def test_a_user_may_say_what_becomes_of_freed_memory(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not compiler.keep_freed_memory()
