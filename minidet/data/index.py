"""The columns of a large json file, kept beside it: checked once, then read in a fraction of a second."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zipfile
import zlib
from pathlib import Path
from time import time_ns

import numpy as np

from minidet.data.annotations import Annotations, check_names, read_annotations

FORMAT = 1
"""Of the index; to be raised whenever what it holds, or what is checked before it is written, changes."""
SMALL = 4_000_000
"""Bytes of a json that is read faster than its user finds out what the index beside it is."""
COARSE = 3_000_000_000
"""Nanoseconds within which a file may change twice and keep its time of change."""
UNREADABLE = (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error)
COLUMNS = ("image_ids", "sizes", "starts", "ids", "bbox", "labels", "area", "crowd")


def indexed(path: Path, overhang: float) -> Annotations:
    """What `read_annotations` returns, from an index where a valid one is found; else one is written.

    An index is valid for a json of the same size and time of change, or of the same content, and for the same
    `overhang`.  It lies beside the json, or in the user's cache folder where that place cannot be written; one
    that cannot be read, for whatever reason, is written anew.

    Raises:
        DataError: if anything in the json is missing, malformed, contradictory or outside its image.
    """
    stat = path.stat()
    if stat.st_size < SMALL:
        return read_annotations(path, overhang)
    places = index_places(path)
    same = {"format": FORMAT, "overhang": overhang, "size": stat.st_size}
    for place in filter(Path.is_file, places):
        try:
            with open(place, "rb") as opened, np.load(opened, allow_pickle=False) as file:
                head = json.loads(file["head"].tobytes())
                untouched = head["changed"] == stat.st_mtime_ns and head["written"] > stat.st_mtime_ns + COARSE
                if same.items() <= head.items() and (untouched or head["content"] == _content(path)):
                    found = _restored(head, file)
                    check_names(path, found.names, found.image_ids)  # whoever wrote the index
                    return found
        except UNREADABLE:
            continue
    content = _content(path)  # before it is read: what changes meanwhile will not match
    found = read_annotations(path, overhang)
    head = {**same, "changed": stat.st_mtime_ns, "content": content, "written": time_ns()}
    _write(places, found, head, path)
    return found


def index_places(path: Path) -> tuple[Path, Path]:
    """Where the index of a json may lie: beside it, or in the user's cache folder."""
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return path.with_suffix(".index.npz"), cache / "minidet" / "indexes" / f"{name}.npz"


def _content(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _restored(head: dict, file) -> Annotations:
    names = file["names"].tobytes().decode("utf-8", "surrogatepass").split("\0")
    categories = {int(category_id): name for category_id, name in head["categories"]}
    return Annotations(categories, names, **{column: file[column] for column in COLUMNS})


def _write(places: tuple[Path, ...], found: Annotations, head: dict, like: Path) -> None:
    """Into the first place that takes it, whole or not at all, for all who may read the file that it is `like`."""
    names = "\0".join(found.names).encode("utf-8", "surrogatepass")
    text = json.dumps({**head, "categories": list(found.categories.items())}).encode()
    arrays = {column: getattr(found, column) for column in COLUMNS}
    for place in places:
        unfinished = None
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=place.parent, suffix=".tmp", delete=False) as file:
                unfinished = Path(file.name)
                np.savez(file, head=np.frombuffer(text, np.uint8), names=np.frombuffer(names, np.uint8), **arrays)
            shutil.copymode(like, unfinished)
            os.replace(unfinished, place)
            return
        except OSError:  # no index is no mistake, only slow
            if unfinished:
                unfinished.unlink(missing_ok=True)
