"""What a training says while it runs: a progress bar for the eye, a table for every other use."""

from __future__ import annotations

import csv
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm


@dataclass(frozen=True)
class StepRecord:
    """One row of metrics.csv."""

    step: int
    position: int
    """Images seen so far, this step's included."""
    lr: float
    loss: float
    classification: float
    box: float
    positives: int
    """Anchors responsible for an object, in the whole batch."""
    gradient_norm: float
    """Before clipping."""
    dropped: int
    """Boxes that resizing made narrower than a pixel."""
    data_ms: float
    """Waiting for the batch."""
    match_ms: float
    forward_ms: float
    backward_ms: float
    update_ms: float
    AP: float | None = None
    AP50: float | None = None


class Monitor:
    """Shows every step's record and keeps it: in `history`, and in `folder`/metrics.csv if there is a folder.

    A resumed training continues the table; rows after the position it resumes from are dropped, since those
    steps are done again.
    """

    def __init__(self, folder: Path | None, images: int, position: int, *, quiet: bool):
        self.rows: list[StepRecord] = []
        self.quiet = quiet
        self._file = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "metrics.csv"
            self.rows = [row for row in read_metrics(path) if row.position <= position]
            self._file = open(path, "w", newline="")
            self._table = csv.DictWriter(self._file, StepRecord.__dataclass_fields__)
            self._table.writeheader()
            self._table.writerows(asdict(row) for row in self.rows)
        # A log file wants a line now and then, not a thousand.
        interval = 0.2 if sys.stderr.isatty() else 10
        self._bar = tqdm(
            total=images, initial=position, unit="image", disable=quiet, mininterval=interval, dynamic_ncols=True
        )

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()

    def record(self, row: StepRecord) -> None:
        """Take in one step."""
        self.rows.append(row)
        if self._file is not None:
            self._table.writerow(asdict(row))
            self._file.flush()
        self._bar.set_postfix_str(
            f"loss {row.loss:.3f} = class {row.classification:.3f} + box {row.box:.3f}, N_pos {row.positives}, "
            f"lr {row.lr:.2g}, ms: data {row.data_ms:.0f} match {row.match_ms:.0f} forward {row.forward_ms:.0f} "
            f"backward {row.backward_ms:.0f} update {row.update_ms:.0f}",
            refresh=False,
        )
        self._bar.update(row.position - self._bar.n)

    def say(self, text: str) -> None:
        """One line of text that does not tear the progress bar."""
        if not self.quiet:
            tqdm.write(text)

    @property
    def history(self) -> dict[str, list]:
        """Every column as a list; AP only where it was measured is a number, else None."""
        return {name: [getattr(row, name) for row in self.rows] for name in StepRecord.__dataclass_fields__}


def read_metrics(path: Path) -> list[StepRecord]:
    """The rows of a metrics.csv, up to one that a crash cut short; none if there is no such file."""
    if not path.is_file():
        return []
    kinds = {name: int if f.type == "int" else float for name, f in StepRecord.__dataclass_fields__.items()}
    rows = []
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            if row.keys() != kinds.keys() or None in row.values():
                break
            rows.append(StepRecord(**{name: kinds[name](text) if text else None for name, text in row.items()}))
    return rows
