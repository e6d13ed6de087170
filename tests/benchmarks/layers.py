"""Every convolution of the r50 with what follows it there, forward and with everything backward: ours, torch, im2col.

A convolution's rectifier, and a residual block's sum, belong to it: here as in the network they are its epilogue, for
torch operations of their own.
"""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.problem import LAYERS
from tests.benchmarks.report import difference, heading, row_of
from tests.benchmarks.turns import Worker, milliseconds, take_turns

WORSE = 1.15
"""Layers above this ratio are listed."""

DIRECTIONS = ("forward", "step")


def measure_layers(images: int, rounds: int, folder: Path) -> list[dict]:
    """A table of all layers; its rows."""
    ours, other = Worker("ours", "ours"), Worker("im2col", "im2col")
    torch = [Worker("torch_side", f"torch {layout}") for layout in ("NCHW", "channels_last")]
    layouts = [{}, {"layout": "NCHW"}, {"layout": "channels_last"}, {}]
    everyone = [ours, *torch, other]
    ours.ask("build", what="peak")
    peak = ours.ask("measure")["gflops"]
    print(heading(f"Convolutions of the r50, N={images}"))
    print(f"peak {peak:.0f} GFLOP/s; GFLOP/s count the definition's operations, so Winograd may exceed it")
    title = f"{'ours ms':>9}{'torch':>8}{'ratio':>7}{'im2col':>8}{'GFLOP/s':>9}{'/peak':>7}{'error':>9}"
    print("n: how often the network has it; !: no window without disturbance")
    print(f"{'':34} n |{'forward':^58}|{'forward and backward':^58}")
    print(f"{'':34}   |{title} |{title}")
    rows, times = [], []
    for index, layer in enumerate(LAYERS):
        cells, line = [], []
        for direction in DIRECTIONS:
            for n, worker in enumerate(everyone):
                backward = direction == "step"
                worker.ask("build", what="layer", index=index, images=images, backward=backward, **layouts[n])
                if worker is not other:
                    worker.ask("results", file=str(folder / f"{n}.npz"))
                worker.warm_up()
            error = max(difference(folder / "0.npz", folder / f"{n}.npz", step=False) for n in (1, 2))
            take_turns(everyone, rounds, f"{layer.name} {direction}")
            mine, theirs, slow = milliseconds(ours), min(map(milliseconds, torch)), milliseconds(other)
            work = layer.flops * images * (1 if direction == "forward" else 3 if layer.channels > 3 else 2)
            speed = 1e-6 * work / mine
            line.append(
                f"{mine:9.2f}{theirs:8.2f}{mine / theirs:7.2f}{slow:8.1f}{speed:9.0f}{speed / peak:7.2f}{error:9.0e}"
            )
            cells.append((mine, theirs))
            rows.append(row_of(f"{layer.name} n{images} {direction}", mine, theirs, error))
            line[-1] += " " if all(worker.clean for worker in everyone) else "!"
        print(f"{layer.name:34}{layer.count:2} |{'|'.join(line)}", flush=True)
        times.append(cells)
    _summary(times)
    for worker in everyone:
        worker.close()
    return rows


def _summary(times: list[list[tuple[float, float]]]) -> None:
    """The mean over the network, and the layers that are slow."""
    counts = [layer.count for layer in LAYERS]
    for d, direction in enumerate(("forward", "forward and backward")):
        mine, theirs = (sum(n * t[d][side] for n, t in zip(counts, times, strict=True)) for side in (0, 1))
        ratio = mine / theirs
        print(f"all layers of the network, {direction}: {mine:.0f} ms, torch {theirs:.0f} ms, {ratio:.2f}")
        for layer, t in zip(LAYERS, times, strict=True):
            if t[d][0] > WORSE * t[d][1]:
                share = layer.count * t[d][0] / mine
                print(f"    above {WORSE}: {layer.name}, {t[d][0] / t[d][1]:.2f}, {share:.1%} of all")
