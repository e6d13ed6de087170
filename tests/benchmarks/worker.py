"""A process that computes when it is told to, and sleeps in between.

It reads a JSON command per line from standard input and answers each with a line.  What it can measure is a
table of factories: name -> function(**arguments) -> job; a job is an object with `run()`, once per call to be
timed, or `results()`, the arrays to compare, or both.  Other methods of a job can be called as well.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np


def memory_mib(field: str) -> float:
    """VmRSS or VmHWM of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def serve(factories: Mapping[str, Callable]) -> None:
    """Obey until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no answer
    imported = memory_mib("VmRSS")
    job = None
    for line in sys.stdin:
        command = json.loads(line)
        do, answer = command.pop("do"), {}
        if do == "build":
            job = factories[command.pop("what")](**command)
        elif do == "run":
            calls, cpu, clock = command["calls"], time.process_time(), time.perf_counter()
            for _ in range(calls):
                job.run()
            seconds = time.perf_counter() - clock
            answer = {"seconds": seconds / calls, "cpu": time.process_time() - cpu}
        elif do == "results":
            np.savez(command["file"], **job.results())
        elif do == "forget_peak":
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM starts again
        elif do == "peak":
            answer = {"mib": memory_mib("VmHWM") - imported}
        else:
            answer = getattr(job, do)(**command)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
