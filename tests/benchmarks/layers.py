"""Every convolution of the r50 with what follows it there, forward and with everything backward: ours, torch, im2col.

A convolution's rectifier, and a residual block's sum, belong to it: here as in the network they are its epilogue, for
torch operations of their own.

What the machine can do changes by the minute, and one side may suffer more than the other.  So the whole network runs
as well, for a window after every layer: the mean of the layers is compared with a ratio from the same minutes.
"""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.networks import LAYOUTS, sides_of
from tests.benchmarks.problem import LAYERS, NETWORKS
from tests.benchmarks.report import difference, heading, row_of
from tests.benchmarks.turns import Worker, milliseconds, take_turns

WORSE = 1.15
"""Layers above this ratio are listed."""

DIRECTIONS = {"forward": "forward", "step": "forward and backward"}


def measure_layers(images: int, rounds: int, folder: Path) -> list[dict]:
    """A table of all layers for each direction; the rows of both."""
    ours, other = Worker("ours", "ours"), Worker("im2col", "im2col")
    torch = [Worker("torch_side", f"torch {layout}") for layout in LAYOUTS]
    everyone = [ours, *torch, other]
    ours.ask("build", what="peak")
    peak = ours.ask("measure")["gflops"]
    print(heading(f"Convolutions of the r50, N={images}"))
    print(f"peak {peak:.0f} GFLOP/s; GFLOP/s count the definition's operations, so Winograd may exceed it")
    print("n: how often the network has it; !: no window without disturbance")
    rows = []
    for direction, title in DIRECTIONS.items():
        print(f"\n{title:34} n{'ours ms':>10}{'torch':>8}{'ratio':>7}{'im2col':>8}{'GFLOP/s':>9}{'/peak':>7}    error")
        whole = _whole_network(images, direction, folder)
        times = []
        for index, layer in enumerate(LAYERS):
            _build(index, images, direction, everyone, folder)
            error = max(difference(folder / "0.npz", folder / f"{n}.npz", step=False) for n in (1, 2))
            take_turns(everyone, rounds, f"{layer.name} {direction}")
            for worker in whole:
                worker.window()
            mine, *theirs, slow = map(milliseconds, everyone)
            theirs = min(theirs)
            times.append((mine, theirs))
            rows.append(row_of(f"{layer.name} n{images} {direction}", mine, theirs, error))
            work = layer.flops * images * (1 if direction == "forward" else 3 if layer.channels > 3 else 2)
            speed = 1e-6 * work / mine
            disturbed = "" if all(worker.clean for worker in everyone) else "!"
            print(
                f"{layer.name:34}{layer.count:2}{mine:10.2f}{theirs:8.2f}{mine / theirs:7.2f}{slow:8.1f}"
                f"{speed:9.0f}{speed / peak:7.2f}{error:9.0e}{disturbed}",
                flush=True,
            )
        _summary(times, whole)
        for worker in whole:
            worker.close()
    for worker in everyone:
        worker.close()
    return rows


def _whole_network(images: int, direction: str, folder: Path) -> list[Worker]:
    """Our worker and the faster of torch's, ready to run the whole network; none where no network has that batch."""
    for network in NETWORKS:
        if (network.preset, network.images, network.step) == ("r50", images, direction == "step"):
            ours, torch = sides_of(network, folder)
            everyone = [ours, *torch.values()]
            for worker in everyone:
                worker.warm_up()
                worker.window()
            best, worst = sorted(torch.values(), key=milliseconds)
            worst.close()
            return [ours, best]
    return []


def _build(index: int, images: int, direction: str, everyone: list[Worker], folder: Path) -> None:
    """Every side's layer, warmed up; their results, im2col's excepted, in numbered files."""
    layouts = [{}, *({"layout": layout} for layout in LAYOUTS), {}]
    for worker, layout in zip(everyone, layouts, strict=True):
        worker.ask("build", what="layer", index=index, images=images, backward=direction == "step", **layout)
    for n, worker in enumerate(everyone[:-1]):
        worker.ask("results", file=str(folder / f"{n}.npz"))
    for worker in everyone:
        worker.warm_up()


def _summary(times: list[tuple[float, float]], whole: list[Worker]) -> None:
    """The mean over the network, the network itself meanwhile, and the layers that are slow."""
    counts = [layer.count for layer in LAYERS]
    mine, theirs = (sum(n * ms for n, ms in zip(counts, side, strict=True)) for side in zip(*times, strict=True))
    print(f"all layers of the network: {mine:.0f} ms, torch {theirs:.0f} ms, {mine / theirs:.3f}")
    if whole:
        ours, torch = map(milliseconds, whole)
        print(f"the network, meanwhile: {ours:.0f} ms, {whole[1].name} {torch:.0f} ms, {ours / torch:.3f}")
    for layer, (ours, torch) in zip(LAYERS, times, strict=True):
        if ours > WORSE * torch:
            print(f"    above {WORSE}: {layer.name}, {ours / torch:.2f}, {layer.count * ours / mine:.1%} of all")
