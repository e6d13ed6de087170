"""Several processes take turns on a machine that is theirs alone, and the windows that were not are thrown away."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from tqdm import tqdm

THREADS = 2
WINDOW = 0.4
"""Seconds a window lasts at least: the kernel counts the machine's busy time in hundredths."""

FOREIGN = 0.05
"""Part of the machine that others may have had in a window that counts."""

PATIENCE = 4
"""Windows tried per window wanted."""

PAUSE = 0.05
"""Seconds between two turns, until the idle threads of the last one have stopped spinning."""


class Worker:
    """One side: a process that answers commands (see worker.py)."""

    def __init__(self, module: str, name: str) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), str(THREADS))
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"tests.benchmarks.{module}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | threads,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        self.name, self.calls = name, 1
        self.windows: list[tuple[float, float]] = []
        """(part of the machine that others had, milliseconds per call) of each window."""

    def ask(self, do: str, **arguments) -> dict:
        """What the process answers to a command."""
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: the process ended at command {do!r}; see its message above")
        return json.loads(line)

    def warm_up(self) -> None:
        """Run a few times; afterwards it is known how many calls fill a window."""
        for _ in range(2):
            seconds = self.ask("run", calls=1)["seconds"]
        self.calls = max(1, round(WINDOW / seconds))
        self.windows = []

    def window(self) -> None:
        """Measure once more."""
        time.sleep(PAUSE)
        busy, clock = _busy_seconds(), time.perf_counter()
        answer = self.ask("run", calls=self.calls)
        seconds = time.perf_counter() - clock
        foreign = (_busy_seconds() - busy - answer["cpu"]) / (seconds * os.cpu_count())
        self.windows.append((foreign, 1e3 * answer["seconds"]))

    @property
    def clean(self) -> list[float]:
        """Milliseconds of the windows that counted."""
        return [ms for foreign, ms in self.windows if foreign <= FOREIGN]

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait(timeout=60)


def take_turns(workers: list[Worker], rounds: int, title: str) -> None:
    """Until each has so many clean windows, or patience ends; who has them is asked no more."""
    for _ in tqdm(range(PATIENCE * rounds), desc=title, leave=False, disable=None):
        lacking = [worker for worker in workers if len(worker.clean) < rounds]
        if not lacking:
            return
        for worker in lacking:
            worker.window()


def milliseconds(worker: Worker) -> float:
    """Median over the clean windows; without any, over the least disturbed half."""
    half = sorted(worker.windows)[: -(-len(worker.windows) // 2)]
    return median(worker.clean or [ms for _, ms in half])


def disturbance(workers: list[Worker]) -> str:
    """How many windows were thrown away, in words."""
    taken = sum(len(worker.windows) for worker in workers)
    lost = taken - sum(len(worker.clean) for worker in workers)
    never = [worker.name for worker in workers if not worker.clean]
    return f"{lost} of {taken} windows disturbed" + (f", NONE CLEAN for {', '.join(never)}" if never else "")


def _busy_seconds() -> float:
    """CPU time that the whole machine has spent on anything, time taken by other virtual machines included."""
    user, nice, system, _idle, _wait, interrupt, soft, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + interrupt + soft + steal) / os.sysconf("SC_CLK_TCK")
