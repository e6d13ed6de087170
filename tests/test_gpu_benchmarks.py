"""The scripts that measure GPUs run, from end to end, where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from source import ROOT


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
    done = run("tests.benchmarks.gpu", "--dry-run", "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["part"] for row in rows} == {"ceilings", "layers", "elementwise", "train", "inference"}
    assert [row for row in rows if "error" in row] == []
    assert all(row["max_error"] < (1e-2 if "bf16" in row["name"] else 1e-5) for row in rows if row["part"] == "layers")
    assert len([row for row in rows if row["part"] == "train"]) == 3


def test_every_training(tmp_path):
    done = run("tests.benchmarks.gpu_training", "--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["shapes", "bccd", "coco"]
    assert (tmp_path / "coco_loss.png").stat().st_size > 1000
