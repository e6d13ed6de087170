"""COCO's json as columns, believed only after every entry was checked.

Whatever is wrong is said here, before training, with the file, the id and what to do about it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from minidet.data.json_stream import NotPlainError, pieces
from minidet.data.refusal import LARGEST, DataError, checked_categories, inspected, safe_name

MOST_EMPTY = 1e-4
"""Part of a file's boxes that may have a side of 0, and be left out: COCO's own train2017 has 2 of 860,001."""


@dataclass(frozen=True, eq=False)
class Annotations:
    """A checked file of N images and G boxes, in columns; boxes stand image by image, classes by id.

    Shapes:
        image_ids: (N,)
        sizes: (N, 2), height and width
        starts: (N + 1,), image n owns the boxes from starts[n] to starts[n + 1]
        ids: (G,), of the annotations
        bbox: (G, 4)
        labels: (G,)
        area: (G,)
        crowd: (G,)
    Units: `bbox` is x, y, width, height as it stands in the file; pixels.
    """

    categories: dict[int, str]
    names: list[str]
    """Of the images' files."""
    image_ids: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray
    ids: np.ndarray
    bbox: np.ndarray
    labels: np.ndarray
    area: np.ndarray
    crowd: np.ndarray

    @cached_property
    def owners(self) -> np.ndarray:
        """Which image each box belongs to, (G,)."""
        return np.repeat(np.arange(len(self.names)), np.diff(self.starts))

    @cached_property
    def boxes(self) -> np.ndarray:
        """Float32 x1, y1, x2, y2, clipped to their images, (G, 4)."""
        return self._corners.astype(np.float32)

    @cached_property
    def learnable(self) -> np.ndarray:
        """Neither a crowd nor without area, (G,)."""
        return ~self.crowd & np.all(self.boxes[:, 2:] > self.boxes[:, :2], axis=1)

    @property
    def clipped(self) -> int:
        """Boxes that stuck out of their image a little."""
        corners = self._corners
        # Not the boxes that end beyond the edge only because x + width was rounded.
        return int(np.any(np.abs(corners[:, 2:] - corners[:, :2] - self.bbox[:, 2:]) > 0.01, axis=1).sum())

    @property
    def _corners(self) -> np.ndarray:
        limits = self.sizes[self.owners, ::-1].astype(np.float64)
        low, high = self.bbox[:, :2], self.bbox[:, :2] + self.bbox[:, 2:]
        return np.hstack([np.clip(low, 0, limits), np.clip(high, 0, limits)])

    def ground_truth(self) -> dict[str, Any]:
        """What an evaluator needs of the file: crowds included, boxes as they stand there.

        Differs: annotations are numbered anew from 1, because pycocotools takes a match with id 0 for none.
        """
        category_ids = np.array(list(self.categories))
        columns = (self.image_ids[self.owners], category_ids[self.labels], self.bbox, self.area, self.crowd.astype(int))
        keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
        rows = zip(range(1, len(self.bbox) + 1), *(column.tolist() for column in columns), strict=True)
        images = zip(self.image_ids.tolist(), self.names, self.sizes.tolist(), strict=True)
        return {
            "images": [{"id": i, "file_name": name, "width": w, "height": h} for i, name, (h, w) in images],
            "annotations": [dict(zip(keys, row, strict=True)) for row in rows],
            "categories": [{"id": i, "name": name} for i, name in self.categories.items()],
        }


def read_annotations(path: Path, overhang: float) -> Annotations:
    """Parse and check a COCO json file; boxes may stick out of their image by `overhang` pixels.

    Columns are checked as a whole; only a file that is found to be odd is looked at entry by entry.

    Raises:
        DataError: if anything in it is missing, malformed, contradictory or outside its image.
    """
    try:
        with _uncollected(), open(path, "rb") as file:
            annotations = _annotations(path, pieces(file))
    except NotPlainError:
        # Either this raises, or the file is sound though nobody else writes it so.
        annotations = _annotations(path, inspected(path).items())
    check_boxes(path, annotations, overhang)
    return annotations


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the search for cycles, which json cannot hold: it would take a quarter of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _annotations(path: Path, lists: Iterable[tuple[str, list]]) -> Annotations:
    """The columns of the three lists; NotPlainError where an entry is odd."""
    images, boxes, categories, seen = [], [], [], set()
    try:
        for name, entries in lists:
            seen.add(name)
            if name == "images":
                images.append(_image_columns(entries))
            elif name == "annotations":
                boxes.append(_box_columns(entries))
            elif name == "categories":
                categories += entries
        if not {"images", "annotations", "categories"} <= seen:
            raise NotPlainError("a list is missing")
        named = checked_categories(path, categories)
    except (KeyError, TypeError, AttributeError, OverflowError, DataError) as error:
        raise NotPlainError(str(error)) from error
    names = list(chain.from_iterable(part[0] for part in images))
    if not names:
        raise NotPlainError("no image")
    image_ids, sizes = (np.concatenate([part[k] for part in images]) for k in (1, 2))
    columns = [np.concatenate(column) for column in zip(*boxes, strict=True)]
    ids, owner_ids, category_ids = columns[:3]
    owners, labels = _positions(image_ids, owner_ids), _positions(np.array(list(named), np.int64), category_ids)
    if np.any(np.diff(np.sort(ids)) == 0):
        raise NotPlainError("an id twice")
    check_names(path, names, image_ids)
    order = np.argsort(owners, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=len(names)))])
    ids, labels, *columns = (column[order] for column in (ids, labels, *columns[3:]))
    return Annotations(named, names, image_ids, sizes, starts, ids, columns[0], labels, columns[1], columns[2])


def _image_columns(entries: list[dict]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """File names, ids and sizes."""
    names = [entry["file_name"] for entry in entries]
    sizes = np.stack([_column(entries, "height"), _column(entries, "width")], axis=1)
    if set(map(type, names)) - {str} or sizes.min(initial=1) < 1:
        raise NotPlainError("a name or a size")
    return names, _column(entries, "id"), sizes


def _box_columns(entries: list[dict]) -> tuple[np.ndarray, ...]:
    """Ids, image ids, category ids, boxes, areas, and who is a crowd."""
    boxes = [entry["bbox"] for entry in entries]
    if set(map(type, boxes)) - {list} or set(map(len, boxes)) - {4}:
        raise NotPlainError("a box")
    bbox = _array(list(chain.from_iterable(boxes)), {int, float}, np.float64).reshape(-1, 4)
    sides = zip(entries, boxes, strict=True)
    area = [entry["area"] if "area" in entry else abs(box[2] * box[3]) for entry, box in sides]
    area = _array(area, {int, float}, np.float64)
    crowd = _array([entry.get("iscrowd", 0) for entry in entries], {int, float, bool}, np.float64)
    possible = (area >= 0) & (area < LARGEST**2) & ((crowd == 0) | (crowd == 1))
    if not (np.all(np.abs(bbox) < LARGEST) and possible.all()):
        raise NotPlainError("a box, an area or a crowd")
    return *(_column(entries, key) for key in ("id", "image_id", "category_id")), bbox, area, crowd == 1


def _column(entries: list[dict], key: str) -> np.ndarray:
    return _array([entry[key] for entry in entries], {int}, np.int64)


def _array(values: list, types: set[type], dtype: type) -> np.ndarray:
    if set(map(type, values)) - types:
        raise NotPlainError("a value of another type")
    return np.array(values, dtype)


def _positions(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted id stands among the ids, which differ."""
    order = np.argsort(ids)
    inside = np.searchsorted(ids[order], wanted)
    if np.any(np.diff(ids[order]) == 0) or np.any(ids[order][np.minimum(inside, len(ids) - 1)] != wanted):
        raise NotPlainError("an id that is there twice, or not at all")
    return order[inside]


def check_names(path: Path, names: list[str], image_ids: np.ndarray) -> None:
    """Every file lies below the image folder, whoever wrote the names.

    Raises:
        DataError: for the first that does not.
    """
    text = "\0".join(names)
    plain = text.count("\0") == len(names) - 1 and all(name.strip("/. ") and name[0] != "/" for name in names)
    if not plain or any(odd in text for odd in ("..", "\\", ":")):
        for name, image_id in zip(names, image_ids.tolist(), strict=True):
            safe_name(path, f"image id {image_id}", name)


def check_boxes(path: Path, found: Annotations, overhang: float) -> None:
    """No box is empty, or sticks out of its image by more than `overhang` pixels.

    Raises:
        DataError: for the first that does, with what its numbers may have been meant as.
    """
    bbox, sizes = found.bbox, found.sizes[found.owners, ::-1].astype(np.float64)
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
        image = found.owners[row]
        h, w = found.sizes[image]
        raise DataError(
            f"{path}: annotation id {found.ids[row]} (image id {found.image_ids[image]}, {found.names[image]}, "
            f"{w} x {h}): bbox [{', '.join(f'{v:.10g}' for v in bbox[row])}] {problem}"
        )


def _other_reading(bbox: np.ndarray, sizes: np.ndarray, overhang: float) -> str:
    """What the four numbers may have been meant as, if that puts every box of the file inside its image."""
    first, second, limits = bbox[:, :2], bbox[:, 2:], sizes + overhang
    readings = {
        "as x1, y1, x2, y2": (first < second) & (second <= limits),
        "as centre x, centre y, width, height": ((first - second / 2 >= -overhang) & (first + second / 2 <= limits)),
        "with x and y, or the images' width and height, exchanged": first + second <= limits[:, ::-1],
    }
    for reading, fits in readings.items():
        if fits.all():
            return f"all {len(bbox)} boxes of the file would fit {reading}: COCO's are x, y, width, height"
    return f"only {overhang:g} pixels are clipped"
