"""Every layer of the r50, forward and with everything backward: ours, torch's, and convolutions by im2col.

A convolution's rectifier, and a residual block's sum, belong to it: here as in the network they are its epilogue, for
torch operations of their own.  What is no convolution follows: pooling, losses, the optimizer.

What the machine can do changes by the minute, and one side may suffer more than the other.  So a layer's windows are
spread over the whole time, one in every round of all layers, and the network itself is measured in between: the mean of
the layers is compared with a ratio from the same minutes.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from tests.benchmarks.networks import LAYOUTS, sides_of
from tests.benchmarks.problem import LAYERS, NETWORKS, PARTS, Network
from tests.benchmarks.report import difference, heading, row_of
from tests.benchmarks.turns import Worker, milliseconds

WORSE = 1.15
"""Layers above this ratio are listed."""

OFTEN = 8
"""Layers between two windows of the whole network."""


def measure_layers(images: int, rounds: int, folder: Path) -> list[dict]:
    """A table of all layers for each direction; the rows of both."""
    ours = Worker("ours", "ours")
    ours.ask("build", what="peak")
    peak = ours.ask("measure")["gflops"]
    ours.close()
    print(heading(f"Layers of the r50, N={images}"))
    print(f"peak {peak:.0f} GFLOP/s; GFLOP/s count the definition's operations, so Winograd may exceed it")
    print("n: how often the network has it; !: no window without disturbance")
    return [row for step in (False, True) for row in _one_direction(images, rounds, step, peak, folder)]


def _one_direction(images: int, rounds: int, step: bool, peak: float, folder: Path) -> list[dict]:
    """One table."""
    network = Network("", "r50", 512, images, 8, step)
    whole = _whole_network(network, folder)
    everyone = [Worker("ours", "ours"), *(Worker("torch_side", f"torch {layout}") for layout in LAYOUTS)]
    im2col = Worker("im2col", "im2col")
    direction = "forward and backward" if step else "forward"
    entries = [_Entry(layer, index, network, everyone, im2col, folder) for index, layer in enumerate(LAYERS)]
    parts = [part for part in PARTS if step or not part.step]
    entries += [_Entry(part, index, network, everyone, None, folder) for index, part in enumerate(parts)]
    for _ in tqdm(range(rounds), desc=direction, leave=False, disable=None):
        for index, entry in enumerate(entries):
            for worker in entry.sides:
                worker.window()
            for worker in whole if index % OFTEN == 0 else ():
                worker.window()
    print(f"\n{direction:34} n{'ours ms':>10}{'torch':>8}{'ratio':>7}{'im2col':>8}{'GFLOP/s':>9}{'/peak':>7}    error")
    for entry in entries:
        print(entry.line(peak))
    _summary(entries, whole)
    for worker in (*everyone, im2col, *whole):
        worker.close()
    return [entry.row(f"n{images} {direction}") for entry in entries]


class _Entry:
    """A line of the table: what it is, and the workers that measure it."""

    def __init__(self, layer, index: int, network: Network, everyone, im2col, folder: Path) -> None:
        self.layer, self.convolves = layer, im2col is not None
        self.count, self.slow = layer.count if self.convolves else 1, ""
        self.sides = [worker.another(layer.name) for worker in everyone]
        layouts = [{}, *({"layout": layout} for layout in LAYOUTS)]
        if self.convolves:
            how = {"what": "layer", "index": index, "images": network.images, "backward": network.step}
            self.work = layer.flops * network.images * ((3 if layer.channels > 3 else 2) if network.step else 1)
            slow = im2col.another(layer.name)
            slow.ask("build", **how)
            slow.warm_up()
            slow.window()  # once: it is there to compare with, and takes the longest
            self.slow = f"{milliseconds(slow):.1f}"
        else:
            how = {"what": "part", "index": index, "network": asdict(network), "weights": str(folder / "weights.npz")}
        for n, (worker, layout) in enumerate(zip(self.sides, layouts, strict=True)):
            worker.ask("build", **how, **layout)
            worker.ask("results", file=str(folder / f"{n}.npz"))
            worker.warm_up()
        self.error = max(difference(folder / "0.npz", folder / f"{n}.npz", step=False) for n in (1, 2))

    @property
    def times(self) -> tuple[float, float]:
        """Milliseconds of ours, and of torch in the faster of its layouts."""
        mine, *theirs = map(milliseconds, self.sides)
        return mine, min(theirs)

    def line(self, peak: float) -> str:
        """For the table."""
        ours, torch = self.times
        disturbed = "" if all(worker.clean for worker in self.sides) else "!"
        speed = 1e-6 * self.work / ours if self.convolves else 0
        speeds = f"{speed:9.0f}{speed / peak:7.2f}" if self.convolves else " " * 16
        return (
            f"{self.layer.name:34}{self.count:2}{ours:10.2f}{torch:8.2f}{ours / torch:7.2f}{self.slow:>8}{speeds}"
            f"{self.error:9.0e}{disturbed}"
        )

    def row(self, where: str) -> dict:
        """For the JSON."""
        return row_of(f"{self.layer.name} {where}", *self.times, self.error)


def _whole_network(network: Network, folder: Path) -> list[Worker]:
    """Our worker and the faster of torch's, ready to run the whole network; none where no network has that batch."""
    for known in NETWORKS:
        if (known.preset, known.images, known.step) == (network.preset, network.images, network.step):
            ours, torch = sides_of(known, folder)
            for worker in (ours, *torch.values()):
                worker.warm_up()
                worker.window()
            best, worst = sorted(torch.values(), key=milliseconds)
            worst.close()
            return [ours, best]
    return []


def _summary(entries: list[_Entry], whole: list[Worker]) -> None:
    """The means over the network, the network itself meanwhile, and the layers that are slow."""
    convolutions = [entry for entry in entries if entry.convolves]
    for words, some in (("all convolutions", convolutions), ("all layers", entries)):
        ours, torch = (sum(entry.count * entry.times[side] for entry in some) for side in (0, 1))
        print(f"{words} of the network: {ours:.0f} ms, torch {torch:.0f} ms, {ours / torch:.3f}")
    if whole:
        mine, theirs = map(milliseconds, whole)
        print(f"the network, meanwhile: {mine:.0f} ms, {whole[1].name} {theirs:.0f} ms, {mine / theirs:.3f}")
    for entry in entries:
        mine, theirs = entry.times
        if mine > WORSE * theirs:
            print(f"    above {WORSE}: {entry.layer.name}, {mine / theirs:.2f}, {entry.count * mine / ours:.1%} of all")
