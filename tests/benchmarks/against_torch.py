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
from pathlib import Path

from tests.benchmarks.layers import measure_layers
from tests.benchmarks.networks import measure_network
from tests.benchmarks.problem import NETWORKS
from tests.benchmarks.report import heading


def main() -> None:
    """Measure, print tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("r50", "small", "all", "none"), default="all")
    parser.add_argument("--layers", action="store_true", help="also every layer of the r50, inside of it")
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
            rows.append(measure_network(network, rounds, Path(folder), compiled=n == 0 and not options.quick))
        if options.layers:
            rows += measure_layers(options.images, rounds, Path(folder))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
