"""Every layer of the r50, forward and with everything backward: ours, torch's, and convolutions by im2col.

A convolution's rectifier, and a residual block's sum, belong to it: here as in the network they are its epilogue, for
torch operations of their own.  What is no convolution follows: pooling, the joined outputs, losses, the optimizer.

A window is all of them once, in the network's order, each timed by itself: as in the network, a layer finds its inputs
in the caches of the cores that wrote them, where they fit, but not its weights, and gets memory that other layers had.
What the machine can do changes by the minute, so the network itself is measured between the windows, and the mean of
the layers is compared with that.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import median

from tqdm import tqdm

from tests.benchmarks.networks import LAYOUTS, sides_of
from tests.benchmarks.problem import LAYERS, NETWORKS, PARTS, Network
from tests.benchmarks.report import difference, heading, row_of
from tests.benchmarks.turns import FOREIGN, PATIENCE, Worker, milliseconds

WORSE = 1.15
"""Layers above this ratio are listed."""


def measure_layers(images: int, rounds: int, folder: Path) -> list[dict]:
    """A table of all layers for each direction; the rows of both."""
    ours = Worker("ours", "ours")
    ours.ask("build", what="peak")
    peak = ours.ask("measure")["gflops"]
    ours.close()
    print(heading(f"Layers of the r50, N={images}"))
    print(f"peak {peak:.0f} GFLOP/s; GFLOP/s count the definition's operations, so Winograd may exceed it")
    print("n: how often the network has it")
    return [row for step in (False, True) for row in _one_direction(images, rounds, step, peak, folder)]


def _one_direction(images: int, rounds: int, step: bool, peak: float, folder: Path) -> list[dict]:
    """One table."""
    network = Network("", "r50", 512, images, 8, step)
    whole = _whole_network(network, folder)
    parts = [part for part in PARTS if step or not part.step]
    sides = [_Side("ours", "ours", network, weights=str(folder / "weights.npz"))]
    for layout in LAYOUTS:
        how = {"weights": str(folder / "weights.npz"), "layout": layout}
        sides.append(_Side("torch_side", f"torch {layout}", network, **how))
    slow = _Side("im2col", "im2col", network)
    slow.window()  # the third column is there to compare with, and takes the longest
    slow.worker.close()
    direction = "forward and backward" if step else "forward"
    for _ in tqdm(range(PATIENCE * rounds), desc=direction, leave=False, disable=None):
        if min(len(side.clean) for side in sides) >= rounds:
            break
        for measured in (*sides, *whole):
            measured.window()
    columns = [side.medians() for side in sides]
    times = [(mine, min(theirs)) for mine, *theirs in zip(*columns, strict=True)]
    print(f"\n{direction:34} n{'ours ms':>10}{'torch':>8}{'ratio':>7}{'im2col':>8}{'GFLOP/s':>9}{'/peak':>7}    error")
    rows = []
    for index, (layer, (mine, theirs)) in enumerate(zip((*LAYERS, *parts), times, strict=True)):
        for n, side in enumerate(sides):
            side.worker.ask("results_of", index=index, file=str(folder / f"{n}.npz"))
        error = max(difference(folder / "0.npz", folder / f"{n}.npz", step=False) for n in (1, 2))
        rows.append(row_of(f"{layer.name} n{images} {direction}", mine, theirs, error))
        speeds = " " * 24
        if index < len(LAYERS):
            work = layer.flops * images * ((3 if layer.channels > 3 else 2) if step else 1)
            speeds = f"{slow.medians()[index]:8.1f}{1e-6 * work / mine:9.0f}{1e-6 * work / mine / peak:7.2f}"
        print(f"{layer.name:34}{layer.count:2}{mine:10.2f}{theirs:8.2f}{mine / theirs:7.2f}{speeds}{error:9.0e}")
    _summary((*LAYERS, *parts), columns, sides, whole)
    for worker in (*(side.worker for side in sides), *whole):
        worker.close()
    return rows


class _Side:
    """A worker with all layers, and the milliseconds of each in every window."""

    def __init__(self, module: str, name: str, network: Network, **how) -> None:
        self.worker = Worker(module, name)
        self.worker.ask("build", what="layers", network=asdict(network), **how)
        self.worker.ask("run", calls=1)
        self.windows: list[list[float]] = []

    def window(self) -> None:
        """All layers once."""
        self.worker.window()
        self.windows.append(self.worker.ask("last")["ms"])

    @property
    def clean(self) -> list[list[float]]:
        """The windows in which nobody else had much of the machine."""
        pairs = zip(self.worker.windows, self.windows, strict=True)
        return [ms for (foreign, _), ms in pairs if foreign <= FOREIGN]

    def medians(self) -> list[float]:
        """Of each layer, over the windows that count, or over all if none does."""
        return [median(values) for values in zip(*(self.clean or self.windows), strict=True)]


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


def _summary(layers, columns: list[list[float]], sides: list[_Side], whole: list[Worker]) -> None:
    """The means over the network, the network itself meanwhile, and the layers that are slow.

    In the table each layer is in the layout that suits torch best there; a network is in one layout.
    """
    times = [(mine, min(theirs)) for mine, *theirs in zip(*columns, strict=True)]
    counts = [layer.count for layer in layers]
    alike = min(columns[1:], key=lambda column: _total(counts, column))
    for words, torch, stop in (
        ("convolutions of the network", [theirs for _, theirs in times], len(LAYERS)),
        ("layers of the network", [theirs for _, theirs in times], len(layers)),
        ("layers, torch's in one layout", alike, len(layers)),
    ):
        ours, theirs = (_total(counts[:stop], column[:stop]) for column in (columns[0], torch))
        print(f"all {words}: {ours:.0f} ms, torch {theirs:.0f} ms, {ours / theirs:.3f}")
    if whole:
        mine, theirs = map(milliseconds, whole)
        print(f"the network, meanwhile: {mine:.0f} ms, {whole[1].name} {theirs:.0f} ms, {mine / theirs:.3f}")
    for layer, (mine, theirs) in zip(layers, times, strict=True):
        if mine > WORSE * theirs:
            print(f"    above {WORSE}: {layer.name}, {mine / theirs:.2f}, {layer.count * mine / ours:.1%} of all")
    taken = sum(len(side.windows) for side in sides)
    print(f"{taken - sum(len(side.clean) for side in sides)} of {taken} windows disturbed")


def _total(counts: list[int], column: list[float]) -> float:
    return sum(count * ms for count, ms in zip(counts, column, strict=True))
