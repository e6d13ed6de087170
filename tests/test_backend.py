"""Which array library runs, and what the user is told where one cannot."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from minidet import backend
from minidet.autograd import Tensor


@pytest.fixture
def fake(monkeypatch):
    """`fake(name, **attributes)` makes `import name` find a module with these attributes; None: not find it."""
    monkeypatch.setattr(backend, "_cupy_checked", False)

    def install(name: str, module: dict | None):
        if module is not None:
            attributes, module = module, ModuleType(name)
            vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return install


def test_numpy_is_the_default(monkeypatch):
    monkeypatch.delenv("MINIDET_BACKEND", raising=False)
    assert backend.default() is np
    monkeypatch.setenv("MINIDET_BACKEND", "")
    assert backend.default() is np


def test_the_variable_chooses(monkeypatch):
    monkeypatch.setenv("MINIDET_BACKEND", "array_api_strict")
    assert backend.default() is importlib.import_module("array_api_strict")


@pytest.mark.parametrize("name", ["torch", "NumPy", "numpy "])
def test_an_unknown_backend_lists_the_known_ones(monkeypatch, name):
    monkeypatch.setenv("MINIDET_BACKEND", name)
    message = f"MINIDET_BACKEND='{name}' is unknown: choose one of numpy, cupy, array_api_strict"
    with pytest.raises(ValueError, match=message):
        backend.default()
    with pytest.raises(ValueError, match=f"unknown backend '{name}': choose one of numpy, cupy"):
        backend.load(name)


@pytest.mark.parametrize("missing", ["cupy", "array_api_compat.cupy"])
def test_cupy_that_is_not_installed_says_what_to_install(fake, monkeypatch, missing):
    fake("cupy", {})
    fake(missing, None)
    monkeypatch.setenv("MINIDET_BACKEND", "cupy")
    with pytest.raises(RuntimeError, match=r"needs CuPy .*pip install 'minidet\[cupy\]'.*cupy-cuda12x"):
        backend.default()


def test_cupy_without_a_gpu_says_so_in_one_sentence(fake, monkeypatch):
    class CUDARuntimeError(Exception):
        pass

    def ones(shape):
        raise CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")

    fake("cupy", {"ones": ones})
    fake("array_api_compat.cupy", {})
    monkeypatch.setenv("MINIDET_BACKEND", "cupy")
    match = "found no usable GPU .CUDARuntimeError: cudaErrorNoDevice.*nvidia-smi.*MINIDET_BACKEND=numpy"
    with pytest.raises(RuntimeError, match=match):
        backend.default()


def test_cupy_is_tried_once(fake):
    tried = []
    core = SimpleNamespace(set_compute_type=lambda dtype, kind: None)
    fake("cupy", {"ones": lambda shape: tried.append(shape) or np.ones(shape), "_core": core})
    namespace = fake("array_api_compat.cupy", {})
    assert backend.load("cupy") is namespace
    assert backend.load("cupy") is namespace
    assert tried == [(2, 2)]
    assert backend.name_of(namespace) == "cupy"


def test_tf32_is_on_until_somebody_turns_it_off(fake, monkeypatch):
    """CuPy is told when it is loaded, and whenever the answer changes."""
    told = []
    core = SimpleNamespace(set_compute_type=lambda *rule: told.append(rule))
    fake("cupy", {"ones": np.ones, "_core": core})
    fake("array_api_compat.cupy", {})
    monkeypatch.setattr(backend, "_tf32", None)
    monkeypatch.delenv("MINIDET_TF32", raising=False)
    assert backend.tf32()
    backend.use_tf32(False)
    assert not backend.tf32() and told == []
    backend.load("cupy")
    backend.use_tf32(True)
    assert told == [("float32", 1), ("float32", 7)]
    for value, answer in (("0", False), ("1", True), ("", True)):
        monkeypatch.setattr(backend, "_tf32", None)
        monkeypatch.setenv("MINIDET_TF32", value)
        assert backend.tf32() is answer
    monkeypatch.setattr(backend, "_tf32", None)
    monkeypatch.setenv("MINIDET_TF32", "no")
    with pytest.raises(ValueError, match="MINIDET_TF32='no' is unknown: choose 0 or 1"):
        backend.tf32()


def test_array_api_strict_that_is_not_installed_says_what_to_install(fake):
    fake("array_api_strict", None)
    with pytest.raises(RuntimeError, match="needs a package: pip install array-api-strict"):
        backend.load("array_api_strict")


class FakeCupyArray:
    """As much of a CuPy array as `backend` looks at."""

    __module__ = "cupy"

    def get(self):
        return np.arange(3)


@pytest.mark.parametrize("name", ["numpy", "array_api_strict"])
def test_an_array_knows_its_library(name):
    xp = backend.load(name)
    x = xp.asarray([1.0, 2.0])
    assert backend.library(x) == name == backend.name_of(xp)
    assert backend.namespace(x) is xp
    host = backend.to_numpy(x)
    assert type(host) is np.ndarray
    assert host.tolist() == [1.0, 2.0]


def test_numpy_arrays_are_not_copied_to_the_host():
    x = np.ones(3)
    assert backend.to_numpy(x) is x


def test_a_cupy_array_is_fetched(fake):
    assert backend.library(FakeCupyArray()) == "cupy"
    assert backend.to_numpy(FakeCupyArray()).tolist() == [0, 1, 2]


@pytest.mark.parametrize("value", [[1.0, 2.0], 3.0, "text", None, Tensor(np.ones(2))])
def test_what_is_no_array_is_refused(value):
    with pytest.raises(TypeError, match="expected an array of numpy, cupy, array_api_strict, got "):
        backend.library(value)
