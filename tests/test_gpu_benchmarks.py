"""The scripts that measure GPUs run, from end to end, where there is none."""

from __future__ import annotations

import json
import operator
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from source import ROOT

from minidet import backend, kernels
from tests.benchmarks.launches import counted


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("script", ["gpu", "gpu_training"])
def test_without_a_gpu_they_say_so(script):
    done = run(f"tests.benchmarks.{script}", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("No GPU to ") and len(done.stderr.splitlines()) == 1


def test_every_part_of_the_benchmark(tmp_path):
    pytest.importorskip("ml_dtypes")
    if not shutil.which("g++"):
        pytest.skip("needs g++, to count launches on the fake GPU")
    done = run("tests.benchmarks.gpu", "--dry-run", "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["part"] for row in rows} == {"ceilings", "layers", "elementwise", "train", "inference"}
    assert [row for row in rows if "error" in row] == []
    assert all(row["max_error"] < (1e-2 if "bf16" in row["name"] else 1e-5) for row in rows if row["part"] == "layers")
    networks = [row["launches"] for row in rows if "launches" in row]
    assert len(networks) == 6 and all(min(started.values()) > 0 for started in networks)
    assert len([row for row in rows if row["part"] == "train"]) == 3


def test_what_is_counted_as_a_launch(fake_cupy):
    xp = backend.load("cupy")
    x, rows, host = xp.asarray(np.ones((2, 3), np.float32)), xp.asarray(np.array([1, 0])), np.ones(3)
    with counted(xp) as counts:
        for started, run in (
            ((0, 0, 0), lambda: xp.reshape(x[1:, ...], (3,))),
            ((0, 0, 0), lambda: (xp.asarray(host), xp.empty(3), x.shape, xp.astype(x, x.dtype, copy=False), x.get())),
            ((0, 0, 2), lambda: 1 - x * 2),
            ((0, 0, 1), lambda: operator.iadd(x, 1)),
            ((0, 0, 1), lambda: operator.setitem(x, 0, 1.0)),
            ((0, 0, 1), lambda: x[rows]),
            ((0, 0, 2), lambda: xp.sum(xp.stack([x, x]))),
            ((0, 0, 1), lambda: xp.add.at(x, rows, x)),
            ((0, 2, 0), lambda: (x @ xp.matrix_transpose(x), xp.matmul(x, xp.matrix_transpose(x)))),
            ((1, 0, 0), lambda: kernels.rectify(x)),
        ):  # fmt: skip
            before = tuple(counts.values())
            run()
            assert tuple(now - then for now, then in zip(counts.values(), before, strict=True)) == started
    after = dict(counts)
    kernels.rectify(xp.sum(x[:, :2] @ x + 1))
    assert counts == after


def test_every_training(tmp_path):
    done = run("tests.benchmarks.gpu_training", "--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["shapes", "bccd", "coco"]
    assert (tmp_path / "coco_loss.png").stat().st_size > 1000
