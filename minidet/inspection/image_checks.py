"""What can be wrong with picture files: missing, broken, rotated, resized, or in two splits at once."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from minidet.images import FORMATS
from minidet.inspection.findings import MUST_FIX, NOTE, WARNING, Finding, places
from minidet.inspection.raw import Raw

ORIENTATION = 0x0112  # EXIF's tag; 5 to 8 exchange width and height, 2 to 4 do not
LEAKED = 0.01  # part of a split's images from which its numbers cannot be believed
QUICK = 300  # images opened of each split with `quick`


@dataclass(frozen=True)
class Look:
    """What a picture file turned out to be."""

    row: int
    size: tuple[int, int] = (0, 0)
    """Width and height as stored."""
    mode: str = ""
    orientation: int = 1
    problem: str = ""


def image_folder(raw: Raw, candidates: Sequence[Path]) -> Path | None:
    """The candidate that holds most of the images."""
    there = {place: sum(os.path.isfile(place / name) for name in raw.names) for place in candidates if place.is_dir()}
    return max(there, key=there.get, default=None)


def check_images(raw: Raw, folder: Path | None, *, quick: bool, progress: bool) -> Iterator[Finding]:
    """The findings of one split's pictures; each file is opened and decoded, with `quick` a few hundred of them."""
    there = [row for row, name in enumerate(raw.names) if folder is not None and os.path.isfile(folder / name)]
    gone = np.setdiff1d(np.arange(len(raw.names)), there)
    if len(gone):
        yield Finding(
            MUST_FIX, "images-missing", f"{len(gone)} of {len(raw.names)} images of {raw.path} are not in {folder}",
            "files were moved or renamed, or the download is not complete",
            "put them back, or remove their entries and annotations from the json", places(gone, raw.image), len(gone),
        )  # fmt: skip
    rows = there if not quick else [there[n] for n in np.unique(np.linspace(0, len(there) - 1, QUICK).astype(int))]
    groups: dict[str, list[Look]] = defaultdict(list)
    for look in _looks(raw, folder, rows if there else [], progress):
        groups[_judged(look, tuple(map(int, raw.sizes[look.row])))].append(look)
    for code, (severity, what, cause, fix) in JUDGED.items():
        if found := groups.get(code):
            problems = [f"{raw.image(look.row)}: {look.problem or _seen(look)}" for look in found[:3]]
            yield Finding(
                severity, code, f"{len(found)} of {len(rows)} images opened of {raw.path} {what}", cause, fix,
                tuple(problems), len(found),
            )  # fmt: skip


JUDGED = {
    "images-unreadable": (
        MUST_FIX, "cannot be read", "the file is truncated or damaged, or no picture",
        "copy it again from its source, or remove its entry and annotations from the json",
    ),
    "image-size-exchanged": (
        MUST_FIX, "have width and height exchanged in the json",
        "the json was written as height x width, or the picture was rotated after it was annotated",
        "exchange width and height in the json and look whether the boxes fit; else rotate the picture back",
    ),
    "image-size-differs": (
        MUST_FIX, "have another size than the json says", "they were resized or cropped after they were annotated",
        "restore the original files, or multiply boxes, width and height by new size / old size",
    ),
    "exif-ignored": (
        WARNING, "are turned by their EXIF orientation, but annotated as if they were not",
        "the annotation tool ignored EXIF",
        "nothing for minidet, which uses them as annotated; for every other tool rewrite them without EXIF",
    ),
    "exif-ambiguous": (
        WARNING, "have an EXIF orientation that does not show in their size",
        "turned by 180 degrees, mirrored, or square: nobody can tell whether the boxes are of the turned image",
        "look at some with their boxes; rewrite the files upright and without EXIF. minidet turns them upright",
    ),
    "exif-upright": (
        NOTE, "are stored turned and annotated upright", "a camera held upright",
        "nothing: minidet turns them; a tool that ignores EXIF would not",
    ),
    "image-modes": (
        NOTE, "are not RGB", "grey, palette, transparent or 16-bit pictures",
        "nothing: they become RGB, on white, the upper 8 of 16 bits",
    ),
}  # fmt: skip


def _looks(raw: Raw, folder: Path, rows: Sequence[int], progress: bool) -> Iterator[Look]:
    def look(row: int) -> Look:
        return _look(folder / raw.names[row], row)

    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(rows), desc="opening images", unit=" images", disable=not progress, leave=False) as bar,
    ):
        for start in range(0, len(rows), 256):  # `map` takes all its arguments at once
            for found in pool.map(look, rows[start : start + 256]):
                yield found
                bar.update()


def _look(path: Path, row: int) -> Look:
    try:
        with Image.open(path, formats=FORMATS) as image:
            look = Look(row, image.size, image.mode, image.getexif().get(ORIENTATION, 1))
            image.load()  # decodes every pixel: a truncated file shows only here
            return look
    except Exception as error:  # decoders raise whatever their parsers do
        return Look(row, problem=f"{type(error).__name__}: {error}")


def _judged(look: Look, stated: tuple[int, int]) -> str:
    """Which of JUDGED a picture is, or nothing."""
    turned = look.orientation in (5, 6, 7, 8)
    if look.problem:
        return "images-unreadable"
    upright = look.size[::-1] if turned else look.size
    if stated == upright:
        if turned and stated != look.size:
            return "exif-upright"
        return "exif-ambiguous" if look.orientation in range(2, 9) else "image-modes" if look.mode != "RGB" else ""
    if stated == look.size:
        return "exif-ignored"
    return "image-size-exchanged" if stated == look.size[::-1] else "image-size-differs"


def _seen(look: Look) -> str:
    turned = f", EXIF orientation {look.orientation}" if look.orientation != 1 else ""
    return f"the file is {look.size[0]} x {look.size[1]}, {look.mode}{turned}"


def check_copies(splits: Sequence[tuple[Raw, Path | None]]) -> Iterator[Finding]:
    """Files of equal bytes, within a split and across: only files of equal length are ever read."""
    by_length: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for n, (raw, folder) in enumerate(splits):
        for row, name in enumerate(raw.names if folder is not None else ()):
            if os.path.isfile(folder / name):
                by_length[os.stat(folder / name).st_size].append((n, row))
    by_content: dict[bytes, list[tuple[int, int]]] = defaultdict(list)
    for members in by_length.values():
        for n, row in members if len(members) > 1 else ():
            raw, folder = splits[n]
            with open(folder / raw.names[row], "rb") as file:
                by_content[hashlib.file_digest(file, "sha1").digest()].append((n, row))
    inside, across = [], []
    for members in by_content.values():
        first, *others = members
        (across if len({n for n, _ in members}) > 1 else inside).extend((first, other) for other in others)

    def pair(one: tuple[int, int], other: tuple[int, int]) -> str:
        return " = ".join(f"{splits[n][0].path}: {splits[n][0].image(row)}" for n, row in (one, other))

    if across:
        smallest = min(len(raw.names) for raw, _ in splits)
        yield Finding(
            MUST_FIX if len(across) > LEAKED * smallest else WARNING, "images-in-two-splits",
            f"{len(across)} images are in more than one split, byte for byte",
            "the split was drawn from a folder that held copies, or over annotations instead of images",
            "remove them from one of the splits: validation would measure what was learned by heart",
            tuple(pair(*both) for both in across[:3]), len(across),
        )  # fmt: skip
    if inside:
        yield Finding(
            WARNING, "images-twice", f"{len(inside)} images are copies of another one of their split, byte for byte",
            "video frames that stand still, or a folder merged twice",
            "keep one of each, with the boxes of all", tuple(pair(*both) for both in inside[:3]), len(inside),
        )  # fmt: skip
