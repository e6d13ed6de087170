"""minidet beside PyTorch on this CPU: whole networks, and every convolution of a ResNet-50 RetinaNet.

    python -m tests.benchmarks.against_torch                        # both networks
    python -m tests.benchmarks.against_torch --network small --quick
    python -m tests.benchmarks.against_torch --network none --layers

torch runs eagerly in float32, in the faster of its two memory layouts, with the r50's frozen batch norm folded
and its fused optimizer.  Each side is a process of its own; they take turns, idle in between.  A window in which
other processes had more than 5 % of the machine is thrown away and measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from tests.benchmarks.layers import measure_layers
from tests.benchmarks.problem import NETWORKS, Network
from tests.benchmarks.report import difference, heading, row_of
from tests.benchmarks.turns import Worker, disturbance, milliseconds, take_turns

LAYOUTS = ("NCHW", "channels_last")


def main() -> None:
    """Measure, print tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("r50", "small", "all", "none"), default="all")
    parser.add_argument("--layers", action="store_true", help="also every layer of the r50, beside im2col")
    parser.add_argument("--images", type=int, default=1, metavar="N", help="batch of --layers (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--quick", action="store_true", help="few windows: to see that it works")
    options = parser.parse_args()
    rounds = 2 if options.quick else 9
    rows = []
    chosen = [n for n in NETWORKS if options.network in (n.preset, "all")]
    with tempfile.TemporaryDirectory() as folder:
        if chosen:
            print(heading("Networks"))
            print(
                f"{'':16}{'ours ms':>9}{'torch ms':>10}{'ratio':>7}{'max error':>11}{'ours MiB':>10}{'torch MiB':>10}"
            )
        for n, network in enumerate(chosen):
            rows.append(measure(network, rounds, Path(folder), compiled=n == 0 and not options.quick))
        if options.layers:
            rows += measure_layers(options.images, 2 if options.quick else 5, Path(folder))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def measure(network: Network, rounds: int, folder: Path, *, compiled: bool) -> dict:
    """One network: a row of the table, printed as well."""
    weights = str(folder / "weights.npz")
    ours = our_worker(network, weights, str(folder / "0.npz"))
    torch = {layout: Worker("torch_side", f"torch {layout}") for layout in LAYOUTS}
    for layout, worker in torch.items():
        worker.ask("build", what="network", network=asdict(network), weights=weights, layout=layout)
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
    print_profile(ours.ask("profile", calls=max(3, ours.calls)))
    if compiled:
        answer = best.ask("compiled", calls=10)
        said = answer.get("error") or f"{answer['ms']:.1f} ms, after compiling for {answer['compiling_s']:.0f} s"
        print(f"    torch.compile, forward: {said}")
    for worker in everyone:
        worker.close()
    return row


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


def print_profile(profile: dict) -> None:
    """Where our time goes, and what is left beside the kernels."""
    kernels = sorted(profile["kernels"].items(), key=lambda entry: -entry[1])
    share = 1 - sum(ms for _, ms in kernels) / profile["ms"]
    largest = ", ".join(f"{name} {ms:.1f}" for name, ms in kernels[:8])
    print(f"    engine's own overhead {share:.1%} of {profile['ms']:.1f} ms; kernels, in ms: {largest}")


if __name__ == "__main__":
    main()
