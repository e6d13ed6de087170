"""Parallel loops: every unit once, whatever the threads, the types, and what goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numba
import numpy as np
import pytest

from minidet.kernels.parallel import Parallel, in_turn, parallel

compiled_only = pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="in Python the exception itself is raised")


@parallel
def count(i, numbers, by):
    numbers[i] += by


@parallel
def divide(i, numbers, by):
    numbers[i] = 12 // (by - i)


@parallel
def copy_mirrored(i, numbers, by):
    """Into the second half what is in the first, from its end: units that other threads ran in the loop before."""
    half = len(numbers) // 2
    numbers[half + i] = numbers[half - 1 - i] + by


@parallel
def add_neighbour(i, numbers, by):
    """To the first half, from the second."""
    half = len(numbers) // 2
    numbers[i] = numbers[half + (i + half // 2) % half] * 2


def in_turn_in_python(loops, *args):
    for unit, begin, end in loops:
        for i in range(begin, end):
            unit.py_func(i, *args)


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = numba.get_num_threads()
    yield numba.set_num_threads
    numba.set_num_threads(before)


@pytest.mark.parametrize("units", [0, 1, 2, 3, 7, 64, 1001])
@pytest.mark.parametrize("used", {1, numba.config.NUMBA_NUM_THREADS})
def test_every_unit_runs_once(units, used, threads):
    threads(used)
    numbers = np.zeros(units + 3, np.int64)
    count(units, numbers, 1)
    np.testing.assert_array_equal(numbers, [1] * units + [0] * 3)


@pytest.mark.parametrize("half", [1, 2, 7, 64, 501])
@pytest.mark.parametrize("used", {1, numba.config.NUMBA_NUM_THREADS})
def test_a_loop_begins_when_the_one_before_is_done(half, used, threads):
    """Every loop reads what other units of the loop before wrote: one that began early would read something else."""
    threads(used)
    loops = (
        (count, 0, half), (copy_mirrored, 0, half), (add_neighbour, 0, half), (count, half // 2, half // 2),
        (copy_mirrored, half // 3, half), (count, half, 2 * half), (add_neighbour, 0, half // 2),
    )  # fmt: skip
    for _ in range(20):
        numbers, want = np.arange(2 * half), np.arange(2 * half)
        in_turn(loops, numbers, 3)
        in_turn_in_python(loops, want, 3)
        np.testing.assert_array_equal(numbers, want)


def test_loops_without_units_do_nothing():
    numbers = np.arange(4)
    in_turn(((count, 0, 0), (copy_mirrored, 2, 2)), numbers, 1)
    in_turn(((count, 3, 1), (count, 0, 4)), numbers, 1)  # a range that ends before it begins is empty, as in Python
    np.testing.assert_array_equal(numbers, [1, 2, 3, 4])


@compiled_only
def test_after_an_exception_no_further_loop_runs():
    for by in (5, *4000 * (0,)):
        numbers = np.zeros(8, np.int64)
        with pytest.raises(RuntimeError, match="count, divide: a unit of this parallel loop raised an exception"):
            in_turn(((count, 0, 8), (divide, 0, 8), (count, 0, 8)), numbers, by)
        assert numbers.tolist() == [12 // (by - i) if i != by else by for i in range(8)]


def test_loops_in_turn_change_their_types_too():
    for kind in (np.float32, np.int64, np.float64, np.float32):
        numbers = np.zeros(6, kind)
        in_turn(((count, 0, 3), (copy_mirrored, 0, 3)), numbers, kind(2))
        assert numbers.tolist() == [2, 2, 2, 4, 4, 4]


def test_more_threads_than_cores_and_the_slow_pool():
    program = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import numpy as np\n"
        "from test_parallel import *\n"
        "for half in (1, 2, 3, 5, 100):\n"
        "    for _ in range(20):\n"
        "        loops = ((count, 0, half), (copy_mirrored, 0, half), (add_neighbour, 0, half))\n"
        "        numbers, want = np.arange(2 * half), np.arange(2 * half)\n"
        "        in_turn(loops, numbers, 3)\n"
        "        in_turn_in_python(loops, want, 3)\n"
        "        assert (numbers == want).all(), (numbers, want)\n"
        "for units in (1, 2, 4, 5, 6, 103):\n"
        "    for _ in range(20):\n"
        "        numbers = np.zeros(units, np.int64)\n"
        "        count(units, numbers, 3)\n"
        "        assert (numbers == 3).all(), numbers\n"
    )
    for pool in ("default", "workqueue"):
        environment = {**os.environ, "NUMBA_NUM_THREADS": "5", "NUMBA_THREADING_LAYER": pool}
        subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=300)


def test_types_may_change_from_call_to_call():
    for kind in (np.float32, np.int64, np.float32, np.float64, np.int64):
        numbers = np.zeros(9, kind)
        count(9, numbers, kind(2))
        assert numbers.dtype == kind and (numbers == 2).all()
    columns = np.zeros((9, 2), np.float32)
    count(9, columns[:, 1], np.float32(1))  # not contiguous: a type of its own, too
    np.testing.assert_array_equal(columns, [[0, 1]] * 9)


@compiled_only
def test_an_exception_in_a_unit_is_told_and_the_others_run():
    for by in (5, *4000 * (0,)):  # a thread that comes late may find that a unit has raised already
        numbers = np.zeros(8, np.int64)
        with pytest.raises(RuntimeError, match="divide: a unit of this parallel loop raised an exception"):
            divide(8, numbers, by)
        np.testing.assert_array_equal(numbers, [12 // (by - i) if i != by else 0 for i in range(8)])


def test_the_loop_in_python_is_the_same():
    numbers, again = np.zeros((2, 20), np.int64)
    count(15, numbers, 7)
    count.one_by_one(15, again, 7)
    np.testing.assert_array_equal(numbers, again)
    with pytest.raises(ZeroDivisionError):  # a debugger stops where it happens
        divide.one_by_one(8, again, 5)


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)
    numbers = np.zeros(4, np.int64)
    Parallel(count.py_func)(4, numbers, 1)
    np.testing.assert_array_equal(numbers, [1] * 4)
    in_turn(((count, 1, 3), (copy_mirrored, 0, 2)), numbers, 1)
    np.testing.assert_array_equal(numbers, [1, 2, 3, 2])


def test_python_threads_with_types_of_their_own():
    arrays = [np.zeros(500, kind) for kind in (np.int64, np.float32, np.float64, np.float32)]

    def work(numbers):
        for _ in range(50):
            count(500, numbers, numbers.dtype.type(1))

    workers = [threading.Thread(target=work, args=(numbers,)) for numbers in arrays]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all((numbers == 50).all() for numbers in arrays)
