"""COCO's json, read once and believed only after every entry was checked.

Whatever is wrong is said here, before training, with the file, the id and what to do about it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

MOST_EMPTY = 1e-4
"""Part of a file's boxes that may have a side of 0, and be left out: COCO's own train2017 has 2 of 860,001."""
LARGEST = 1e9
"""Coordinates beyond it are nonsense, as are NaN and infinity, which are not below it either."""


class DataError(ValueError):
    """A data set that cannot be used as it is; the message says where and what to do."""


@dataclass(frozen=True)
class Annotations:
    """A checked file, in columns; classes in the order of their ids, whatever their order in the file.

    Shapes:
        bbox: (G, 4)
        boxes: (G, 4)
        labels: (G,)
        area: (G,)
        crowd: (G,)
        learnable: (G,), neither a crowd nor without area
    Units: `bbox` is x, y, width, height as it stands in the file; `boxes` float32 x1, y1, x2, y2, clipped to
        their images; both in pixels.
    """

    images: list[dict[str, Any]]
    """Id, file_name, width and height, in the order of the file."""
    categories: dict[int, str]
    rows: list[list[int]]
    """Which of the boxes belong to each image."""
    bbox: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    area: np.ndarray
    crowd: np.ndarray
    learnable: np.ndarray
    clipped: int
    """Boxes that stuck out of their image a little."""

    def ground_truth(self) -> dict[str, Any]:
        """What an evaluator needs of the file: crowds included, boxes as they stand there.

        Differs: annotations are numbered anew from 1, because pycocotools takes a match with id 0 for none.
        """
        category_ids = list(self.categories)
        annotations = [
            {
                "id": row + 1,
                "image_id": image["id"],
                "category_id": category_ids[self.labels[row]],
                "bbox": self.bbox[row].tolist(),
                "area": float(self.area[row]),
                "iscrowd": int(self.crowd[row]),
            }
            for image, rows in zip(self.images, self.rows, strict=True)
            for row in rows
        ]
        categories = [{"id": category_id, "name": name} for category_id, name in self.categories.items()]
        return {"images": self.images, "annotations": annotations, "categories": categories}


def read_annotations(path: Path, overhang: float) -> Annotations:
    """Parse and check a COCO json file; boxes may stick out of their image by `overhang` pixels.

    Raises:
        DataError: if anything in it is missing, malformed, contradictory or outside its image.
    """
    data = _parse(path)
    categories = _categories(path, data["categories"])
    images = _images(path, data["images"])
    entries = list(_entries(path, data["annotations"], images, categories))

    position = {image_id: n for n, image_id in enumerate(images)}
    label = {category_id: n for n, category_id in enumerate(categories)}
    rows: list[list[int]] = [[] for _ in images]
    for row, entry in enumerate(entries):
        rows[position[entry["image_id"]]].append(row)
    bbox = np.array([entry["bbox"] for entry in entries], np.float64).reshape(-1, 4)
    corners = _corners(path, bbox, entries, images, overhang)
    boxes = corners.astype(np.float32)
    crowd = np.array([entry["iscrowd"] for entry in entries], bool)
    return Annotations(
        list(images.values()),
        categories,
        rows,
        bbox,
        boxes,
        np.array([label[entry["category_id"]] for entry in entries], np.int64),
        np.array([entry["area"] for entry in entries], np.float64),
        crowd,
        ~crowd & np.all(boxes[:, 2:] > boxes[:, :2], axis=1),
        # Not the boxes that end beyond the edge only because x + width was rounded.
        clipped=int(np.any(np.abs(corners[:, 2:] - corners[:, :2] - bbox[:, 2:]) > 0.01, axis=1).sum()),
    )


def _parse(path: Path) -> dict[str, list[dict]]:
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


def _categories(path: Path, entries: list[dict]) -> dict[int, str]:
    """Names by id, in order of the ids."""
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


def _images(path: Path, entries: list[dict]) -> dict[int, dict[str, Any]]:
    """What is needed of every image, by id."""
    if not entries:
        raise DataError(f"{path}: images is empty: there is nothing to look at")
    images: dict[int, dict[str, Any]] = {}
    for n, entry in enumerate(entries):
        image_id = _integer(path, f"images[{n}]", entry, "id")
        where = f"image id {image_id}"
        if image_id in images:
            raise DataError(f"{path}: {where} is there twice")
        image = {"id": image_id, "file_name": _safe_name(path, where, entry.get("file_name"))}
        for key in ("width", "height"):
            image[key] = _integer(path, where, entry, key)
            if image[key] < 1:
                raise DataError(f"{path}: {where}: {key} must be at least 1 pixel, got {image[key]}")
        images[image_id] = image
    return images


def _safe_name(path: Path, where: str, name: Any) -> str:
    """The name, if it is a relative path that stays in the image folder: a json may come from anywhere."""
    if not isinstance(name, str) or not name.strip("/. "):
        raise DataError(f"{path}: {where}: file_name must name a file, got {name!r}")
    parts = PurePosixPath(name).parts + PureWindowsPath(name).parts
    if ".." in parts or "\0" in name or name.startswith("/") or PureWindowsPath(name).anchor:
        raise DataError(
            f"{path}: {where}: file_name {name!r} leaves the image folder; it must be a path below it"
        )
    return name


def _entries(
    path: Path, entries: list[dict], images: dict[int, dict], categories: dict[int, str]
) -> Iterator[dict[str, Any]]:
    """The annotations, each complete and pointing at an image and a category that exist."""
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
        if not isinstance(bbox, list) or len(bbox) != 4 or not all(
            type(value) in (int, float) and abs(value) < LARGEST for value in bbox
        ):
            raise DataError(f"{path}: {where}: bbox must be four numbers [x, y, width, height], got {bbox!r}")
        area = entry.get("area", abs(bbox[2] * bbox[3]))
        if type(area) not in (int, float) or not 0 <= area < LARGEST**2:
            raise DataError(f"{path}: {where}: area must be a number of pixels, got {area!r}")
        crowd = entry.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise DataError(f"{path}: {where}: iscrowd must be 0 or 1, got {crowd!r}")
        yield {
            "id": annotation_id,
            "image_id": image_id,
            "category_id": category_id,
            "bbox": bbox,
            "area": area,
            "iscrowd": crowd,
        }


def _integer(path: Path, where: str, entry: dict, key: str) -> int:
    value = entry.get(key)
    if type(value) is not int:
        problem = f"{key!r} must be an integer, got {value!r}" if key in entry else f"{key!r} is missing"
        raise DataError(f"{path}: {where}: {problem}")
    return value


def _corners(
    path: Path, bbox: np.ndarray, entries: list[dict], images: dict[int, dict], overhang: float
) -> np.ndarray:
    """Boxes x1, y1, x2, y2, clipped to their images, once none was found impossible.

    Shapes:
        bbox: (G, 4)
        returns: (G, 4)
    """
    owners = [images[entry["image_id"]] for entry in entries]
    sizes = np.array([(image["width"], image["height"]) for image in owners], np.float64).reshape(-1, 2)
    low, high = bbox[:, :2], bbox[:, :2] + bbox[:, 2:]
    empty = np.any(bbox[:, 2:] <= 0, axis=1)
    if bbox[:, 2:].min(initial=0) == 0 and empty.sum() <= MOST_EMPTY * len(bbox):
        empty[:] = False
    outside = np.any((low < -overhang) | (high > sizes + overhang) | (high <= 0) | (low >= sizes), axis=1)

    row, problem = 0, ""
    if len(bbox) and bbox.max() <= 1:
        problem = "lies in 0..1, like every other: multiply by the image's size, COCO's boxes are in pixels"
    elif empty.any():
        row, problem = int(empty.argmax()), "has no area: correct it, or remove the annotation"
    elif outside.any():
        row = int(outside.argmax())
        spans = " and ".join(f"{axis} {low[row, n]:g}..{high[row, n]:g}" for n, axis in enumerate("xy"))
        problem = f"reaches over {spans}, beyond its image; {_other_reading(bbox, sizes, overhang)}"
    if problem:
        image = owners[row]
        raise DataError(
            f"{path}: annotation id {entries[row]['id']} (image id {image['id']}, {image['file_name']}, "
            f"{image['width']} x {image['height']}): bbox {entries[row]['bbox']} {problem}"
        )
    return np.hstack([np.clip(low, 0, sizes), np.clip(high, 0, sizes)])


def _other_reading(bbox: np.ndarray, sizes: np.ndarray, overhang: float) -> str:
    """What the four numbers may have been meant as, if that puts every box of the file inside its image."""
    first, second, limits = bbox[:, :2], bbox[:, 2:], sizes + overhang
    readings = {
        "as x1, y1, x2, y2": (first < second) & (second <= limits),
        "as centre x, centre y, width, height": (
            (first - second / 2 >= -overhang) & (first + second / 2 <= limits)
        ),
        "with x and y, or the images' width and height, exchanged": first + second <= limits[:, ::-1],
    }
    for reading, fits in readings.items():
        if fits.all():
            return f"all {len(bbox)} boxes of the file would fit {reading}: COCO's are x, y, width, height"
    return f"only {overhang:g} pixels are clipped"
