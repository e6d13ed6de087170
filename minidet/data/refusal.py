"""Which entry of a json file is wrong: the slow look at each of them, once a file was found to be odd."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

LARGEST = 1e9
"""Coordinates beyond it are nonsense, as are NaN and infinity, which are not below it either."""


class DataError(ValueError):
    """A data set that cannot be used as it is; the message says where and what to do."""


def inspected(path: Path) -> dict[str, list[dict]]:
    """The whole json, read at once and looked at entry by entry.

    Raises:
        DataError: for the first entry that is missing something, malformed or contradictory.
    """
    data = parsed(path)
    categories = checked_categories(path, data["categories"])
    _annotations(path, data["annotations"], _images(path, data["images"]), categories)
    return data


def parsed(path: Path) -> dict[str, list[dict]]:
    """The whole json at once; its images, annotations and categories are lists of objects.

    Raises:
        DataError: if they are not, or the file is no json.
    """
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid json: {error}") from None
    if isinstance(data, list):
        raise DataError(
            f"{path}: holds a list, as COCO writes detections; ground truth is an object with images, "
            "annotations and categories"
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise DataError(f"{path}: needs a list called {key!r}; is this an instances_*.json file?")
        for n, entry in enumerate(data[key]):
            if not isinstance(entry, dict):
                raise DataError(f"{path}: {key}[{n}] is {entry!r}, expected an object")
    return data


def checked_categories(path: Path, entries: list[dict]) -> dict[int, str]:
    """Names by id, in order of the ids.

    Raises:
        DataError: for an id or a name that is missing, malformed or there twice.
    """
    if not entries:
        raise DataError(f"{path}: categories is empty: there is nothing to detect")
    names: dict[int, str] = {}
    for n, entry in enumerate(entries):
        category_id, name = _integer(path, f"categories[{n}]", entry, "id"), entry.get("name")
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{path}: category id {category_id} needs a name, got {name!r}")
        if category_id in names:
            raise DataError(f"{path}: category id {category_id} is {names[category_id]!r} and {name!r}")
        if name in names.values():
            raise DataError(f"{path}: two categories are called {name!r}: give them different names")
        names[category_id] = name
    return dict(sorted(names.items()))


def _images(path: Path, entries: list[dict]) -> set[int]:
    """Their ids."""
    if not entries:
        raise DataError(f"{path}: images is empty: there is nothing to look at")
    ids: set[int] = set()
    for n, entry in enumerate(entries):
        image_id = _integer(path, f"images[{n}]", entry, "id")
        where = f"image id {image_id}"
        if image_id in ids:
            raise DataError(f"{path}: {where} is there twice")
        ids.add(image_id)
        safe_name(path, where, entry.get("file_name"))
        for key in ("width", "height"):
            if _integer(path, where, entry, key) < 1:
                raise DataError(f"{path}: {where}: {key} must be at least 1 pixel, got {entry[key]}")
    return ids


def safe_name(path: Path, where: str, name: Any) -> str:
    """The name, if it is a relative path that stays in the image folder: a json may come from anywhere.

    Raises:
        DataError: if it is not.
    """
    if not isinstance(name, str) or not name.strip("/. "):
        raise DataError(f"{path}: {where}: file_name must name a file, got {name!r}")
    parts = PurePosixPath(name).parts + PureWindowsPath(name).parts
    if ".." in parts or "\0" in name or name.startswith("/") or PureWindowsPath(name).anchor:
        raise DataError(f"{path}: {where}: file_name {name!r} leaves the image folder; it must be a path below it")
    return name


def _annotations(path: Path, entries: list[dict], images: set[int], categories: dict[int, str]) -> None:
    """Each is complete, and points at an image and a category that exist."""
    seen: set[int] = set()
    for n, entry in enumerate(entries):
        annotation_id = _integer(path, f"annotations[{n}]", entry, "id")
        where = f"annotation id {annotation_id}"
        if annotation_id in seen:
            raise DataError(f"{path}: {where} is there twice")
        seen.add(annotation_id)
        image_id = _integer(path, where, entry, "image_id")
        if image_id not in images:
            raise DataError(f"{path}: {where}: image_id {image_id} is not the id of any image")
        category_id = _integer(path, where, entry, "category_id")
        if category_id not in categories:
            known = ", ".join(map(str, list(categories)[:10])) + (", ..." if len(categories) > 10 else "")
            raise DataError(
                f"{path}: {where}: category_id {category_id} is not among the categories ({known}); "
                "are ids counted from 0 in one place and from 1 in the other?"
            )
        bbox = entry.get("bbox")
        if (
            not isinstance(bbox, list)
            or len(bbox) != 4
            or not all(type(value) in (int, float) and abs(value) < LARGEST for value in bbox)
        ):
            raise DataError(f"{path}: {where}: bbox must be four numbers [x, y, width, height], got {bbox!r}")
        area = entry.get("area", abs(bbox[2] * bbox[3]))
        if type(area) not in (int, float) or not 0 <= area < LARGEST**2:
            raise DataError(f"{path}: {where}: area must be a number of pixels, got {area!r}")
        crowd = entry.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise DataError(f"{path}: {where}: iscrowd must be 0 or 1, got {crowd!r}")


def _integer(path: Path, where: str, entry: dict, key: str) -> int:
    value = entry.get(key)
    if type(value) is not int or not -(2**63) <= value < 2**63:
        problem = f"{key!r} must be an integer, got {value!r}" if key in entry else f"{key!r} is missing"
        raise DataError(f"{path}: {where}: {problem}")
    return value
