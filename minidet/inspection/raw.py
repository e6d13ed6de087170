"""COCO's json as it stands, in columns: nothing is refused, what cannot be read is counted.

The reader for training stops at the first mistake; this one is for telling all of them.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from minidet.data.json_stream import NotPlainError, pieces
from minidet.inspection.findings import SHOWN

LISTS = ("images", "annotations", "categories")
LARGEST_ID = 2**63


@dataclass
class Raw:
    """The lists of one file; row n of each column is the list's n-th readable entry.

    Shapes:
        sizes: (N, 2)
        bbox: (G, 4)
    Units: sizes width, height; bbox as in the file, x, y, width, height if it is as it should be; pixels.
    """

    path: str
    """The file, as it is named in findings."""
    image_ids: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    sizes: Any = field(default_factory=lambda: array("d"))
    categories: list[tuple[int, str]] = field(default_factory=list)
    ids: Any = field(default_factory=lambda: array("q"))
    image_id: Any = field(default_factory=lambda: array("q"))
    category_id: Any = field(default_factory=lambda: array("q"))
    bbox: Any = field(default_factory=lambda: array("d"))
    area: Any = field(default_factory=lambda: array("d"))
    """NaN where the file gives none."""
    crowd: Any = field(default_factory=lambda: array("b"))
    broken: dict[str, list[str]] = field(default_factory=dict)
    """Entries that could not be read: by problem, the first places, and None for each further one."""
    missing_lists: tuple[str, ...] = ()

    @cached_property
    def image_row(self) -> np.ndarray:
        """The image of each annotation as a row of the image columns, -1 for none."""
        return rows_of(self.image_id, self.image_ids)

    @cached_property
    def category_row(self) -> np.ndarray:
        """The category of each annotation as a position in `categories`, -1 for none."""
        return rows_of(self.category_id, [number for number, _ in self.categories])

    @cached_property
    def usable(self) -> np.ndarray:
        """Annotations whose box, as x, y, width, height, lies in the image they belong to: (G,) bool."""
        known = (self.image_row >= 0) & (self.category_row >= 0)
        limits = np.where(known[:, None], self.sizes[self.image_row], 0) if len(self.sizes) else self.bbox[:, :2]
        with np.errstate(invalid="ignore"):
            inside = (self.bbox[:, :2] > -3) & (self.bbox[:, :2] + self.bbox[:, 2:] < limits + 3)
            return known & inside.all(axis=1) & (self.bbox[:, 2:] > 0).all(axis=1)

    def image(self, row: int) -> str:
        """How findings name an image."""
        width, height = self.sizes[row]
        return f"image id {self.image_ids[row]} ({self.names[row]}, {width:g} x {height:g})"

    def annotation(self, row: int) -> str:
        """How findings name an annotation."""
        image = self.image_row[row]
        owner = self.image(image) if image >= 0 else f"image id {self.image_id[row]}"
        box = ", ".join(f"{value:g}" for value in self.bbox[row])
        return f"{self.path}: annotation id {self.ids[row]} ({owner}): bbox [{box}]"


def rows_of(values: np.ndarray, keys: list[int]) -> np.ndarray:
    """The first position of each value among the keys, -1 where it is not there."""
    if not keys:
        return np.full(len(values), -1)
    unique, first = np.unique(np.array(keys, np.int64), return_index=True)
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
        raise ValueError("holds no object with images, annotations and categories")
    return from_dict(name, data)


def from_dict(path: str, data: dict[str, Any]) -> Raw:
    """The columns of a COCO dictionary, which findings call `path`."""
    return from_pieces(path, ((name, data[name]) for name in LISTS if isinstance(data.get(name), list)))


def from_pieces(path: str, parts: Iterable[tuple[str, list]]) -> Raw:
    """The columns of lists that come in pieces, each with its name."""
    raw, seen = Raw(path), set()
    take = {"images": _image, "annotations": _annotation, "categories": _category}
    places = dict.fromkeys(LISTS, 0)
    for name, entries in parts:
        seen.add(name)
        for entry in entries if name in take else ():
            problem = take[name](raw, entry) if isinstance(entry, dict) else "is no object"
            if problem:
                number = f"id {entry['id']}" if isinstance(entry, dict) and "id" in entry else f"[{places[name]}]"
                known = raw.broken.setdefault(f"{name[:-1].replace('ie', 'y')}: {problem}", [])
                known.append(f"{path}: {name} {number}" if len(known) < SHOWN else None)
            places[name] += 1
    raw.missing_lists = tuple(name for name in LISTS if name not in seen)
    raw.sizes = np.array(raw.sizes).reshape(-1, 2)
    raw.bbox = np.array(raw.bbox).reshape(-1, 4)
    raw.crowd = np.array(raw.crowd, bool)
    for name in ("ids", "image_id", "category_id", "area"):
        setattr(raw, name, np.array(getattr(raw, name)))
    return raw


def _image(raw: Raw, entry: dict) -> str:
    """Append an image; what is wrong with it, if it cannot be."""
    if not _whole(entry.get("id")):
        return "'id' must be an integer"
    if not isinstance(entry.get("file_name"), str) or not entry["file_name"].strip("/. "):
        return "'file_name' must name a file"
    width, height = entry.get("width"), entry.get("height")
    if not (_whole(width) and _whole(height) and width > 0 and height > 0):
        return "'width' and 'height' must be integers above 0"
    raw.image_ids.append(entry["id"])
    raw.names.append(entry["file_name"])
    raw.sizes.extend((width, height))
    return ""


def _annotation(raw: Raw, entry: dict) -> str:
    numbers = [entry.get(key) for key in ("id", "image_id", "category_id")]
    for key, value in zip(("id", "image_id", "category_id"), numbers, strict=True):
        if not _whole(value):
            return f"{key!r} must be an integer" if key in entry else f"{key!r} is missing"
    bbox = entry.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_finite, bbox)):
        return "'bbox' must be four finite numbers [x, y, width, height]"
    area, crowd = entry.get("area", math.nan), entry.get("iscrowd", 0)
    if "area" in entry and not (_finite(area) and area >= 0):
        return "'area' must be a number of pixels"
    if crowd not in (0, 1):
        return "'iscrowd' must be 0 or 1"
    raw.ids.append(numbers[0])
    raw.image_id.append(numbers[1])
    raw.category_id.append(numbers[2])
    raw.bbox.extend(bbox)
    raw.area.append(area)
    raw.crowd.append(crowd)
    return ""


def _category(raw: Raw, entry: dict) -> str:
    if not _whole(entry.get("id")) or not isinstance(entry.get("name"), str):
        return "needs an integer 'id' and a 'name'"
    raw.categories.append((entry["id"], entry["name"]))
    return ""


def _whole(value: Any) -> bool:
    return type(value) is int and abs(value) < LARGEST_ID


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # NaN is not; nor is what no picture can have
