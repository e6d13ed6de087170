"""COCO's json as it stands, in columns: nothing is refused, what cannot be read is counted.

The reader for training stops at the first mistake; this one is for telling all of them.
"""

from __future__ import annotations

import json
import math
import reprlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from minidet.data.json_stream import NotPlainError, pieces
from minidet.inspection.findings import SHOWN

OVERHANG = 2.0  # pixels by which the reader lets boxes stick out of their image, and clips them


def _whole(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # NaN is not; nor is what no picture can have


ID = (_whole, "an integer")
SIDE = (lambda value: _whole(value) and value > 0, "an integer above 0")
TEXT = (lambda value: isinstance(value, str) and bool(value.strip("/. ")), "a name")
BOX = (
    lambda value: isinstance(value, list) and len(value) == 4 and all(map(_number, value)),
    "four finite numbers [x, y, width, height]",
)
FIELDS = {
    "images": {"id": ID, "file_name": TEXT, "width": SIDE, "height": SIDE},
    "annotations": {
        "id": ID, "image_id": ID, "category_id": ID, "bbox": BOX,
        "area": (lambda value: _number(value) and value >= 0, "a number of pixels"),
        "iscrowd": (lambda value: value in (0, 1), "0 or 1"),
    },
    "categories": {"id": ID, "name": TEXT},
}  # fmt: skip
"""What the entries of each list must have: a test, and what it asks for."""
OPTIONAL = {"area": math.nan, "iscrowd": 0}


@dataclass(frozen=True, eq=False)
class Raw:
    """The lists of one file; row n of each column is the list's n-th readable entry.

    Shapes:
        sizes: (N, 2)
        bbox: (G, 4)
    Units: sizes width, height; bbox as in the file, x, y, width, height if it is as it should be; pixels.
    """

    path: str
    """The file, as findings call it."""
    image_ids: np.ndarray
    names: list[str]
    sizes: np.ndarray
    categories: list[tuple[int, str]]
    ids: np.ndarray
    image_id: np.ndarray
    category_id: np.ndarray
    bbox: np.ndarray
    area: np.ndarray
    """NaN where the file gives none."""
    crowd: np.ndarray
    broken: dict[str, list[str | None]]
    """Entries that could not be read: by problem the first places, and None for each further one."""
    missing_lists: tuple[str, ...]

    @cached_property
    def image_row(self) -> np.ndarray:
        """The image of each annotation as a row of the image columns, -1 for none."""
        return rows_of(self.image_id, self.image_ids)

    @cached_property
    def category_row(self) -> np.ndarray:
        """The category of each annotation as a position in `categories`, -1 for none."""
        return rows_of(self.category_id, np.array([number for number, _ in self.categories], np.int64))

    @cached_property
    def limits(self) -> np.ndarray:
        """Width and height of each annotation's image, infinite where it has none."""
        known = self.image_row >= 0
        return np.where(known[:, None], self.sizes[self.image_row] if len(self.sizes) else 0.0, np.inf)

    @cached_property
    def usable(self) -> np.ndarray:
        """Annotations whose box, as x, y, width, height, lies in the image they belong to: (G,) bool."""
        low, sides = self.bbox[:, :2], self.bbox[:, 2:]
        inside = (low >= -OVERHANG) & (low + sides <= self.limits + OVERHANG) & (sides > 0)
        return (self.image_row >= 0) & (self.category_row >= 0) & inside.all(axis=1)

    def image(self, row: int) -> str:
        """How findings name an image."""
        width, height = self.sizes[row]
        return f"image id {self.image_ids[row]} ({self.names[row]}, {width:g} x {height:g})"

    def annotation(self, row: int) -> str:
        """How findings name an annotation."""
        image = self.image_row[row]
        owner = self.image(image) if image >= 0 else f"image id {self.image_id[row]}"
        box = ", ".join(f"{value:g}" for value in self.bbox[row])
        return f"{self.path}: annotation id {self.ids[row]} of {owner}: bbox [{box}]"


def rows_of(values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The first position of each value among the keys, -1 where it is not there."""
    if not len(keys):
        return np.full(len(values), -1)
    unique, first = np.unique(keys, return_index=True)
    at = np.searchsorted(unique, values).clip(0, len(unique) - 1)
    return np.where(unique[at] == values, first[at], -1)


def read_raw(path: Path, name: str) -> Raw:
    """The columns of a json file, read piece by piece; findings call it `name`.

    Raises:
        ValueError: if it is no json at all, or no object.
    """
    try:
        with open(path, "rb") as file:
            return from_pieces(name, pieces(file))
    except NotPlainError:
        data = json.loads(path.read_bytes())
    if not isinstance(data, dict):
        what = "a list, as COCO writes detections" if isinstance(data, list) else "no object"
        raise ValueError(f"holds {what}; needed is an object with images, annotations and categories")
    return from_dict(name, data)


def from_dict(path: str, data: dict[str, Any]) -> Raw:
    """The columns of a COCO dictionary, which findings call `path`."""
    return from_pieces(path, ((name, data[name]) for name in FIELDS if isinstance(data.get(name), list)))


def from_pieces(path: str, parts: Iterable[tuple[str, list]]) -> Raw:
    """The columns of lists that come in pieces, each with its name."""
    kinds = {"file_name": list, "name": list, "bbox": lambda: array("d"), "area": lambda: array("d")}
    columns = {name: {key: kinds.get(key, lambda: array("q"))() for key in keys} for name, keys in FIELDS.items()}
    broken, seen = {}, dict.fromkeys(FIELDS, 0)
    missing = set(FIELDS)
    for name, entries in parts:
        missing.discard(name)
        for entry in entries if name in FIELDS else ():
            seen[name] += 1
            problem, got = _problem(entry, FIELDS[name])
            if problem:
                number = f"id {entry['id']}" if isinstance(entry, dict) and "id" in entry else f"number {seen[name]}"
                known = broken.setdefault(f"{name}: {problem}", [])
                known.append(f"{path}: {name} {number}{got}" if len(known) < SHOWN else None)
                continue
            for key, column in columns[name].items():
                value = entry.get(key, OPTIONAL.get(key))
                column.extend(value) if key == "bbox" else column.append(value)
    images, boxes, classes = columns.values()
    return Raw(
        path, np.array(images["id"]), images["file_name"], np.column_stack([images["width"], images["height"]]) * 1.0,
        list(zip(classes["id"], classes["name"], strict=True)), np.array(boxes["id"]), np.array(boxes["image_id"]),
        np.array(boxes["category_id"]), np.array(boxes["bbox"]).reshape(-1, 4), np.array(boxes["area"]),
        np.array(boxes["iscrowd"], bool), broken, tuple(sorted(missing)),
    )  # fmt: skip


def _problem(entry: Any, fields: dict) -> tuple[str, str]:
    """The first field that is not as it must be, and what it is."""
    if not isinstance(entry, dict):
        return "is no object", f": {reprlib.repr(entry)}"
    for key, (right, wanted) in fields.items():
        if key not in entry and key not in OPTIONAL:
            return f"{key!r} is missing", ""
        if key in entry and not right(entry[key]):
            return f"{key!r} must be {wanted}", f": {reprlib.repr(entry[key])}"
    return "", ""
