"""How the cost of a training step grows with the size of the images and of the batch.

    python -m tests.benchmarks.growth [--picture chapters/pictures/growth.png] [--json FILE] [--quick]

RetinaNet on ResNet-50, 80 classes: time per image and peak memory of the process, beyond what it had after
importing, at 256, 512 and 800 px with 1, 2 and 4 images a step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

from minidet.plots import COLOURS
from minidet.plots.curves import finish, save
from tests.benchmarks.networks import our_worker
from tests.benchmarks.problem import Network
from tests.benchmarks.report import heading
from tests.benchmarks.turns import disturbance, milliseconds, take_turns

SIZES, BATCHES = (256, 512, 800), (1, 2, 4)


def main() -> None:
    """Measure, print a table, draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the numbers there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--quick", action="store_true", help="few windows of small images: to see that it works")
    options = parser.parse_args()
    sizes, rounds = (SIZES[:1], 1) if options.quick else (SIZES, 3)
    print(heading("A training step of the r50"))
    with tempfile.TemporaryDirectory() as folder:
        rows = measure([(size, N) for size in sizes for N in BATCHES], rounds, Path(folder))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.picture:
        draw(rows, options.picture)


def measure(cases: list[tuple[int, int]], rounds: int, folder: Path) -> list[dict]:
    """Every size and batch, in turns: a machine that is slow for a while is slow for all."""
    workers = []
    for size, N in cases:
        network = Network(f"{N} x {size} px", "r50", size, N, 8, step=True)
        workers.append(worker := our_worker(network, str(folder / "weights.npz"), str(folder / "results.npz")))
        worker.name = network.name
        worker.warm_up()
        worker.ask("forget_peak")
    take_turns(workers, rounds, "growth")
    rows = []
    for (size, N), worker in zip(cases, workers, strict=True):
        rows.append({
            "name": worker.name,
            "size": size,
            "images": N,
            "ms_per_image": milliseconds(worker) / N,
            "peak_mib": worker.ask("peak")["mib"],
        })
        print("{name}: {ms_per_image:.0f} ms an image, {peak_mib:.0f} MiB".format(**rows[-1]))
        worker.close()
    print(disturbance(workers))
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """Time and memory against pixels, a line for each batch size."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, field, y in zip(
        figure.subplots(1, 2), ("ms_per_image", "peak_mib"), ("ms an image", "MiB"), strict=True
    ):
        for k, N in enumerate(BATCHES):
            line = [row for row in rows if row["images"] == N]
            pixels = [row["size"] ** 2 / 1e6 for row in line]
            style = {"color": COLOURS[k], "marker": "o", "label": f"{N} image{'s' * (N > 1)} a step"}
            axes.plot(pixels, [row[field] for row in line], **style)
        axes.set_xticks([size**2 / 1e6 for size in SIZES], [f"{size}²" for size in SIZES])
        axes.set_ylim(0)
        title = "Time" if field == "ms_per_image" else "Peak memory"
        finish(axes, x="pixels of an image", y=y, title=title)
    save(figure, path)


if __name__ == "__main__":
    main()
