"""The helper of a first run: it compiles what the way back needs, nothing else, and ends when the training says so."""

from __future__ import annotations

import io
import json
import runpy
import sys
import time
import warnings

import numba
import pytest

from minidet import presets
from minidet.kernels import kernel
from minidet.training import ahead
from minidet.training.settings import to_json

CONFIG = presets.small(["one", "two"])


@pytest.fixture
def versions(monkeypatch):
    """Which version every kernel runs from now on."""
    seen: dict[str, set[str]] = {}
    choose = kernel.Kernel.choose

    def record(self, *args):
        chosen = choose(self, *args)
        seen.setdefault(self.__name__, set()).add(chosen[0])
        return chosen

    monkeypatch.setattr(kernel.Kernel, "choose", record)
    return seen


@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="without the compiler every version is a definition")
def test_it_goes_forward_by_definitions_and_back_by_every_engine(versions, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(to_json(CONFIG))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy's: the module is imported already
        runpy.run_module("minidet.training.ahead", run_name="__main__")
    assert versions["convolve"] == versions["max_pool"] == versions["normalize_groups"] == {"textbook"}
    assert versions["convolve_weight_gradient"] >= {"numpy:stem", "numpy:direct", "numpy:winograd4"}
    assert versions["max_pool_gradient"] == versions["normalize_groups_gradient"] == {"numpy:fast"}


def run(monkeypatch, code: str):
    monkeypatch.setattr(ahead, "COMMAND", (sys.executable, "-c", code))
    return ahead.compiling_ahead(CONFIG)


def test_it_is_told_the_network_and_a_good_end_is_silent(monkeypatch, tmp_path):
    told = tmp_path / "told.json"
    with run(monkeypatch, f"import sys; text = sys.stdin.read(); open({str(told)!r}, 'w').write(text)"):
        while not told.exists() or not told.read_text():
            time.sleep(0.01)
    assert json.loads(told.read_text()) == json.loads(json.dumps(to_json(CONFIG)))


def test_a_failure_is_reported_and_harms_nothing(monkeypatch, tmp_path):
    with pytest.warns(RuntimeWarning, match="compiling ahead failed: ValueError: no room"):
        with run(monkeypatch, f"open({str(tmp_path / 'ran')!r}, 'w'); raise ValueError('no room')"):
            while not (tmp_path / "ran").exists():
                time.sleep(0.01)
            time.sleep(0.5)  # until it has ended by itself


def test_it_does_not_outlive_the_first_step(monkeypatch):
    clock = time.perf_counter()
    with run(monkeypatch, "import time; time.sleep(60)"):
        pass
    assert time.perf_counter() - clock < 30
    with pytest.raises(KeyError):
        with run(monkeypatch, "import time; time.sleep(60)"):
            raise KeyError
    assert time.perf_counter() - clock < 30
