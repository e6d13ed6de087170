"""What a training says while it runs: a progress bar for the eye, a table for every other use."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minidet import backend


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

    def __init__(self, folder: Path | None, images: int, position: int, *, quiet: bool, xp=np):
        self.rows: list[StepRecord] = []
        self.quiet, self.xp = quiet, xp
        self._path = None if folder is None else folder / "metrics.csv"
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self.rows = [row for row in read_metrics(self._path) if row.position <= position]
            self._write_all()
        # A log file wants a line now and then, not a thousand.
        interval = 0.2 if sys.stderr.isatty() else 10
        self._bar = tqdm(
            total=images, initial=position, unit="image", disable=quiet, mininterval=interval, dynamic_ncols=True
        )

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def record(self, row: StepRecord) -> None:
        """Take in one step."""
        self.rows.append(row)
        if self._path is not None:
            with _named(self._path), open(self._path, "a", newline="") as file:
                csv.DictWriter(file, StepRecord.__dataclass_fields__).writerow(asdict(row))
        self._bar.set_postfix_str(
            f"loss {row.loss:.3f} = class {row.classification:.3f} + box {row.box:.3f}, N_pos {row.positives}, "
            f"lr {row.lr:.2g}, ms: data {row.data_ms:.0f} match {row.match_ms:.0f} forward {row.forward_ms:.0f} "
            f"backward {row.backward_ms:.0f} update {row.update_ms:.0f}{self._memory()}",
            refresh=False,
        )
        self._bar.update(row.position - self._bar.n)

    def _memory(self) -> str:
        """Of a GPU, after this step: what arrays take, and what the pool holds for them."""
        taken = None if self.quiet else backend.pool_bytes(self.xp)
        return "" if taken is None else ", GiB: used {:.2f} pool {:.2f}".format(*(n / 2**30 for n in taken))

    def validated(self, AP: float, AP50: float) -> None:
        """Add to the last step what validation said of the model after it."""
        if self.rows:
            self.rows[-1] = replace(self.rows[-1], AP=AP, AP50=AP50)
        if self._path is not None:
            self._write_all()

    def _write_all(self) -> None:
        """Put the whole table in the place of the old one, which stands there until then."""
        temporary = self._path.with_name(f".{self._path.name}.part")
        try:
            with _named(self._path), open(temporary, "w", newline="") as file:
                table = csv.DictWriter(file, StepRecord.__dataclass_fields__)
                table.writeheader()
                table.writerows(asdict(row) for row in self.rows)
            os.replace(temporary, self._path)
        finally:
            temporary.unlink(missing_ok=True)

    def say(self, text: str) -> None:
        """One line of text that does not tear the progress bar."""
        if not self.quiet:
            tqdm.write(text)

    @property
    def history(self) -> dict[str, list]:
        """Every column as a list; AP only where it was measured is a number, else None."""
        return {name: [getattr(row, name) for row in self.rows] for name in StepRecord.__dataclass_fields__}


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """A full disk says which file did not fit."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path}: cannot be written: {error}") from error


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
