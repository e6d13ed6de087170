"""Ground truth and detections as arrays, checked: both evaluators start here."""

from __future__ import annotations

import math
import numbers
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np


@dataclass(frozen=True, eq=False)
class Boxes:
    """The M rows of a ground truth or of a list of results, in file order.

    Shapes:
        boxes_xywh: (M, 4)
        images: (M,) positions in the sorted image ids
        classes: (M,) positions in the sorted category ids
        areas: (M,) square pixels: of the segmented object where the file says so, else of the box
        crowd: (M,) True where one box stands for uncounted objects
        scores: (M,) of detections; zeros for objects
    """

    boxes_xywh: np.ndarray
    images: np.ndarray
    classes: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.boxes_xywh)

    def by_class(self, classes: int) -> list[np.ndarray]:
        """Row numbers, in file order, of each class."""
        order = np.argsort(self.classes, kind="stable")
        return np.split(order, np.cumsum(np.bincount(self.classes, minlength=classes))[:-1])


@dataclass(frozen=True, eq=False)
class Results(Sequence):
    """COCO results as columns: the same as a list of dicts, in a tenth of the memory.

    Shapes:
        image_ids: (M,)
        category_ids: (M,)
        boxes_xywh: (M, 4)
        scores: (M,)
    Units: pixels of the original image.
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    boxes_xywh: np.ndarray
    scores: np.ndarray

    @staticmethod
    def joined(parts: Iterable[tuple[np.ndarray, ...]]) -> Results:
        """Columns of several images, one after the other."""
        nothing = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0)
        return Results(*map(np.concatenate, zip(nothing, *parts, strict=True)))

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, n):
        if isinstance(n, slice):
            return Results(*(column[n] for column in vars(self).values()))
        if not -len(self) <= n < len(self):
            raise IndexError(n)
        return next(iter(self[n : n + 1 or None]))

    def __iter__(self) -> Iterator[dict]:
        keys = ("image_id", "category_id", "bbox", "score")
        for row in zip(*(column.tolist() for column in vars(self).values()), strict=True):
            yield dict(zip(keys, row, strict=True))


@dataclass(frozen=True, eq=False)
class Case:
    """What is to be judged: images and classes by sorted id, objects to find, detections made."""

    image_ids: list
    category_ids: list
    names: list[str]
    objects: Boxes
    detections: Boxes


def checked(ground_truth: dict, results: Sequence[dict]) -> Case:
    """Read a COCO ground truth and COCO results, or say which entry is wrong.

    An annotation without `area` gets that of its box; one without `iscrowd` is no crowd.

    Raises:
        ValueError: for ids that occur twice or are unknown, and for boxes, areas or scores that are
            missing, not finite, or negative where they cannot be.
    """
    for key in ("images", "annotations", "categories"):
        if key not in ground_truth:
            raise ValueError(f"the ground truth has no {key!r}: expected a COCO dict")
    image_ids = _ids(ground_truth, "images")
    category_ids = _ids(ground_truth, "categories")
    names = {category["id"]: category.get("name", category["id"]) for category in ground_truth["categories"]}
    shared = Counter(names.values())
    images, classes = _positions(image_ids), _positions(category_ids)
    return Case(
        image_ids=image_ids,
        category_ids=category_ids,
        # Some exports name a class and its super-category alike: a report must not merge them.
        names=[f"{names[i]}" if shared[names[i]] == 1 else f"{names[i]} (id {i})" for i in category_ids],
        objects=_boxes(ground_truth["annotations"], images, classes, scored=False),
        detections=_boxes(results, images, classes, scored=True),
    )


def _ids(ground_truth: dict, key: str) -> list:
    ids = [entry["id"] for entry in ground_truth[key]]
    twice = [i for i, count in Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(f"the ground truth's {key!r} have id {twice[0]!r} {ids.count(twice[0])} times")
    return sorted(ids)


def _positions(ids: list) -> dict:
    return {i: position for position, i in enumerate(ids)}


def _boxes(entries: Sequence[dict], images: dict, classes: dict, scored: bool) -> Boxes:
    """The entries as columns; looked at one by one only if something is wrong with one."""
    try:
        return _columns(entries, images, classes, scored)
    except (KeyError, TypeError, ValueError, OverflowError):
        for n, entry in enumerate(entries):
            where = f"results[{n}]" if scored else f"annotation {entry.get('id', n)}"
            _refuse(entry, where, images, classes, scored)
        raise


def _columns(entries: Sequence[dict], images: dict, classes: dict, scored: bool) -> Boxes:
    """The entries as columns; an error of some kind if one of them is not what it should be."""
    if isinstance(entries, Results):
        image_ids, category_ids = entries.image_ids.tolist(), entries.category_ids.tolist()
        boxes, scores = entries.boxes_xywh, entries.scores
    else:
        image_ids, category_ids = ([entry[key] for entry in entries] for key in ("image_id", "category_id"))
        listed = [entry["bbox"] for entry in entries]
        if set(map(type, listed)) - {list, tuple, np.ndarray} or set(map(len, listed)) - {4}:
            raise ValueError("a box of another kind")
        # Always float64, as pycocotools: float32 IoUs would fall on the other side of a threshold.
        boxes = _reals(list(chain.from_iterable(listed))).reshape(-1, 4)
        scores = _reals([entry["score"] for entry in entries]) if scored else np.zeros(len(entries))
    # A detection's area is always its box's: results carry no segmentation.
    areas, crowd = boxes[:, 2] * boxes[:, 3], np.zeros(len(boxes), bool)
    if not scored:
        sides = zip(entries, areas.tolist(), strict=True)
        areas = _reals([entry.get("area", area) for entry, area in sides])
        crowd = np.array([bool(entry.get("iscrowd", 0)) for entry in entries], bool)
    finite = np.isfinite(boxes).all() and np.isfinite(scores).all()
    if not finite or np.any(boxes[:, 2:] < 0) or not np.all(areas >= 0):
        raise ValueError("an impossible number")
    return Boxes(
        boxes_xywh=boxes,
        images=np.array([images[i] for i in image_ids], np.int64),
        classes=np.array([classes[i] for i in category_ids], np.int64),
        areas=areas,
        crowd=crowd,
        scores=scores,
    )


def _reals(values: list) -> np.ndarray:
    if not all(issubclass(kind, numbers.Real) for kind in set(map(type, values))):
        raise ValueError("no numbers")
    return np.array(values, np.float64)


def _refuse(entry: dict, where: str, images: dict, classes: dict, scored: bool) -> None:
    """Say what is wrong with the entry, if anything is."""
    missing = {"image_id", "category_id", "bbox", *(["score"] if scored else [])} - entry.keys()
    if missing:
        raise ValueError(f"{where}: no {min(missing)!r}")
    image, category = entry["image_id"], entry["category_id"]
    if image not in images:
        raise ValueError(
            f"{where}: image_id {image!r} is not among the ground truth's {_some(images)}: evaluate "
            "detections against the annotations of the images they were made on"
        )
    if category not in classes:
        raise ValueError(
            f"{where}: category_id {category!r} is not among the ground truth's {_some(classes)}: "
            "category ids are the data set's own, not positions 0 to K-1"
        )
    box = _numbers(entry["bbox"])
    if len(box) != 4 or not all(map(math.isfinite, box)) or min(box[2:]) < 0:
        raise ValueError(
            f"{where}: bbox {entry['bbox']} must be four finite numbers, x, y, width >= 0, height >= 0"
        )
    if scored and not math.isfinite(_numbers([entry["score"]])[0]):
        raise ValueError(f"{where}: score {entry['score']} must be a finite number")
    if not scored and not _numbers([entry.get("area", 0)])[0] >= 0:
        raise ValueError(f"{where}: area {entry['area']} must be a number >= 0")


def _numbers(values) -> list[float]:
    """As Python floats, in double precision whatever they were; NaN for what is no number."""
    if not isinstance(values, list | tuple | np.ndarray):
        return []
    return [float(v) if isinstance(v, numbers.Real) else math.nan for v in values]


def _some(ids: dict) -> str:
    shown = ", ".join(repr(i) for i in list(ids)[:5])
    return f"{len(ids)} ids ({shown}{', ...' if len(ids) > 5 else ''})"
