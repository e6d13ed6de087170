"""How long the first training takes to compile, and how long later ones take to begin.

    python -m tests.benchmarks.compiling

Two steps of the small network on the built-in images, with an empty folder for compiled code, as a training does it:
with a second process that compiles ahead.  Then, in another process, with what these left in the folder, and last with
an empty one again and nobody to help.  CPU time and functions are those of the process itself, not of its helper.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
from contextlib import ExitStack
from time import perf_counter, process_time

STEPS, BATCH = 2, 8


def measure(connection, helped: bool) -> None:
    """In a fresh process: what importing and every step took, and every compilation by itself."""
    clocks = [(perf_counter(), process_time())]
    from numba.core import event

    import minidet as md
    from minidet.training import SHAPES
    from minidet.training.ahead import compiling_ahead
    from minidet.training.step import batch_gradient

    compilations: list[tuple[float, str]] = []
    running: list[list] = []

    class Listener(event.Listener):
        def on_start(self, event):
            running.append([perf_counter(), 0.0])

        def on_end(self, event):
            start, inner = running.pop()
            took = perf_counter() - start
            if running:
                running[-1][1] += took
            function = event.data["dispatcher"].py_func
            compilations.append((took - inner, f"{function.__module__}.{function.__name__}"))

    event.register("numba:compile", Listener())
    clocks.append((perf_counter(), process_time()))
    data = md.shapes("train")
    model = md.RetinaNet(md.presets.small(data.classes), seed=0)
    optimizer = SHAPES.optimizer(model)
    images = md.data.loader.Loader(data, model.config.preprocess, batch_size=BATCH, seed=0, images=STEPS * BATCH)
    clocks.append((perf_counter(), process_time()))
    with ExitStack() as first_step:
        if helped:
            first_step.enter_context(compiling_ahead(model.config))
        for batch in images:
            batch_gradient(model, batch, 1, 0.0)
            optimizer.step(1e-3)
            optimizer.clear_gradients()
            first_step.close()
            clocks.append((perf_counter(), process_time()))
    connection.send((clocks, compilations))


def run(folder: str, helped: bool) -> tuple[list, list]:
    """`measure` in a process of its own."""
    os.environ["NUMBA_CACHE_DIR"] = folder
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=measure, args=(there, helped))
    process.start()
    result = here.recv()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=12, metavar="N", help="functions to list (default: 12)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
        for title, *how in (
            ("nothing compiled yet", folder, True),
            ("all compiled before", folder, False),
            ("nothing compiled yet, nobody helps", other, False),
        ):
            clocks, compilations = run(*how)
            print(f"{title:36} {'s':>6}  {'s of CPU':>8}")
            names = ["importing", "making data and model", *(f"step {i + 1}" for i in range(STEPS))]
            for name, before, after in zip(names, clocks, clocks[1:], strict=False):
                print(f"  {name:34} {after[0] - before[0]:6.2f}  {after[1] - before[1]:8.2f}")
            seconds = sum(took for took, _ in compilations)
            print(f"  {'compiling, all in all':34} {seconds:6.2f}            {len(compilations)} functions")
            for took, name in sorted(compilations, reverse=True)[: args.most]:
                print(f"    {took:6.2f}  {name}")


if __name__ == "__main__":
    main()
