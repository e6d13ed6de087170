"""minidet on a GPU: what the device can do, what our kernels reach, and whole networks beside torchvision's.

    python -m tests.benchmarks.gpu                       # everything, under nine minutes on a data-centre GPU
    python -m tests.benchmarks.gpu --part layers --quick
    python -m tests.benchmarks.gpu --dry-run             # tiny sizes on NumPy: that every line of this runs

Each side is a process of its own; they take turns, and give back what memory they do not need in between.  Images
are on the device before the clock starts; every call ends when the device is done.  torchvision runs eagerly in
channels_last, in bf16 with autocast.  fp32 is float32 as NumPy has it; tf32 rounds the factors of products to ten
bits of fraction.  Reads are copies to the host, launches what one call starts at least (launches.py); a dry run counts
them on the fake GPU.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from statistics import median

from minidet import backend
from tests.benchmarks.turns import Worker

PARTS = ("ceilings", "layers", "elementwise", "train", "inference")
PRECISIONS = ("fp32", "tf32", "bf16")
LIMIT = 500
"""Seconds after which nothing new is begun."""


def main() -> int:
    """Measure, print tables, write the JSON; the exit status: 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="only this one; may be given again")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and windows")
    parser.add_argument("--dry-run", action="store_true", help="on NumPy, tiny: the numbers mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    options = parser.parse_args()
    if not options.dry_run:
        try:
            backend.load("cupy")
        except RuntimeError as error:
            print(f"No GPU to measure: {error}.", file=sys.stderr)
            return 2
    os.environ["MINIDET_BACKEND"] = "numpy" if options.dry_run else "cupy"
    torch = not options.dry_run and torch_is_there()
    bench = Benchmark(options, torch)
    print(f"{device(options.dry_run)}; torchvision {'beside it' if torch else 'not measured'}")
    for part in options.part or PARTS:
        bench.measure(part)
    if options.json:
        options.json.write_text(json.dumps(bench.rows, indent=1) + "\n")
    return 0


def device(dry: bool) -> str:
    """What every number holds for."""
    if dry:
        return "a dry run on NumPy"
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(0)
    return f"{properties['name'].decode()}, CuPy {cupy.__version__}, CUDA {cupy.cuda.runtime.runtimeGetVersion()}"


def torch_is_there() -> bool:
    """Whether there is a torchvision, and a torch for GPUs: on the CPU its steps would take minutes."""
    if not all(map(importlib.util.find_spec, ("torch", "torchvision"))):
        return False
    return importlib.import_module("torch").cuda.is_available()


class Benchmark:
    """The parts, and the rows they gave."""

    def __init__(self, options: argparse.Namespace, torch: bool) -> None:
        self.tiny, self.quick, self.torch = options.dry_run, options.quick or options.dry_run, torch
        self.began, self.rows, self.sides = time.monotonic(), [], {}

    def measure(self, part: str) -> None:
        """One part: its table, line by line as it comes."""
        print(f"\n{part}")
        if part in ("train", "inference"):
            batches = (2,) if self.quick else (2, 16) if part == "train" else (1, 16)
            print(f"{'':24}{'ours ms':>9}{'images/s':>10}{'torch ms':>10}{'images/s':>10}{'ratio':>7}"
                  f"{'ours MiB':>10}{'torch MiB':>10}{'reads':>7}{'launches: own, cuBLAS, CuPy':>29}")  # fmt: skip
            for images in batches:
                for precision in PRECISIONS:
                    self.attempt(part, f"N={images} {precision}", self.network, part, images, precision)
        elif part == "ceilings":
            self.attempt(part, "", self.table, part)
        else:
            cases = [{"precision": p} for p in ("fp32", "bf16")]
            if part == "layers":
                cases = [{"precision": p, "images": n} for p in PRECISIONS for n in ((2,) if self.quick else (2, 16))]
            for case in cases:
                self.attempt(part, case["precision"], self.table, part, **case)
        self.close()

    def attempt(self, part: str, name: str, run, *arguments, **more) -> None:
        """A measurement; what goes wrong in it, out of memory for one, is a row and not the end."""
        if time.monotonic() - self.began > LIMIT:
            self.rows.append({"part": part, "name": name, "error": f"not begun: {LIMIT} s are over"})
        else:
            try:
                return run(*arguments, **more)
            except (RuntimeError, OSError) as error:
                self.rows.append({"part": part, "name": name, "error": str(error)})
                self.close()
        print(f"{name:24}{self.rows[-1]['error']}")

    def table(self, part: str, **arguments) -> None:
        """Rows that our side measures by itself."""
        worker = self.side("ours")
        worker.ask("build", what="measurements", tiny=self.tiny)
        for row in worker.ask(part, **arguments)["rows"]:
            self.rows.append({"part": part, **row})
            speed = next(f"{row[unit]:10.2f} {unit:8}" for unit in ("TFLOP/s", "GB/s") if unit in row)
            error = f"   max error {row['max_error']:.1e}" if "max_error" in row else ""
            print(f"{row['name']:56}{row['ms']:10.3f} ms{speed}{error}")

    def network(self, part: str, images: int, precision: str) -> None:
        """A whole network on both sides, in turns."""
        sides = [self.side(name) for name in ("ours", "torch")[: 1 + self.torch]]
        row = {"part": part, "name": f"N={images} {precision}", "images": images, "precision": precision}
        times: dict[str, list[float]] = {side.name: [] for side in sides}
        for side in sides:
            side.ask("build", what="network", part=part, images=images, precision=precision, tiny=self.tiny)
            row[f"{side.name}_mib"] = side.ask("memory")["mib"]
            side.ask("release")
        for _ in range(1 if self.tiny else 2 if self.quick else 3):
            for side in sides:
                seconds = side.ask("run", calls=1)["seconds"]  # grows the pool again, and says how many fill a window
                calls = 1 if self.tiny else max(2, min(50, round(1 / seconds)))
                times[side.name].append(1e3 * side.ask("run", calls=calls)["seconds"])
                side.ask("release")
        row["reads"] = sides[0].ask("reads")["reads"]
        row["launches"] = sides[0].ask("launches")
        for name, windows in times.items():
            row[f"{name}_ms"], row[f"{name}_images_s"] = median(windows), 1e3 * images / median(windows)
        torch = [row.get(f"torch_{key}") for key in ("ms", "images_s", "mib")]
        row["ratio"] = row["ours_ms"] / torch[0] if torch[0] else None
        self.rows.append(row)
        cells = [row["ours_ms"], row["ours_images_s"], torch[0], torch[1], row["ratio"], row["ours_mib"], torch[2]]
        shown = (f"{'-' if cell is None else format(cell, form):>{width}}" for cell, form, width in zip(
            cells, (".1f", ".1f", ".1f", ".1f", ".2f", ".0f", ".0f"), (9, 10, 10, 10, 7, 10, 10), strict=True))
        started = " + ".join(map(str, row["launches"].values()))
        print(f"{row['name']:24}{''.join(shown)}{row['reads']:7}{started:>29}")

    def side(self, name: str) -> Worker:
        """Its process, started when first asked for."""
        if name not in self.sides:
            self.sides[name] = Worker(f"gpu_{name}", name)
        return self.sides[name]

    def close(self) -> None:
        """End all processes."""
        for side in self.sides.values():
            side.process.stdin.close()
            side.process.wait(timeout=60)
        self.sides = {}


if __name__ == "__main__":
    sys.exit(main())
