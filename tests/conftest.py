"""Fixtures that every test file may ask for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher
from untraced import untraced

from minidet import backend

Dispatcher.compile = untraced(Dispatcher.compile)  # which is Numba's work, by the minute


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator that gives the same numbers in every run, whichever tests run before."""
    return np.random.default_rng(0)


@pytest.fixture
def data_folder() -> Callable[[str], Path]:
    """`data_folder("bccd")` is that folder of MINIDET_TEST_DATA; the test is skipped where it is absent."""

    def find(name: str) -> Path:
        root = os.environ.get("MINIDET_TEST_DATA")
        if not root:
            pytest.skip(f"needs the data set {name}: set MINIDET_TEST_DATA to the folder that holds it")
        folder = Path(root) / name
        if not folder.is_dir():
            pytest.skip(f"needs the data set {name}: MINIDET_TEST_DATA={root} does not hold it")
        return folder

    return find


@pytest.fixture
def fake_cupy() -> Iterator[ModuleType]:
    """The backend "cupy" on a fake GPU (fake_cupy.py); the module, whose `counts` say who waited for it."""
    from fake_gpu import fake_gpu

    with fake_gpu() as module:
        yield module


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.gpu)])
def cupy(request: pytest.FixtureRequest):
    """The namespace of CuPy: of the fake one, and with -m gpu of the real one, or the test is skipped."""
    if request.param == "fake":
        request.getfixturevalue("fake_cupy")
    try:
        return backend.load("cupy")
    except RuntimeError as error:
        pytest.skip(str(error))


class _Zeros:
    def normal(self, mean: float, deviation: float, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape)

    def uniform(self, low: float, high: float, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks start with zeros: drawing the weights of one with 34 million takes seconds."""
    monkeypatch.setattr(np.random, "default_rng", lambda seed: _Zeros())


BARE = (
    "test_convolution_engines.py", "test_parity.py", "test_gpu_benchmarks.py", "test_house.py", "test_docstrings.py",
    "test_chapters.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Coverage makes a test up to twice as slow: it rests where others run the same lines.

    That is what array-api-strict and the fake GPU run, for NumPy runs it too; the reference vectors, for they run
    whole networks; the convolution engines, whose source is compiled and not counted; and what reads sources or
    runs them in other processes.
    """
    for item in items:
        path = item.path.as_posix()
        strict = "array_api_strict" in item.name or item.name.startswith("test_textbook_is_standard")
        if strict or "/reference/" in path or path.endswith(BARE):
            item.add_marker(pytest.mark.no_cover)
