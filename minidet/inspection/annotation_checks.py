"""What can be wrong in a COCO json: ids, boxes, classes; each mistake with its likely cause and its cure."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from minidet.data.refusal import DataError, safe_name
from minidet.inspection.findings import MUST_FIX, NOTE, WARNING, Finding, places
from minidet.inspection.raw import Raw

FEW = 10  # objects from which a class may be learned at all
OVERHANG = 2.0  # pixels by which the reader lets boxes stick out, and clips them
MOST_EMPTY = 1e-4  # part of the boxes that the reader lets have no area, and leaves out


def check_annotations(raw: Raw, *, learned: bool) -> Iterator[Finding]:
    """The findings of one file by itself; `learned` if it is what is trained on."""
    yield from _structure(raw)
    yield from _ids(raw)
    yield from _boxes(raw)
    yield from _objects(raw)
    if learned:
        yield from _rare_classes(raw)


def _structure(raw: Raw) -> Iterator[Finding]:
    if raw.missing_lists:
        yield Finding(
            MUST_FIX, "lists-missing", f"{raw.path} has no list called {', '.join(raw.missing_lists)}",
            "this is not an instances_*.json file, but captions, detections or another tool's format",
            "export the data set as COCO json: an object with images, annotations and categories",
        )  # fmt: skip
    for problem, where in raw.broken.items():
        yield Finding(
            MUST_FIX, "entries-malformed", f"{len(where)} entries of {raw.path} cannot be used: {problem}",
            "a converter that wrote numbers as text, or left a field out",
            "write the field as COCO does, or remove these entries",
            tuple(filter(None, where)), len(where),
        )  # fmt: skip
    unsafe = [row for row, name in enumerate(raw.names) if _leaves(name)]
    if unsafe:
        yield Finding(
            MUST_FIX, "file-name-unsafe", f"{len(unsafe)} file names of {raw.path} lead out of the image folder",
            "the json was written with the paths of another machine",
            "make every file_name a path below the image folder, without / at its beginning and without ..",
            places(unsafe, raw.image), len(unsafe),
        )  # fmt: skip


def _leaves(name: str) -> bool:
    try:
        safe_name(Path(), "", name)
    except DataError:
        return True
    return False


def _ids(raw: Raw) -> Iterator[Finding]:
    merged = "two exports were put together without numbering their entries anew"
    for code, what, values, describe, fix in (
        ("image-id-twice", "image ids", raw.image_ids, raw.image, "number the images, and image_id of their boxes"),
        ("file-name-twice", "file names", raw.names, raw.image, "keep one entry an image, and move its boxes to it"),
        ("annotation-id-twice", "annotation ids", raw.ids, raw.annotation, "number the annotations 1, 2, 3, ..."),
        ("category-id-twice", "category ids", [c[0] for c in raw.categories], lambda n: raw.categories[n],
         "give every class an id of its own, and the annotations with it"),
        ("category-name-twice", "class names", [c[1] for c in raw.categories], lambda n: raw.categories[n],
         "one entry a class: merge the ids of equal names"),
    ):  # fmt: skip
        again = repeated(values)
        if len(again):
            yield Finding(
                WARNING if code == "file-name-twice" else MUST_FIX, code,
                f"{len(again)} {what} of {raw.path} are there before", merged, fix,
                tuple(str(place) for place in places(again, describe)), len(again),
            )  # fmt: skip
    for code, what, ids, rows, known in (
        ("image-id-unknown", "image_id", raw.image_id, raw.image_row, raw.image_ids),
        ("category-id-unknown", "category_id", raw.category_id, raw.category_row, [c[0] for c in raw.categories]),
    ):
        lost = np.flatnonzero(rows < 0)
        if len(lost):
            cause, fix = _shifted(np.unique(ids), known, what)
            yield Finding(
                MUST_FIX, code, f"{len(lost)} of {len(ids)} annotations have a {what} that no entry has",
                cause, fix, places(lost, raw.annotation), len(lost),
            )  # fmt: skip
    numbers = sorted({number for number, _ in raw.categories})
    if numbers and numbers != list(range(1, len(numbers) + 1)):
        yield Finding(
            NOTE, "category-ids-sparse",
            f"{len(numbers)} category ids from {numbers[0]} to {numbers[-1]}, not 1 to {len(numbers)}",
            "COCO's own have gaps too", "nothing: minidet counts classes 0, 1, 2 in the order of their ids",
        )  # fmt: skip


def repeated(values: Sequence) -> np.ndarray:
    """Rows whose value stands in an earlier row."""
    _, first = np.unique(np.asarray(values), return_index=True)
    again = np.ones(len(values), bool)
    again[first] = False
    return np.flatnonzero(again)


def _shifted(used: np.ndarray, known: Sequence[int], what: str) -> tuple[str, str]:
    """Why ids may be unknown, and what to do."""
    for step in (1, -1):
        if known and np.isin(used + step, known).all():
            return (
                f"{what} counts from {used.min()} where the entries count from {min(known)}",
                f"{'add 1 to' if step == 1 else 'subtract 1 from'} every {what}",
            )
    listed = ", ".join(map(str, sorted(known)[:6])) + (", ..." if len(known) > 6 else "")
    return (
        f"entries were removed, or this is the json of another split; the ids are {listed or 'none'}",
        f"remove these annotations, or restore the entries that {what} means",
    )


def _boxes(raw: Raw) -> Iterator[Finding]:
    if not len(raw.bbox):
        return
    known = raw.image_row >= 0
    sizes = np.where(known[:, None], raw.sizes[raw.image_row] if len(raw.sizes) else 0, np.inf)
    low, sides = raw.bbox[:, :2], raw.bbox[:, 2:]
    high, count = low + sides, len(low)
    unit = (raw.bbox >= 0).all(axis=1) & (raw.bbox <= 1).all(axis=1) & (sides > 0).all(axis=1) & (sizes > 2).all(axis=1)
    unit &= (raw.bbox % 1 > 0).any(axis=1)
    negative, empty = (sides < 0).any(axis=1), (sides == 0).any(axis=1)
    beyond = np.maximum(-low, high - sizes).max(axis=1)
    outside = ~unit & ~negative & ((beyond > OVERHANG) | (known & ((high <= 0) | (low >= sizes)).any(axis=1)))
    corners = _corners(raw, low, sides, sizes, outside)
    outside &= ~corners
    for code, rows, what, cause, fix in (
        ("boxes-normalised", unit, "lie in 0..1", "they are fractions of the image, as YOLO writes them",
         "multiply x and width by the image's width, y and height by its height; YOLO's x, y are centres besides"),
        ("boxes-are-corners", corners, "fit their image as x1, y1, x2, y2, not as x, y, width, height",
         "corners were written where COCO has a corner and two sides",
         "write [x1, y1, x2 - x1, y2 - y1]"),
        ("boxes-negative", negative, "have a negative width or height",
         "the box was drawn from right to left or upwards, or corners were exchanged",
         "where width < 0: x += width, width = -width; the same with y and height"),
        ("boxes-outside", outside, f"reach more than {OVERHANG:g} px out of their image",
         _reading(low, sides, sizes, outside), "correct the boxes, or the image's width and height in the json"),
    ):  # fmt: skip
        if rows.any():
            found = np.flatnonzero(rows)
            yield Finding(
                MUST_FIX, code, f"{len(found)} of {count} boxes of {raw.path} {what}", cause, fix,
                places(found, raw.annotation), len(found),
            )  # fmt: skip
    if empty.any():
        found = np.flatnonzero(empty)
        yield Finding(
            MUST_FIX if len(found) > MOST_EMPTY * count else NOTE, "boxes-empty",
            f"{len(found)} of {count} boxes of {raw.path} have no area",
            "a click without a drag while annotating, or rounding of very small boxes",
            "remove these annotations", places(found, raw.annotation), len(found),
        )  # fmt: skip
    clipped = (beyond > 0.01) & (beyond <= OVERHANG) & ~empty & ~negative
    if clipped.any():
        yield Finding(
            NOTE, "boxes-clipped", f"{clipped.sum()} of {count} boxes stick out of their image, by up to 2 px",
            "rounding", "nothing: they are clipped", (), int(clipped.sum()),
        )  # fmt: skip
    again = repeated_rows(np.column_stack([raw.image_id, raw.category_id, raw.bbox]))
    if len(again):
        yield Finding(
            WARNING, "boxes-twice", f"{len(again)} of {count} boxes of {raw.path} repeat one of their image and class",
            "annotations were merged or saved twice",
            "remove the copies: each counts as an object of its own in AP", places(again, raw.annotation), len(again),
        )  # fmt: skip


def repeated_rows(rows: np.ndarray) -> np.ndarray:
    """Positions of the rows (G, M) that equal an earlier one."""
    order = np.lexsort(rows.T)
    same = np.all(rows[order[1:]] == rows[order[:-1]], axis=1)
    return np.sort(order[1:][same])


def _corners(raw: Raw, low, sides, sizes, outside) -> np.ndarray:
    """Which boxes hold x1, y1, x2, y2: those outside that would fit, or all, where areas or fit tell it of the file."""
    fits = (low < sides).all(axis=1) & (sides <= sizes + OVERHANG).all(axis=1) & (low >= -OVERHANG).all(axis=1)
    stated = raw.area > 0
    with np.errstate(invalid="ignore"):
        as_corners = np.abs(raw.area - (sides - low).prod(axis=1)) <= 0.01 * raw.area
        as_sides = np.abs(raw.area - sides.prod(axis=1)) <= 0.01 * raw.area
    by_area = fits & stated & as_corners & ~as_sides
    if (outside.any() and fits.all()) or by_area.sum() > 0.5 * len(low):
        return fits
    return outside & fits


def _reading(low, sides, sizes, outside) -> str:
    """What else the four numbers of the boxes outside may have been meant as."""
    low, sides, limits = low[outside], sides[outside], sizes[outside] + OVERHANG
    if len(low) and ((low - sides / 2 >= -OVERHANG) & (low + sides / 2 <= limits)).all():
        return "all of these fit as centre x, centre y, width, height: subtract half the sides from x and y"
    if len(low) and (low + sides <= limits[:, ::-1]).all():
        return "all of these fit with x and y exchanged, or the images' width and height"
    return "the image was resized or cropped after it was annotated, or the box belongs to another image"


def _objects(raw: Raw) -> Iterator[Finding]:
    objects = ~raw.crowd & (raw.bbox[:, 2:] > 0).all(axis=1)
    if not objects.any():
        crowds = f", {raw.crowd.sum()} crowds" if raw.crowd.any() else ""
        yield Finding(
            MUST_FIX, "nothing-to-learn", f"{raw.path}: {len(raw.names)} images without a single object{crowds}",
            "every annotation is a crowd (iscrowd 1)" if crowds else "the annotations are of another file or got lost",
            "set iscrowd to 0 where a box holds one object" if crowds else "export the boxes again",
            count=len(raw.names),
        )  # fmt: skip
        return
    empty = len(raw.names) - len(np.unique(raw.image_row[objects & (raw.image_row >= 0)]))
    if empty:
        yield Finding(
            WARNING if empty > 0.5 * len(raw.names) else NOTE, "images-without-objects",
            f"{empty} of {len(raw.names)} images of {raw.path} have no object",
            "there are none, or these images were not annotated",
            "nothing, if there are none: they teach what background is; else annotate or remove them", count=empty,
        )  # fmt: skip


def _rare_classes(raw: Raw) -> Iterator[Finding]:
    objects = ~raw.crowd & (raw.category_row >= 0)
    counts = np.bincount(raw.category_row[objects], minlength=len(raw.categories))
    for code, rows, what in (
        ("class-without-objects", counts == 0, "have no object"),
        ("class-with-few-objects", (counts > 0) & (counts < FEW), f"have fewer than {FEW} objects"),
    ):
        if rows.any():
            names = tuple(raw.categories[row][1] for row in np.flatnonzero(rows)[:10])
            yield Finding(
                WARNING if code == "class-without-objects" else NOTE, code,
                f"{rows.sum()} of {len(counts)} classes of {raw.path} {what}",
                "a split that was cut too thin, or a class list taken from elsewhere",
                "add images of these classes, or remove the classes; what is not shown is not learned",
                names, int(rows.sum()),
            )  # fmt: skip


def check_classes(
    name: str, categories: Sequence[tuple[int, str]], other: str, others: Sequence[tuple[int, str]], *,
    renewed: bool = False,
) -> Iterator[Finding]:  # fmt: skip
    """Whether two lists of (id, class), of splits or of a split and a checkpoint, give every label the same meaning.

    With `renewed` other classes are no mistake: the class output of a checkpoint then starts anew.
    """
    classes, known = ([label for _, label in sorted(dict(pairs).items())] for pairs in (categories, others))
    if classes == known:
        return
    if sorted(classes) == sorted(known):
        moved = [n for n, pair in enumerate(zip(classes, known, strict=True)) if pair[0] != pair[1]]
        yield Finding(
            MUST_FIX, "classes-reordered", f"{name} and {other} have the same classes in another order",
            "ids were given anew by each export, in the order in which classes turned up",
            f"give the categories of {name} ids in the order {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}",
            tuple(f"label {n} is {classes[n]!r} in {name}, {known[n]!r} in {other}" for n in moved[:3]), len(moved),
        )  # fmt: skip
        return
    only, missing = ([label for label in a if label not in b] for a, b in ((classes, known), (known, classes)))
    similar = [(a, b) for a in only for b in difflib.get_close_matches(a, missing, 1, 0.6)]
    renamed = "; ".join(f"{a!r} may be {b!r}, renamed" for a, b in similar[:3])
    yield Finding(
        WARNING if renewed else MUST_FIX, "classes-differ", f"{name} and {other} do not have the same classes",
        renamed or "one of them was exported with another list of classes",
        "nothing, if it is meant: the class output starts anew" if renewed
        else "list the same categories, with the same names and ids, in both",
        tuple(
            f"only in {place}: {', '.join(labels[:6])}{', ...' if len(labels) > 6 else ''}"
            for place, labels in ((name, only), (other, missing)) if labels
        ), len(only) + len(missing),
    )  # fmt: skip
