"""Where COCO and BCCD are, and how they become folders that `coco` reads."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from minidet.data.fetch import Source, fetch
from minidet.data.unpack import unpack
from minidet.data.voc import write_voc_as_coco

COCO = {
    "annotations": Source(
        "http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
        252_907_541,
        "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
    ),
    "val": Source(
        "http://images.cocodataset.org/zips/val2017.zip",
        815_585_330,
        "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
    ),
    "train": Source(
        "http://images.cocodataset.org/zips/train2017.zip",
        19_336_861_798,
        "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
    ),
}
"""COCO names no checksums; these are what many people who had the files have published, and agree on."""
IMAGES = {"val": 5_000, "train": 118_287}

BCCD_COMMIT = "d272fb14cdff6e473fafeeeba32aba5f560e9e43"
BCCD = Source(f"https://github.com/Shenggan/BCCD_Dataset/archive/{BCCD_COMMIT}.zip")
"""Packed anew by GitHub when asked for: neither its size nor its checksum is known beforehand."""
BCCD_CLASSES = ("RBC", "WBC", "Platelets")
BCCD_IMAGES = 364

RECORD = "downloads.json"


def download_coco(split: str, folder: Path, *, keep: bool = False, progress: bool = False) -> list[str]:
    """COCO 2017's images and boxes of a split, "val" or "train", below `folder`; returns what was done, a line each.

    What is there already is not fetched again.  Archives are removed once unpacked, unless `keep`.

    Raises:
        FetchError: if an archive cannot be had.
        UnpackError: if an archive is not what it should be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name, done = f"instances_{split}2017.json", []
    if not (folder / "annotations" / name).is_file():
        archive = folder / "annotations_trainval2017.zip"
        _record(folder, fetch(COCO["annotations"], archive, room=2**30, progress=progress))
        fresh = folder / "annotations.new"
        unpack(archive, fresh, {f"annotations/{name}": name}.get, files=1, most=2**30, progress=progress)
        (folder / "annotations").mkdir(exist_ok=True)
        os.replace(fresh / name, folder / "annotations" / name)
        fresh.rmdir()
        _finish(archive, keep)
        done.append(f"{folder / 'annotations' / name}: unpacked")
    images = folder / f"{split}2017"
    if not images.is_dir():
        source, archive = COCO[split], folder / f"{split}2017.zip"
        files, most = IMAGES[split], source.size * 11 // 10  # photos do not shrink in a zip
        _record(folder, fetch(source, archive, room=most, progress=progress))
        unpack(archive, images, _below(f"{split}2017/"), files=files, most=most, progress=progress)
        _finish(archive, keep)
        done.append(f"{images}: {files:,} images unpacked")
    return done or [f"{folder}: {split} is there already"]


def download_bccd(folder: Path, *, keep: bool = False, progress: bool = False) -> list[str]:
    """BCCD's 364 photos of blood below `folder`, its xml as COCO's json; returns what was done, a line each.

    Raises:
        FetchError: if the archive cannot be had.
        UnpackError: if it is not what it should be.
        DataError: if its annotations are.
    """
    if (folder / "images").is_dir():
        return [f"{folder}: is there already"]
    folder.mkdir(parents=True, exist_ok=True)
    archive, voc = folder / "bccd.zip", folder / "voc"
    _record(folder, fetch(BCCD, archive, room=2**26, progress=progress))
    shutil.rmtree(voc, ignore_errors=True)
    place = _below(f"BCCD_Dataset-{BCCD_COMMIT}/")
    unpack(archive, voc, place, files=2 * BCCD_IMAGES, most=2**26, progress=progress)
    info = {"description": "BCCD blood cells, converted from VOC", "version": BCCD_COMMIT}
    splits = ("train", "val", "test")
    left_out = write_voc_as_coco(voc / "BCCD", folder / "annotations", BCCD_CLASSES, splits, info)
    os.replace(voc / "LICENSE", folder / "LICENSE")
    os.replace(voc / "BCCD" / "JPEGImages", folder / "images")
    shutil.rmtree(voc)
    _finish(archive, keep)
    return [f"{folder}: {BCCD_IMAGES} images, splits {', '.join(splits)}; {left_out} boxes without area left out"]


def _below(prefix: str):
    """Where entries below a folder of the archive go: the same place, without that folder."""
    return lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None


def _record(folder: Path, found: dict[str, Any]) -> None:
    """Add what was got to a list beside the data."""
    path = folder / RECORD
    before = json.loads(path.read_text()) if path.is_file() else []
    entries = [entry for entry in before if entry["url"] != found["url"]]
    path.write_text(json.dumps([*entries, found], indent=1))


def _finish(archive: Path, keep: bool) -> None:
    if not keep:
        archive.unlink()
