"""Whatever ends a training, kill -9 or a full disk, the same training goes on: to the same weights, bit by bit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from processes import MPIEXEC, mpi

from minidet.data import shapes
from minidet.training import SHAPES, CheckpointError, TrainConfig, read_checkpoint, train, write_checkpoint
from minidet.training import checkpoint as module
from minidet.training.checkpoint import BEST, LAST
from minidet.training.monitor import read_metrics

QUICK = TrainConfig(images=24, batch_size=2, validations=3, checkpoints=3, augment=SHAPES.augment, samples=0)
"""Twelve steps of two images, and a validation after every fourth."""


class Killed(BaseException):
    """What nobody catches."""


def score(model, dataset, batch_size) -> dict[str, float]:
    """In place of an evaluation: a number that depends on the weights."""
    AP = float(np.abs(model.parameters()[0].data).mean())
    return Numbers(AP=AP, AP50=2 * AP)


class Numbers(dict):
    """As much of an evaluation as the loop and its report read."""

    def to_json(self) -> dict:
        return dict(self)


def run(out: Path, evaluator=score, **settings) -> None:
    train(
        tiny.model(), shapes("train", images=10, size=64), validate=shapes("val", images=2, size=64), out=out,
        config=QUICK, quiet=True, evaluator=evaluator, **settings,
    )  # fmt: skip


def left(out: Path) -> tuple[list[dict], dict[str, np.ndarray]]:
    """What a training leaves, but for times: the rows of its table, and all arrays of both checkpoints."""
    rows = [vars(row) for row in read_metrics(out / "metrics.csv")]
    arrays = {}
    for name in (LAST, BEST):
        saved = read_checkpoint(out / name)
        arrays |= {f"{name}: {key}": a for part in (saved.weights, saved.optimizer) for key, a in part.items()}
        state = saved.training["state"]
        arrays |= {f"{name}: {key}": np.array(value) for key, value in state.items() if key not in ("class", "seconds")}
    return [{key: value for key, value in row.items() if not key.endswith("_ms")} for row in rows], arrays


def assert_same(out: Path, undisturbed: Path) -> None:
    rows, arrays = left(out)
    expected_rows, expected = left(undisturbed)
    assert rows == expected_rows
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)
    assert not list(out.glob(".*")), "temporary files are left"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a training that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(out)
    return out


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(whole, tmp_path / "finished"))


@pytest.mark.parametrize("nth", [1, 3])
def test_a_killed_validation_is_made_up_for(nth, whole, tmp_path):
    """Neither the row of its step nor its AP nor the best weights are lost; at the end of the training neither."""
    validations = 0

    def dying(*arguments, **keywords):
        nonlocal validations
        validations += 1
        if validations == nth:
            raise Killed
        return score(*arguments, **keywords)

    with pytest.raises(Killed):
        run(tmp_path, dying)
    assert read_metrics(tmp_path / "metrics.csv")[-1].AP is None
    run(tmp_path, resume=True)
    assert_same(tmp_path, whole)
    assert [row.position for row in read_metrics(tmp_path / "metrics.csv") if row.AP] == [8, 16, 24]


# A full disk.


class Full:
    """A disk with room for so many bytes more."""

    def __init__(self, room: int):
        self.room = room

    def open(self, path, mode):
        return FullFile(open(path, mode), self) if mode == "wb" else open(path, mode)


class FullFile:
    def __init__(self, file, disk: Full):
        self.file, self.disk = file, disk

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, content: bytes) -> int:
        self.file.write(content[: self.disk.room])
        if len(content) > self.disk.room:
            self.file.flush()
            raise OSError(28, "No space left on device")
        self.disk.room -= len(content)
        return len(content)


def test_a_disk_that_is_full_at_any_byte_loses_nothing(whole, tmp_path, monkeypatch):
    """Every save of a training in turn finds room for a part of itself; the run goes on from the one before."""
    size = (whole / LAST).stat().st_size
    rooms = [size + k * size // 7 for k in range(1, 7)] + [2 * size, 2 * size - 1, 3 * size - 1]
    for attempt, room in enumerate(rooms):
        monkeypatch.setattr(module, "open", Full(room).open, raising=False)
        with pytest.raises(OSError, match=r"safetensors: the checkpoint cannot be written: .*No space left.*whole"):
            run(tmp_path, resume=attempt > 0)
        assert not list(tmp_path.glob(".*")), "temporary files are left"
        read_checkpoint(tmp_path / LAST)
    monkeypatch.undo()
    run(tmp_path, resume=True)
    assert_same(tmp_path, whole)


def test_a_disk_that_is_full_from_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "open", Full(100).open, raising=False)
    with pytest.raises(OSError, match="start again if nothing was saved yet"):
        run(tmp_path)
    assert os.listdir(tmp_path) == ["metrics.csv"]


def test_a_table_that_does_not_fit_says_its_name(finished, monkeypatch):
    rows = read_metrics(finished / "metrics.csv")

    def full(path, mode="r", **options):
        if mode == "r":
            return open(path, **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minidet.training.monitor.open", full, raising=False)
    with pytest.raises(OSError, match=r"metrics\.csv: cannot be written: .*No space left on device"):
        run(finished, resume=True)
    assert read_metrics(finished / "metrics.csv") == rows


def test_half_written_files_do_not_pile_up(finished):
    """What killed processes leave is removed when the next checkpoint is written."""
    for name in (f".{LAST}.123.part", f".{LAST}.9.part", f".{BEST}.123.part", ".mine.part"):
        (finished / name).write_bytes(b"half")
    write_checkpoint(finished / LAST, read_checkpoint(finished / LAST))
    assert [path.name for path in finished.glob(".*")] == [".mine.part"]


def test_a_checkpoint_without_settings_cannot_be_continued(finished):
    saved = read_checkpoint(finished / LAST)
    write_checkpoint(finished / LAST, replace(saved, training={"state": saved.training["state"]}))
    with pytest.raises(CheckpointError, match=rf"{LAST}: damaged: its header lacks training\.config, without which"):
        run(finished, resume=True)


ONE_THREAD = {"NUMBA_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Trainings that are compared have as many threads: sums of more are equal only to rounding."""

NAP = 0.01  # seconds
ENOUGH = 1800  # seconds for a training to end by itself, on a machine that does other things too

LONG = [
    "--images", "160", "--batch-size", "2", "--set", "validations=4", "--set", "samples=0", "--quiet", *tiny.NETWORK,
]  # fmt: skip


SMALL_DISK = """
mount -t tmpfs -o size=$4 none "$1" || exit 77
"$2" -m minidet train --data "$3" --out "$1/run" {flags} && exit 1
find "$1/run" -name '.*' | grep . && exit 2
mount -o remount,size=50m "$1"
"$2" -m minidet train --data "$3" --out "$1/run" --resume --quiet || exit 3
cp -r "$1/run" "$5"
"""
"""A disk of a given size, a training that does not fit on it, and more room; the disk ends with the shell."""


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [0.5, 1.5, 2.5])
def test_a_small_disk(checkpoints, tmp_path):
    """With room for no checkpoint, for one and none beside it, and for two; each is written beside the old one."""
    data = tiny.coco_folder(tmp_path / "data")
    whole = Training(tmp_path / "whole", data, 1)
    assert whole.end(ENOUGH)[0] == 0
    size = int(checkpoints * (tmp_path / "whole" / LAST).stat().st_size)
    (tmp_path / "disk").mkdir()
    script = SMALL_DISK.format(flags=" ".join(f"'{flag}'" for flag in LONG))
    if checkpoints < 1:
        script = script.replace("--resume --quiet", " ".join(f"'{flag}'" for flag in LONG))
    arguments = [tmp_path / "disk", sys.executable, data, size, tmp_path / "parts"]
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", *map(str, arguments)],
        capture_output=True, text=True, check=False, env=os.environ | ONE_THREAD,
    )  # fmt: skip
    if done.returncode in (77, 127) or "unshare" in done.stderr:
        pytest.skip(f"cannot mount a file system here: {done.stderr}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cannot be written: [Errno 28] No space left on device.  What was saved before is whole" in done.stderr
    assert_same(tmp_path / "parts", tmp_path / "whole")


# kill -9.


MOMENTS = ["0", "0.01", "0.5", "0.999", "1", "synced", "named"]
"""Within a checkpoint: see doomed.py."""


class Training:
    """The command in a process of its own, or in several under mpiexec."""

    def __init__(self, out: Path, data: Path, size: int, nth: int = 0, when: str = "0"):
        self.table, self.size = out / "metrics.csv", size
        self.pids = out.with_name(out.name + ".pids")
        shutil.rmtree(self.pids, ignore_errors=True)
        self.pids.mkdir()
        program = [sys.executable, Path(__file__).with_name("doomed.py"), self.pids, nth, when]
        how = ["--resume", "--quiet"] if (out / LAST).exists() else LONG
        launcher = [] if size == 1 else [MPIEXEC, "-n", size]
        command = [*launcher, *program, "train", "--data", data, "--out", out, *how]
        self.rows = len(read_metrics(self.table))
        self.process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | ONE_THREAD,
        )  # fmt: skip

    def wait_for(self, condition) -> bool:
        """Whether it came true before the process ended."""
        while not condition():
            if self.process.poll() is not None:
                return False
            time.sleep(NAP)
        return True

    def kill(self, rank: int) -> None:
        """kill -9, as soon as all have told their ids, and if none has ended by then."""
        told = self.wait_for(lambda: len([path for path in self.pids.iterdir() if path.read_text()]) == self.size)
        with suppress(ProcessLookupError):
            if told:
                os.kill(int((self.pids / str(rank)).read_text()), signal.SIGKILL)

    def end(self, timeout: float) -> tuple[int, str]:
        """Its status and what it said.  Time is counted in naps: while everything is paused none passes."""
        naps = 0
        while self.process.poll() is None and naps < timeout / NAP:
            time.sleep(NAP)
            naps += 1
        ended = self.process.poll() is not None
        self.process.kill()
        said = "".join(self.process.communicate())
        assert ended, f"still running after {timeout} seconds: {said}"
        return self.process.returncode, said


def survive(folder: Path, kills: int, size: int, seed: int) -> None:
    """Kill trainings at random moments, one after the other; whatever is killed goes on, and ends as undisturbed.

    A part of the kills come while it starts, or at any moment of the training, to any of its processes; the others at
    a random place within a checkpoint, to the process that writes it.
    """
    rng, data = np.random.default_rng(seed), tiny.coco_folder(folder / "data")
    first = Training(folder / "whole", data, size)
    first.wait_for(lambda: len(read_metrics(first.table)) > 0)
    began = time.monotonic()
    assert first.end(ENOUGH)[0] == 0
    seconds = time.monotonic() - began
    killed = within = finished = 0
    while killed < kills or finished == 0:
        out = folder / f"parts{finished}"
        in_checkpoint, victim = rng.random() < 0.4 and killed < kills, 0
        nth, when = (rng.integers(1, 6), rng.choice(MOMENTS)) if in_checkpoint else (0, "0")
        training = Training(out, data, size, nth, when)
        if killed < kills and not in_checkpoint:
            if rng.random() < 0.75:
                rows = len(read_metrics(training.table))
                training.wait_for(lambda table=training.table, rows=rows: len(read_metrics(table)) > rows)
            time.sleep(rng.uniform(0, seconds))
            victim = rng.integers(size)
            training.kill(victim)
            status, said = training.end(10)
        else:
            status, said = training.end(ENOUGH)
        if status == 0:
            assert_same(out, folder / "whole")
            finished += 1
            continue
        assert status in (-signal.SIGKILL, signal.SIGKILL) and "Traceback" not in said, said
        assert size == 1 or "signal 9" in said, said
        killed += 1
        within += in_checkpoint
        moment = f"in checkpoint {nth}, {when}" if in_checkpoint else f"after {len(read_metrics(training.table))} steps"
        print(f"kill {killed}, of process {victim}, {moment}", flush=True)
        if (out / LAST).exists():
            read_checkpoint(out / LAST)
    print(f"{killed} kills, {within} of them within a checkpoint; {finished} trainings ended as the undisturbed one")


@pytest.mark.slow
def test_fifty_kills(tmp_path):
    survive(tmp_path, 50, 1, seed=0)


@mpi
@pytest.mark.slow
def test_twenty_kills_of_one_of_two_processes(tmp_path):
    survive(tmp_path, 20, 2, seed=1)
