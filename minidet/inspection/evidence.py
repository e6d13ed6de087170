"""Whether boxes lie on the outlines in their pictures, or would if they were mirrored, exchanged, scaled or moved on.

Boxes that fit into their images can still be wrong; only the pixels tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from minidet.images import ImageError, open_image
from minidet.inspection.advice import finding
from minidet.inspection.findings import Finding
from minidet.inspection.raw import Raw

SIDE = 256  # pixels to which the longer side is shrunk: outlines stay, grain goes
LOOKED_AT = 100  # images
ENOUGH, CERTAIN = 10, 4.0
"""Images, and standard errors by which another reading must fit them better than the boxes as they are."""
MANY, NOTHING = 20, 1.0
"""Images over which boxes that fit better than other images' boxes by fewer standard errors than this fit nothing."""
MARGIN = 2  # pixels from the edge of the picture within which a side of a box says nothing
STRANGERS = "of an image far away"


def readings(boxes: np.ndarray, aspect: float) -> dict[str, np.ndarray]:
    """What the boxes of an image may have been meant as, by name.

    Shapes:
        boxes: (G, 4), x1, y1, x2, y2
    Units: fractions of the image; `aspect` is its height / width.
    """
    x1, y1, x2, y2 = boxes.T
    return {
        "as they are": boxes,
        "mirrored left to right": np.stack([1 - x2, y1, 1 - x1, y2], axis=1),
        "mirrored top to bottom": np.stack([x1, 1 - y2, x2, 1 - y1], axis=1),
        "turned by 180 degrees": np.stack([1 - x2, 1 - y2, 1 - x1, 1 - y1], axis=1),
        "with x and y exchanged": np.stack([y1 * aspect, x1 / aspect, y2 * aspect, x2 / aspect], axis=1),
        "divided by 2": boxes / 2,
        "multiplied by 2": boxes * 2,
    }


def edges(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much neighbours differ along x and along y, summed up along the other axis and divided by their mean.

    Shapes:
        image: (H, W, 3)
        returns: (h + 1, w - 1) and (w + 1, h - 1): the entry [n, m] sums n differences at position m
    """
    grey = Image.fromarray(image).convert("L")
    shrunk = [max(8, round(side * SIDE / max(grey.size))) for side in grey.size]
    levels = np.asarray(grey.resize(shrunk, Image.Resampling.BOX), np.float64)
    sums = []
    for one in (levels, levels.T):
        steps = np.abs(np.diff(one, axis=1))
        sums.append(np.pad(np.cumsum(steps, axis=0), ((1, 0), (0, 0))) / (steps.mean() + 1e-3))
    return sums[0], sums[1]


def outline_fit(sums: tuple[np.ndarray, np.ndarray], boxes: np.ndarray) -> float:
    """The mean difference along the sides of the boxes, 1 where they lie anywhere; NaN if all are at the edge.

    Shapes:
        boxes: (G, 4), x1, y1, x2, y2
    Units: fractions of the image.
    """
    total, count = 0.0, 0
    for axis, table in enumerate(sums):
        length, across = table.shape[1] + 1, table.shape[0] - 1
        ends = boxes[:, [1 - axis, 3 - axis]].clip(0, 1) * across
        begin = np.floor(ends[:, 0]).astype(int).clip(0, across - 1)
        end = np.maximum(np.ceil(ends[:, 1]).astype(int), begin + 1).clip(1, across)
        for side in (boxes[:, axis], boxes[:, axis + 2]):
            at = side * length
            inside = (at > MARGIN) & (at < length - MARGIN)
            # Half a pixel of rounding, and one of annotating: the best of three positions.
            near = (np.round(at).astype(int)[:, None] + [-2, -1, 0]).clip(0, length - 2)
            best = (table[end[:, None], near] - table[begin[:, None], near]).max(axis=1) / (end - begin)
            total, count = total + best[inside].sum(), count + inside.sum()
    return total / count if count else np.nan


def check_evidence(raw: Raw, folder: Path | None) -> Iterator[Finding]:
    """What the pictures say of a split's boxes, if they say it clearly."""
    rows = np.flatnonzero(raw.usable & ~raw.crowd)
    if folder is None or not len(rows):
        return
    rows = rows[np.argsort(raw.image_row[rows], kind="stable")]
    images, starts = np.unique(raw.image_row[rows], return_index=True)
    boxes = np.hstack([raw.bbox[rows, :2], raw.bbox[rows, :2] + raw.bbox[rows, 2:]]) / np.tile(raw.limits[rows], 2)
    owned = np.split(boxes, starts[1:])
    fits: dict[str, list[float]] = {}
    seen: list[int] = []
    for n in np.unique(np.linspace(0, len(images) - 1, LOOKED_AT).astype(int)).tolist():
        width, height = raw.sizes[images[n]]
        picture = _picture(folder / raw.names[images[n]], (int(height), int(width)))
        if picture is None:
            continue
        sums = edges(picture)
        seen.append(images[n])
        others = {
            "put on the image before": owned[(n + 1) % len(owned)],
            "put on the next image": owned[n - 1],
            STRANGERS: owned[(n + len(owned) // 2) % len(owned)],
        }
        for name, meant in (readings(owned[n], height / width) | others).items():
            fits.setdefault(name, []).append(outline_fit(sums, meant))
    usable = 1.1 * len(rows) > (~raw.crowd).sum()  # else most boxes are known to be wrong
    yield from _judged(raw, np.array(seen), {name: np.log(np.array(v) + 0.1) for name, v in fits.items()}, usable)


def _picture(path: Path, size: tuple[int, int]) -> np.ndarray | None:
    """The picture as training sees it; None where it cannot be read or has another size: others tell that."""
    try:
        for upright in (True, False):
            picture = open_image(path, upright=upright)
            if picture.shape[:2] == size:
                return picture
    except ImageError:
        return None
    return None


def _judged(raw: Raw, seen: np.ndarray, fits: dict[str, np.ndarray], usable: bool) -> Iterator[Finding]:
    def compared(name: str, other: str) -> tuple[float, np.ndarray]:
        """By how many standard errors one reading fits better than the other, and the images, the clearest first."""
        apart = fits[name] - fits[other]
        there = np.flatnonzero(np.isfinite(apart))
        errors = 0.0
        if len(there) > 1:
            errors = apart[there].mean() / (apart[there].std(ddof=1) / len(there) ** 0.5 + 1e-9)
        return errors, seen[there[np.argsort(-apart[there], kind="stable")]]

    if not fits:
        return
    likely = {name: compared(name, "as they are") for name in fits if name not in ("as they are", STRANGERS)}
    certain = [name for name, (errors, rows) in likely.items() if errors >= CERTAIN and len(rows) >= ENOUGH]
    if certain:
        name = max(certain, key=lambda one: np.nanmean(fits[one]))
        errors, rows = likely[name]
        yield finding("boxes-misread", rows, raw.image, file=raw.path, reading=name, errors=errors)
        return
    errors, rows = compared(STRANGERS, "as they are")
    if usable and len(rows) >= MANY and errors > -NOTHING:
        yield finding("boxes-fit-nothing", rows, raw.image, file=raw.path)
