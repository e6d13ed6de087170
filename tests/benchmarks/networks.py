"""Whole networks, ours and torch's in turns."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

from tests.benchmarks.problem import Network
from tests.benchmarks.report import difference, row_of
from tests.benchmarks.turns import Worker, disturbance, milliseconds, take_turns

LAYOUTS = ("NCHW", "channels_last")


def measure_network(network: Network, rounds: int, folder: Path, *, compiled: bool) -> dict:
    """One network: a row of the table, printed as well."""
    ours, torch = sides_of(network, folder)
    everyone = [ours, *torch.values()]
    for n, layout in enumerate(LAYOUTS, start=1):
        torch[layout].ask("results", file=str(folder / f"{n}.npz"))
    error = max(difference(folder / "0.npz", folder / f"{n}.npz", step=network.step) for n in (1, 2))
    for worker in everyone:
        worker.warm_up()
        worker.ask("forget_peak")
    take_turns(everyone, rounds, network.name)
    peaks = {worker: worker.ask("peak")["mib"] for worker in everyone}
    best = min(torch.values(), key=milliseconds)
    row = row_of(network.name, milliseconds(ours), milliseconds(best), error, peaks[ours], peaks[best])
    layouts = ", ".join(f"{layout} {milliseconds(worker):.1f}" for layout, worker in torch.items())
    print(
        f"{network.name:16}{row['ours_ms']:9.1f}{row['torch_ms']:10.1f}{row['ratio']:7.2f}{error:11.1e}"
        f"{row['ours_peak_mib']:10.0f}{row['torch_peak_mib']:10.0f}   torch {layouts} ms; {disturbance(everyone)}"
    )
    print_profile(ours)
    if compiled:
        answer = best.ask("compiled", calls=10)
        said = answer.get("error") or f"{answer['ms']:.1f} ms, after compiling for {answer['compiling_s']:.0f} s"
        print(f"    torch.compile, forward: {said}")
    for worker in everyone:
        worker.close()
    return row


def sides_of(network: Network, folder: Path) -> tuple[Worker, dict[str, Worker]]:
    """Our worker and torch's, one for each layout, all with the same weights."""
    weights = str(folder / "weights.npz")
    ours = our_worker(network, weights, str(folder / "0.npz"))
    torch = {layout: Worker("torch_side", f"torch {layout}") for layout in LAYOUTS}
    for layout, worker in torch.items():
        worker.ask("build", what="network", network=asdict(network), weights=weights, layout=layout)
    return ours, torch


def our_worker(network: Network, weights: str, results: str) -> Worker:
    """Our worker; if it had to compile, another one, whose memory the compiler did not swell."""
    for attempts in (3, 2, 1):
        worker = Worker("ours", "ours")
        worker.ask("build", what="network", network=asdict(network), weights=weights)
        before = worker.ask("compiled_bytes")["bytes"]
        worker.ask("results", file=results)  # of the weights as built: steps change them
        worker.ask("run", calls=1)
        if worker.ask("compiled_bytes")["bytes"] == before or attempts == 1:
            return worker
        worker.close()


def print_profile(ours: Worker) -> None:
    """Where our time goes, and what is left beside the kernels."""
    calls = max(3, ours.calls)
    ours.ask("watch")
    ms = 1e3 * ours.ask("run", calls=calls)["seconds"]
    kernels = defaultdict(float)
    for name, _, begin, end in ours.ask("events")["events"]:
        kernels[name] += 1e3 * (end - begin) / calls
    share = 1 - sum(kernels.values()) / ms
    largest = ", ".join(f"{name} {taken:.1f}" for name, taken in sorted(kernels.items(), key=lambda k: -k[1])[:8])
    print(f"    engine's own overhead {share:.1%} of {ms:.1f} ms; kernels, in ms: {largest}")
