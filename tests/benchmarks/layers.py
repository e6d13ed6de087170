"""Every layer of the r50 where it stands, inside of the network: ours and torch's.

Either side notes every operation while the whole network runs, forward or a training step, and by_layer says which
convolution each belongs to: a rectifier or a residual block's sum is a convolution's epilogue here, and operations of
their own in torch.  So a layer finds in the caches, and in memory, what the network leaves there; and the layers' times
add up to the network's.  Before or after every such call comes one that nobody watches, to see what watching costs.

By itself, once, runs what is compared or there to compare with: each convolution for the difference of its results, and
by im2col.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import median

from tqdm import tqdm

from tests.benchmarks.networks import sides_of
from tests.benchmarks.problem import LAYERS, Network
from tests.benchmarks.report import difference, heading, row_of
from tests.benchmarks.turns import FOREIGN, PATIENCE, Worker

WORSE = 1.15
"""Layers above this ratio are listed."""

POOL, LOSSES, OPTIMIZER, REST = OTHERS = "max pool", "matching, losses", "optimizer", "begin and end of a call"


def by_layer(events: list[tuple[str, str, float, float]], whole: float) -> dict[str, float]:
    """Milliseconds of each layer in a call that took `whole` milliseconds.

    An event is an operation: its name, of a convolution the layer, else "", begin and end in seconds.  It lasts from
    the end of the one before, for what leads to it is part of it.

    What is no convolution belongs forward to the convolution before it and backward to the one after it, except for
    pooling.  Between the last convolution forward and the first one backward are the losses, then comes the optimizer.
    Where objects are matched before the network runs, that is part of the losses too.
    """
    ahead = [i for i, (name, layer, *_) in enumerate(events) if layer and not _is_backward(name)]
    back = [i for i, (name, layer, *_) in enumerate(events) if layer and _is_backward(name)]
    ms, waiting, before, last = defaultdict(float), 0.0, events[ahead[0]][1], events[0][2]
    for i, (name, layer, begin, end) in enumerate(events):
        if i == ahead[0] and back:
            ms[LOSSES] += 1e3 * (begin - last)
            last = begin
        taken, last = 1e3 * (end - last), end
        if layer:
            ms[layer] += waiting + taken
            waiting, before = 0.0, layer
        elif "pool" in name:
            ms[POOL] += taken
        elif not back or ahead[0] < i < ahead[-1]:
            ms[before] += taken
        elif i < back[0]:
            ms[LOSSES] += taken
        elif i < back[-1]:
            waiting += taken
        else:
            ms[OPTIMIZER] += taken
    ms[REST] = whole - sum(ms.values())
    return ms


def _is_backward(name: str) -> bool:
    return "gradient" in name or "backward" in name


def inside(events: list[tuple[str, str, float, float]]) -> float:
    """Milliseconds inside of operations."""
    return 1e3 * sum(end - begin for _, _, begin, end in events)


def measure_layers(images: int, rounds: int, folder: Path) -> list[dict]:
    """A table of all layers for each direction; the rows of both."""
    ours = Worker("ours", "ours")
    ours.ask("build", what="peak")
    peak = ours.ask("measure")["gflops"]
    ours.close()
    print(heading(f"Layers of the r50, N={images}; milliseconds of all n that the network has"))
    print(f"peak {peak:.0f} GFLOP/s; GFLOP/s count the definition's operations, so Winograd may exceed it")
    return [row for step in (False, True) for row in _one_direction(images, rounds, step, peak, folder)]


def _one_direction(images: int, rounds: int, step: bool, peak: float, folder: Path) -> list[dict]:
    """One table."""
    direction = "forward and backward" if step else "forward"
    watched, costs, layout = _in_the_network(Network("", "r50", 512, images, 8, step), rounds, folder)
    ours, torch = ({name: median(ms[name] for _, _, ms in calls) for name in calls[0][2]} for calls in watched)
    if any(set(column) - set(OTHERS) != {layer.name for layer in LAYERS} for column in (ours, torch)):
        raise RuntimeError("a network has other layers than problem.LAYERS")
    errors, slow = _alone(images, step, layout, folder)
    print(f"\n{direction:24} n{'ours ms':>9}{'torch':>8}{'ratio':>7}{'im2col':>9}{'GFLOP/s':>9}{'/peak':>7}    error")
    rows = []
    for layer in LAYERS:
        name, mine = layer.name, ours[layer.name]
        rows.append(row_of(f"{name} n{images} {direction}", mine, torch[name], errors[name]))
        speed = 1e-6 * layer.flops * images * layer.count * ((3 if layer.channels > 3 else 2) if step else 1) / mine
        print(
            f"{name:24} {layer.count}{mine:9.2f}{torch[name]:8.2f}{mine / torch[name]:7.2f}"
            f"{layer.count * slow[name]:9.1f}{speed:9.0f}{speed / peak:7.2f}{errors[name]:9.0e}"
        )
    for name in (other for other in OTHERS if other in ours):
        rows.append(row_of(f"{name} n{images} {direction}", ours[name], torch[name], None))
        print(f"{name:26}{ours[name]:9.2f}{torch[name]:8.2f}{ours[name] / torch[name]:7.2f}")
    _summary(ours, torch, watched, costs, layout)
    return rows


def _in_the_network(network: Network, rounds: int, folder: Path) -> tuple[list[list[tuple]], list[float], str]:
    """Of ours, and of torch's in its better layout, the calls that were watched, each as (part of the machine that
    others had, milliseconds inside of operations, milliseconds of each layer); how many times as long as others they
    take; and that layout."""
    ours, torch = sides_of(network, folder)
    everyone = [ours, *torch.values()]
    watched: dict[Worker, list[tuple]] = {worker: [] for worker in everyone}
    for worker in everyone:
        worker.warm_up()
        worker.calls = 1
    for n in tqdm(range(PATIENCE * rounds), desc=f"N={network.images}", leave=False, disable=None):
        if min(len(_clean(windows)) for windows in watched.values()) >= rounds:
            break
        for worker in everyone:
            for watch in (n % 2 == 0, n % 2 == 1):
                if watch:
                    worker.ask("watch")
                worker.window()
                if watch:
                    (foreign, ms), events = worker.windows.pop(), worker.ask("events")["events"]
                    watched[worker].append((foreign, inside(events), by_layer(events, ms)))
    clean = {worker: _clean(windows) for worker, windows in watched.items()}
    taken, never = sum(map(len, watched.values())), [worker.name for worker in everyone if not clean[worker]]
    lost = taken - sum(map(len, clean.values()))
    print(f"\n{lost} of {taken} windows disturbed" + (f", NONE CLEAN for {', '.join(never)}" if never else ""))
    clean = {worker: windows or watched[worker] for worker, windows in clean.items()}
    layout = min(torch, key=lambda layout: median(sum(ms.values()) for *_, ms in clean[torch[layout]]))
    both, costs = (ours, torch[layout]), []
    for side in both:
        pairs = zip(watched[side], side.windows, strict=True)
        costs.append(median(sum(ms.values()) / other for (*_, ms), (_, other) in pairs))
    for worker in everyone:
        worker.close()
    return [clean[side] for side in both], costs, layout


def _clean(windows: list[tuple]) -> list[tuple]:
    """Those in which nobody else had much of the machine."""
    return [window for window in windows if window[0] <= FOREIGN]


def _alone(images: int, step: bool, layout: str, folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Of each convolution by itself: how far ours is from torch's, and the milliseconds of im2col."""
    ours, torch, slow = (Worker(module, module) for module in ("ours", "torch_side", "im2col"))
    errors, ms, files = {}, {}, (folder / "0.npz", folder / "1.npz")
    for index, layer in enumerate(tqdm(LAYERS, desc="layers alone", leave=False, disable=None)):
        for worker, how in ((ours, {}), (torch, {"layout": layout}), (slow, {})):
            worker.ask("build", what="layer", index=index, images=images, backward=step, **how)
        for worker, file in zip((ours, torch), files, strict=True):
            worker.ask("results", file=str(file))
        errors[layer.name] = difference(*files, step=False)
        slow.ask("run", calls=1)
        ms[layer.name] = 1e3 * slow.ask("run", calls=1)["seconds"]
    for worker in (ours, torch, slow):
        worker.close()
    return errors, ms


def _summary(ours: dict, torch: dict, watched: list[list[tuple]], costs: list[float], layout: str) -> None:
    """The mean over all convolutions, and over all layers, which is the network; and the layers that are slow.

    Each is the median over calls of what the call spent on them, not a sum of medians: that would lose what disturbed
    one layer or another in every call.
    """
    for words, left_out in (("convolutions", OTHERS), ("layers, which are the network", ())):
        mine, theirs = (
            median(sum(t for name, t in ms.items() if name not in left_out) for _, _, ms in calls) for calls in watched
        )
        print(f"all {words}: {mine:.0f} ms, torch ({layout}) {theirs:.0f} ms, {mine / theirs:.3f}")
    whole = mine
    shares = [1 - median(inside / sum(ms.values()) for _, inside, ms in calls) for calls in watched]
    print(f"of that, not inside of any operation: {shares[0]:.1%}, torch {shares[1]:.1%}")
    print(f"a call takes {costs[0]:.2f} times as long as one that nobody watches, torch's {costs[1]:.2f}")
    for name, taken in ours.items():
        if name != REST and taken > WORSE * torch[name]:
            print(f"    above {WORSE}: {name}, {taken / torch[name]:.2f}, {taken / whole:.1%} of all layers")
