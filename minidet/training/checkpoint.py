"""A training on disk: one file that is whole or absent, and says what it is.

A checkpoint is a single safetensors file.  The arrays are its tensors ("weights.NAME",
"optimizer.STATE.NAME"); everything else is JSON text in the metadata of its header.  One file rather than a
pair, because a pair can be torn apart: by a crash between the two renames, or by copying only one.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

FORMAT = "minidet checkpoint"
VERSION = 1
LAYOUT = "OHWI"  # of every convolution's weights: outputs, height, width, inputs

LAST, BEST = "last.safetensors", "best.safetensors"
"""File names in a run's folder: where it stands, and where its validation AP was highest."""


class CheckpointError(ValueError):
    """A file that cannot be used as a checkpoint; the message names it and says why."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model, and how its training stands.

    Attributes:
        model: the model's settings, as JSON: with `weights` it is all that detection needs.
        classes, category_ids: names of the labels 0..K-1, and the data set's own ids.
        weights: the model's state, parameters and buffers, by name.
        optimizer: the optimizer's state by name; empty if training cannot continue from here.
        training: settings, position and records of the training, as JSON.
    """

    model: dict[str, Any]
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    weights: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


def write_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Put the checkpoint at `path`; whatever happens meanwhile, a whole file stands there.

    Written beside the place under a temporary name, forced to disk, then renamed over the old one, which is
    atomic within a folder.  What a killed process left half written in this folder is removed.

    Raises:
        OSError: if it cannot be written, as on a full disk; what stood there before still does.
    """
    path = Path(path)
    header = {
        "model": checkpoint.model,
        "classes": list(checkpoint.classes),
        "category_ids": list(checkpoint.category_ids),
        "training": checkpoint.training,
    }
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "layout": LAYOUT,
        "header": json.dumps(header),
    }
    arrays = {f"weights.{name}": array for name, array in checkpoint.weights.items()}
    arrays |= {f"optimizer.{name}": array for name, array in checkpoint.optimizer.items()}
    # safetensors copies memory as it lies: a transposed view would come back scrambled.
    content = serialize({name: np.asarray(a, order="C") for name, a in arrays.items()}, metadata)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for unfinished in path.parent.glob(f".*{path.suffix}.*.part"):
            unfinished.unlink(missing_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(
            f"{path}: the checkpoint cannot be written: {error}.  What was saved before is whole: remove the cause (a "
            "full disk?), then --resume goes on from there, or start again if nothing was saved yet"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    _force_names_to_disk(path.parent)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`, or, if that is a run's folder, its best or else its last one.

    Raises:
        CheckpointError: if there is none, it is damaged, not a checkpoint of ours, or of a newer format.
    """
    path = find_checkpoint(path)
    _check_length(path)
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata)
            arrays = file.get_tensors()
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error
    try:
        header = json.loads(metadata["header"])
        return Checkpoint(
            model=header["model"],
            classes=tuple(header["classes"]),
            category_ids=tuple(header["category_ids"]),
            weights=_under("weights.", arrays),
            optimizer=_under("optimizer.", arrays),
            training=header["training"],
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path}: damaged: its header cannot be read ({type(error).__name__}: {error})"
        ) from error


def find_checkpoint(path: str | Path) -> Path:
    """`path` if it is a file; of a run's folder the best checkpoint, or else the last one."""
    path = Path(path)
    if path.is_dir():
        for name in (BEST, LAST):
            if (path / name).is_file():
                return path / name
        raise CheckpointError(f"{path}: this folder holds neither {BEST} nor {LAST}")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    return path


def is_checkpoint(path: str | Path) -> bool:
    """Whether `path` is a folder, which may hold a run, or a file that says it is a checkpoint of ours."""
    path = Path(path)
    if path.is_dir() or path.suffix != ".safetensors" or not path.is_file():
        return path.is_dir()
    try:
        with safe_open(path, framework="np") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except SafetensorError:  # damaged: whoever reads it will say how
        return False


def _check_length(path: Path) -> None:
    """Before any parsing: is this the container at all, and is all of it there?

    A safetensors file is 8 bytes that hold a length n, n bytes of JSON, and the arrays it lists.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        n = int.from_bytes(file.read(8), "little")
        start = file.read(1)
        if size < 9 or start != b"{":
            raise CheckpointError(
                f"{path}: not a safetensors file; pass a checkpoint that minidet wrote (.safetensors), "
                "or make one of other weights: minidet convert"
            )
        header = start + file.read(min(n, size) - 1)
    if len(header) < n:
        raise CheckpointError(_truncated(path, size, 8 + n))
    try:
        ends = [entry["data_offsets"][1] for key, entry in json.loads(header).items() if key != "__metadata__"]
        expected = 8 + n + max(ends, default=0)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged: the list of its arrays cannot be read") from error
    if size < expected:
        raise CheckpointError(_truncated(path, size, expected))


def _truncated(path: Path, size: int, expected: int) -> str:
    return (
        f"{path}: truncated: {size:,} of at least {expected:,} bytes; copy it again, "
        "or continue from another checkpoint of the run"
    )


def _check_format(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: a safetensors file, but not a minidet checkpoint (its metadata has no format {FORMAT!r})"
        )
    version = metadata.get("version", "")
    if not version.isdecimal() or not 1 <= int(version) <= VERSION:
        raise CheckpointError(
            f"{path}: checkpoint format {version!r}; this minidet reads 1 to {VERSION}: install a newer one"
        )
    if metadata.get("layout") != LAYOUT:
        raise CheckpointError(f"{path}: weights in layout {metadata.get('layout')!r}, expected {LAYOUT!r}")


def _under(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}


def _force_names_to_disk(folder: Path) -> None:
    """Wait until the new name would survive a power cut, as the file's bytes already do."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
