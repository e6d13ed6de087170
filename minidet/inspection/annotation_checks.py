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
WHOLE = 0.98  # of both sides of an image, from which a box is all of it
MANY, SEVERAL = 20, 8  # boxes and images that say something about a file together
CORNER = 0.8  # part of the images' sides beyond which none of a file's boxes reaches
DOMINANT = 0.95  # part of the objects that are of one class
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
    yield from _places(raw)
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
    corners, order = _corners(raw, outside)
    outside &= ~corners
    columns = np.column_stack([raw.image_id, raw.category_id, raw.bbox])
    again, relabelled = _repeated(columns), _repeated(columns[:, [0, 2, 3, 4, 5]])
    whole = (sides >= WHOLE * sizes).all(axis=1)
    whole &= whole.sum() > count / 2
    words = {"of": count, "file": raw.path, "order": ", ".join(order), "write": _written(order)}
    words["cause"] = _other_reading(low[outside], sides[outside], sizes[outside], many=outside.sum() > 0.1 * count)
    for code, wrong in (
        ("boxes-normalised", normalised),
        ("boxes-are-corners", corners),
        ("boxes-negative", negative),
        ("boxes-outside", outside),
        ("boxes-empty", empty),
        ("boxes-twice", again),
        ("boxes-between-classes", relabelled & ~again & ~whole),
        ("boxes-of-whole-images", whole),
    ):
        if wrong.any():
            few = code == "boxes-empty" and wrong.sum() <= MOST_EMPTY * count
            yield finding(code, np.flatnonzero(wrong), raw.annotation, severity=NOTE if few else "", **words)


def _repeated(columns: np.ndarray) -> np.ndarray:
    """Which rows are there before, (G,) bool."""
    order, again = np.lexsort(columns.T), np.zeros(len(columns), bool)
    again[order[1:]] = np.all(columns[order[1:]] == columns[order[:-1]], axis=1)
    return again


def _corners(raw: Raw, outside: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Which boxes hold two corners: those outside that would fit, or all, where areas or fit tell it of the file.

    And in which order the four numbers then are.
    """
    low, sides = raw.bbox[:, :2], raw.bbox[:, 2:]
    limits, order = raw.limits, ("x1", "y1", "x2", "y2")
    fits = ((low < sides) & (sides <= limits + OVERHANG) & (low >= -OVERHANG)).all(axis=1)
    exchanged = ((low < sides) & (sides <= limits[:, ::-1] + OVERHANG) & (low >= -OVERHANG)).all(axis=1)
    if outside.any() and exchanged.all() and not fits.all():
        return exchanged, ("y1", "x1", "y2", "x2")
    meant, read = ((sides - low).prod(axis=1), sides.prod(axis=1))
    by_area = fits & (np.abs(raw.area - meant) <= 0.01 * raw.area) & (np.abs(raw.area - read) > 0.01 * raw.area)
    whole = (outside.any() and fits.all()) or by_area.sum() > 0.5 * len(low)
    if not whole and 2 * (outside & fits).sum() < outside.sum():  # chance: what put the others outside did it to these
        return np.zeros(len(low), bool), order
    return fits if whole else outside & fits, order


def _written(order: tuple[str, ...]) -> str:
    exchanged = "exchange x and y, and " if order[0] == "y1" else ""
    return f"{exchanged}write [x1, y1, x2 - x1, y2 - y1]"


def _other_reading(low: np.ndarray, sides: np.ndarray, sizes: np.ndarray, *, many: bool) -> str:
    """What else the four numbers of boxes outside may have been meant as; `many` if they are a good part of all."""
    if ((low - sides / 2 >= -OVERHANG) & (low + sides / 2 <= sizes + OVERHANG)).all():
        return "all of these fit as centre x, centre y, width, height: subtract half the sides from x and y"
    if ((low >= -OVERHANG) & (low + sides <= sizes[:, ::-1] + OVERHANG)).all():
        return "all of these fit with x and y exchanged, or the images' width and height"
    if many and (low >= -OVERHANG).all() and np.isfinite(sizes).all():
        most, reach = (low + sides).max(axis=0), ((low + sides) / sizes).max(axis=0)
        if 950 < most.max() <= 1005:
            return "they lie in 0..1000: thousandths of the image? Divide by 1000 and multiply by the image's sides"
        return f"they are of images at least {reach[0]:.3g} times as wide and {reach[1]:.3g} times as high as these"
    return "the image was resized or cropped after it was annotated, or the box belongs to another image"


def _places(raw: Raw) -> Iterator[Finding]:
    """What all boxes of a file together say: that they are of other images, or their areas of other boxes."""
    rows = np.flatnonzero(raw.usable & ~raw.crowd & ~(raw.bbox <= 1).all(axis=1))
    if len(rows) < MANY or len(np.unique(raw.image_row[rows])) < SEVERAL:
        return
    low, high = raw.bbox[rows, :2], raw.bbox[rows, :2] + raw.bbox[rows, 2:]
    first, last = (low / raw.limits[rows]).min(axis=0), (high / raw.limits[rows]).max(axis=0)
    if (last < CORNER).all() and (first < 0.15 * last).all():
        cause = f"they were drawn on images up to {1 / last[0]:.3g} times smaller across and {1 / last[1]:.3g} down"
        if 97 < high.max() <= 100.5:
            cause += ", or in 0..100: per cent of the image"
        yield finding("boxes-in-a-corner", len(rows), file=raw.path, wide=last[0], high=last[1], cause=cause)
    area, sides = raw.area[rows], raw.bbox[rows, 2:]
    ratio = area / sides.prod(axis=1)  # NaN, of which nothing is true, where the file gives no area
    wrong = (area > 1.05 * (sides + 2).prod(axis=1)) | (ratio < 0.005)
    cause = "areas were written as 0 or as parts of the image, or boxes were changed without them"
    usual = np.median(ratio)
    if np.abs(usual - 1) > 0.1 and (np.abs(ratio - usual) < 0.01 * usual).mean() > 0.9:
        wrong, cause = np.abs(ratio - 1) > 0.05, f"boxes were resized without them: areas are {usual:.3g} x the boxes'"
    if wrong.mean() > 0.05:
        yield finding("areas-differ", rows[wrong], raw.annotation, of=len(raw.ids), file=raw.path, cause=cause)


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
    share = counts.max(initial=0) / max(1, counts.sum())
    if len(counts) > 1 and counts.sum() >= MANY and share >= DOMINANT:
        name = raw.categories[int(counts.argmax())][1]
        yield finding("class-dominates", int(counts.max()), file=raw.path, share=share, name=name, of=len(counts))


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
