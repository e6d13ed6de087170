"""What can be wrong in a COCO json: its structure, ids, boxes and classes."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from minidet.data.refusal import DataError, safe_name
from minidet.inspection.advice import finding
from minidet.inspection.findings import MUST_FIX, NOTE, WARNING, Finding
from minidet.inspection.raw import OVERHANG, Raw

FEW = 10  # objects from which a class may be learned at all
MOST_EMPTY = 1e-4  # part of the boxes that the reader lets have no area, and leaves out


def check_annotations(raw: Raw, *, learned: bool) -> Iterator[Finding]:
    """The findings of one file by itself; `learned` if it is what is trained on."""
    if raw.missing_lists:
        yield finding("lists-missing", file=raw.path, names=", ".join(raw.missing_lists))
    for problem, where in raw.broken.items():
        yield finding("entries-malformed", where, lambda place: place, file=raw.path, problem=problem)
    unsafe = [row for row, name in enumerate(raw.names) if _leaves(name)]
    if unsafe:
        yield finding("file-name-unsafe", unsafe, raw.image, file=raw.path)
    yield from _ids(raw)
    yield from _boxes(raw)
    yield from _objects(raw, learned)


def _leaves(name: str) -> bool:
    try:
        safe_name(Path(), "", name)
    except DataError:
        return True
    return False


def _ids(raw: Raw) -> Iterator[Finding]:
    numbers, names = np.array([n for n, _ in raw.categories], np.int64), [name for _, name in raw.categories]
    for code, values, describe in (
        ("image-id-twice", raw.image_ids, raw.image),
        ("file-name-twice", raw.names, raw.image),
        ("annotation-id-twice", raw.ids, raw.annotation),
        ("category-id-twice", numbers, lambda row: raw.categories[row]),
        ("category-name-twice", names, lambda row: raw.categories[row]),
    ):
        again = np.setdiff1d(np.arange(len(values)), np.unique(values, return_index=True)[1])
        if len(again):
            yield finding(code, again, describe, file=raw.path)
    for code, what, ids, rows, known in (
        ("image-id-unknown", "image_id", raw.image_id, raw.image_row, raw.image_ids),
        ("category-id-unknown", "category_id", raw.category_id, raw.category_row, numbers),
    ):
        lost = np.flatnonzero(rows < 0)
        if len(lost):
            cause, fix = _shifted(np.unique(ids), np.sort(known), what)
            yield finding(code, lost, raw.annotation, of=len(ids), file=raw.path, cause=cause, fix=fix)
    if len(numbers) and sorted(numbers) != list(range(1, len(numbers) + 1)):
        yield finding("category-ids-sparse", len(numbers), file=raw.path, first=min(numbers), last=max(numbers))


def _shifted(used: np.ndarray, known: np.ndarray, what: str) -> tuple[str, str]:
    """Why ids may be unknown, and what to do."""
    for step, cure in ((1, "add 1 to"), (-1, "subtract 1 from")):
        if len(known) and np.isin(used + step, known).all():
            return f"{what} counts from {used[0]} where the entries count from {known[0]}", f"{cure} every {what}"
    listed = ", ".join(map(str, known[:6])) + (", ..." if len(known) > 6 else "")
    return (
        f"entries were removed, or this is the json of another split; the ids are {listed or 'none'}",
        f"remove these annotations, or restore the entries that {what} means",
    )


def _boxes(raw: Raw) -> Iterator[Finding]:
    low, sides, sizes, count = raw.bbox[:, :2], raw.bbox[:, 2:], raw.limits, len(raw.bbox)
    high = low + sides
    normalised = ((raw.bbox >= 0) & (raw.bbox <= 1)).all(axis=1) & ((sides > 0) & (sizes > 2)).all(axis=1)
    normalised &= (raw.bbox % 1 > 0).any(axis=1)
    negative, empty = (sides < 0).any(axis=1), (sides == 0).any(axis=1)
    outside = ((low < -OVERHANG) | (high > sizes + OVERHANG) | (high <= 0) | (low >= sizes)).any(axis=1)
    outside &= ~(normalised | negative)
    corners = _corners(raw, outside)
    outside &= ~corners
    again = np.zeros(count, bool)
    columns = np.column_stack([raw.image_id, raw.category_id, raw.bbox])
    order = np.lexsort(columns.T)
    again[order[1:]] = np.all(columns[order[1:]] == columns[order[:-1]], axis=1)
    words = {"of": count, "file": raw.path, "cause": _other_reading(low[outside], sides[outside], sizes[outside])}
    for code, wrong in (
        ("boxes-normalised", normalised),
        ("boxes-are-corners", corners),
        ("boxes-negative", negative),
        ("boxes-outside", outside),
        ("boxes-empty", empty),
        ("boxes-twice", again),
    ):
        if wrong.any():
            few = code == "boxes-empty" and wrong.sum() <= MOST_EMPTY * count
            yield finding(code, np.flatnonzero(wrong), raw.annotation, severity=NOTE if few else "", **words)


def _corners(raw: Raw, outside: np.ndarray) -> np.ndarray:
    """Which boxes hold x1, y1, x2, y2: those outside that would fit, or all, where areas or fit tell it of the file."""
    low, sides = raw.bbox[:, :2], raw.bbox[:, 2:]
    fits = ((low < sides) & (sides <= raw.limits + OVERHANG) & (low >= -OVERHANG)).all(axis=1)
    meant, read = ((sides - low).prod(axis=1), sides.prod(axis=1))
    by_area = fits & (np.abs(raw.area - meant) <= 0.01 * raw.area) & (np.abs(raw.area - read) > 0.01 * raw.area)
    whole = (outside.any() and fits.all()) or by_area.sum() > 0.5 * len(low)
    return fits if whole else outside & fits


def _other_reading(low: np.ndarray, sides: np.ndarray, sizes: np.ndarray) -> str:
    """What else the four numbers of boxes outside may have been meant as."""
    if ((low - sides / 2 >= -OVERHANG) & (low + sides / 2 <= sizes + OVERHANG)).all():
        return "all of these fit as centre x, centre y, width, height: subtract half the sides from x and y"
    if (low + sides <= sizes[:, ::-1] + OVERHANG).all():
        return "all of these fit with x and y exchanged, or the images' width and height"
    return "the image was resized or cropped after it was annotated, or the box belongs to another image"


def _objects(raw: Raw, learned: bool) -> Iterator[Finding]:
    objects, images = ~raw.crowd & (raw.bbox[:, 2:] > 0).all(axis=1), len(raw.names)
    if not objects.any():
        yield finding("nothing-to-learn", images, file=raw.path, crowds=int(raw.crowd.sum()))
        return
    empty = images - len(np.unique(raw.image_row[objects & (raw.image_row >= 0)]))
    if empty:
        severity = WARNING if empty > images / 2 else NOTE
        yield finding("images-without-objects", empty, file=raw.path, of=images, severity=severity)
    counts = np.bincount(raw.category_row[objects & (raw.category_row >= 0)], minlength=len(raw.categories))
    for code, rows in (
        ("class-without-objects", np.flatnonzero(counts == 0)),
        ("class-with-few-objects", np.flatnonzero((counts > 0) & (counts < FEW))),
    ):
        if learned and len(rows):
            yield finding(code, rows, lambda row: raw.categories[row][1], file=raw.path, of=len(counts), few=FEW)


Classes = Sequence[tuple[int, str]]


def check_classes(name: str, classes: Classes, other: str, others: Classes, *, renewed: bool) -> Iterator[Finding]:
    """Whether two lists of (id, class), of splits or of a split and a checkpoint, give every label the same meaning.

    With `renewed` it is no mistake if they do not: the class output of a checkpoint then starts anew.
    """
    ours, theirs = ([label for _, label in sorted(dict(pairs).items())] for pairs in (classes, others))
    if ours == theirs:
        return
    severity, anew = WARNING if renewed else MUST_FIX, "; else the class output starts anew, but for --copy-classes"
    if sorted(ours) == sorted(theirs):
        moved = [n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
        order = ", ".join(theirs[:8]) + (", ..." if len(theirs) > 8 else "")
        yield finding(
            "classes-reordered", moved, lambda n: f"label {n} is {ours[n]!r} in {name}, {theirs[n]!r} in {other}",
            severity=severity, file=name, other=other, order=order + (anew if renewed else ""),
        )  # fmt: skip
        return
    only, missing = [label for label in ours if label not in theirs], [b for b in theirs if b not in ours]
    similar = [(a, b) for a in only for b in difflib.get_close_matches(a, missing, 1, 0.6)]
    renamed = "; ".join(f"{a!r} may be {b!r}, renamed" for a, b in similar[:3])
    yield finding(
        "classes-differ", [f"only in {name}: {a}" for a in only] + [f"only in {other}: {b}" for b in missing], str,
        severity=severity, file=name, other=other,
        cause=renamed or "one of them was exported with another list of classes",
        fix=f"list the same categories, with the same names and ids, in both{anew if renewed else ''}",
    )  # fmt: skip
