"""What several subcommands take as arguments: a data set by name, a folder for results, pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minidet.data import Dataset, coco, shapes

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
SHAPES_TRAIN, SHAPES_VAL = 28_800, 400


def results_folder(path: Path) -> Path:
    """The path, if it can be a folder; asked before the work whose results go there."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"--out {path}: this is a file; results need a folder")
    return path


def pictures_in(paths: Sequence[Path]) -> list[Path]:
    """The files themselves, and the pictures directly inside of folders."""
    pictures = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES)
            if not inside:
                raise ValueError(f"{path}: no pictures in this folder ({', '.join(PICTURES)})")
            pictures += inside
        else:
            pictures.append(path)
    return pictures


def dataset_named(name: str, split: str, *, missing_ok: bool = False) -> Dataset | None:
    """The built-in `shapes`, or a folder or json file in COCO's format; with `missing_ok`, None for no such split."""
    if name == "shapes":
        return shapes(split, images=SHAPES_TRAIN if split == "train" else SHAPES_VAL)
    files = [Path(name) / "annotations" / f"instances_{split}{year}.json" for year in ("", "2017")]
    if missing_ok and not any(map(Path.is_file, files)):  # a json file by itself is one split: no second is taken
        return None
    return coco(name, split=split)
