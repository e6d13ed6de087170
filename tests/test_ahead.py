"""The helper of a first run: it compiles what the way back needs, nothing else, and ends when the training says so."""

from __future__ import annotations

import io
import json
import sys
import time
import warnings
from contextlib import contextmanager

import numba
import pytest
from test_training import QUICK, tiny_data
from tiny import model as tiny_model

from minidet import presets
from minidet.kernels import kernel
from minidet.training import ahead, loop, train
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
    ahead.main()
    assert versions["convolve"] == versions["max_pool"] == versions["normalize_groups"] == {"textbook"}
    assert versions["convolve_weight_gradient"] >= {"numpy:stem", "numpy:direct", "numpy:winograd4"}
    assert versions["max_pool_gradient"] == versions["normalize_groups_gradient"] == {"numpy:fast"}


def helped(monkeypatch, code: str):
    """With another program in the helper's place."""
    monkeypatch.setattr(ahead, "COMMAND", ("-c", code))
    return ahead.compiling_ahead(CONFIG)


def test_it_is_told_the_network_and_a_good_end_is_silent(monkeypatch, tmp_path):
    told = tmp_path / "told.json"
    code = f"import sys; open({str(told)!r}, 'w').write(sys.stdin.read())"
    with warnings.catch_warnings(), helped(monkeypatch, code) as helper:
        warnings.simplefilter("error")
        helper.wait(60)
    assert json.loads(told.read_text()) == json.loads(json.dumps(to_json(CONFIG)))


def test_a_failure_is_reported_and_harms_nothing(monkeypatch):
    with pytest.warns(RuntimeWarning, match="compiling ahead failed: ValueError: no room"):
        with helped(monkeypatch, "raise ValueError('no room')") as helper:
            helper.wait(60)
    with pytest.warns(RuntimeWarning, match="compiling ahead failed: it ended with 3"):
        with helped(monkeypatch, "import os; os._exit(3)") as helper:
            helper.wait(60)


def test_the_command_itself_is_run(monkeypatch, tmp_path):
    """In a folder with a file that must not be taken for a library, and told no network."""
    (tmp_path / "numpy.py").write_text("raise SystemError('the wrong file')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ahead, "to_json", lambda config: {"colour": "red"})
    reason = "compiling ahead failed: ValueError: RetinaNetConfig: unknown setting 'colour'"
    with pytest.warns(RuntimeWarning, match=reason):
        with ahead.compiling_ahead(CONFIG) as helper:
            helper.wait(120)


@pytest.mark.parametrize("executable", [None, "", "/no/such/python"])
def test_without_a_python_to_ask_the_training_goes_on(executable, monkeypatch):
    monkeypatch.setattr(sys, "executable", executable)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with ahead.compiling_ahead(CONFIG) as helper:
            assert helper is None
    assert len(said) == (executable == "/no/such/python")


def test_it_does_not_outlive_the_first_step(monkeypatch):
    clock, helpers = time.perf_counter(), []
    with helped(monkeypatch, "import time; time.sleep(60)") as helper:
        helpers.append(helper)
    with pytest.raises(KeyError), helped(monkeypatch, "import time; time.sleep(60)") as helper:
        helpers.append(helper)
        raise KeyError
    assert all(helper.poll() is not None for helper in helpers)
    assert time.perf_counter() - clock < 50


@pytest.mark.parametrize("first", [True, False])
def test_a_first_run_is_helped_until_its_first_step_is_done(first, monkeypatch):
    said = []

    @contextmanager
    def noted(config):
        said.append("starts")
        yield
        said.append("ends")

    step = loop._step
    monkeypatch.setattr(loop, "compiling_ahead", noted)
    monkeypatch.setattr(loop, "first_run", lambda: first)
    monkeypatch.setattr(loop.numba, "get_num_threads", lambda: 2)
    monkeypatch.setattr(loop, "_step", lambda *args: said.append("step") or step(*args))
    train(tiny_model(), tiny_data(), images=6, config=QUICK, quiet=True)
    assert said == (["starts", "step", "ends", "step", "step"] if first else ["step"] * 3)
