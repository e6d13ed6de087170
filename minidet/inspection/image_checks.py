"""What can be wrong with picture files: missing, broken, rotated, resized, or in two splits at once."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PureWindowsPath

import numpy as np
from PIL import Image
from tqdm import tqdm

from minidet.images import FORMATS
from minidet.inspection.advice import finding
from minidet.inspection.findings import WARNING, Finding
from minidet.inspection.raw import Raw

ORIENTATION = 0x0112  # EXIF's tag; 5 to 8 exchange width and height, 2 to 4 do not
LEAKED = 0.01  # part of a split's images from which its numbers cannot be believed
MOST_FILES = 100_000  # looked through for one that was renamed
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
    bomb: bool = False
    """More pixels than PIL decodes."""
    blank: bool = False


def image_folder(raw: Raw, candidates: Sequence[Path]) -> Path | None:
    """The candidate that holds most of the images."""
    there = {place: sum(os.path.isfile(place / name) for name in raw.names) for place in candidates if place.is_dir()}
    return max(there, key=there.get, default=None)


def check_images(raw: Raw, folder: Path | None, *, quick: bool, progress: bool) -> Iterator[Finding]:
    """The findings of one split's pictures; each file is opened and decoded, with `quick` a few hundred of them."""
    there = [row for row, name in enumerate(raw.names) if folder is not None and os.path.isfile(folder / name)]
    gone = np.setdiff1d(np.arange(len(raw.names)), there)
    if len(gone):
        cause, cure = _renamed(raw.names[gone[0]], folder)
        words = {"folder": folder or "any image folder", "cause": cause, "cure": cure}
        yield finding("images-missing", gone, raw.image, of=len(raw.names), file=raw.path, **words)
    rows = there[:: max(1, len(there) // QUICK)] if quick else there
    groups: dict[str, list[Look]] = defaultdict(list)
    for look in _looks(raw, folder, rows, progress):
        groups[_judged(look, tuple(map(int, raw.sizes[look.row])))].append(look)
    for code in filter(None, groups):
        yield finding(
            code, groups[code], lambda look: f"{raw.image(look.row)}: {look.problem or _seen(look)}",
            of=len(rows), file=raw.path,
        )  # fmt: skip


def _renamed(name: str, folder: Path | None) -> tuple[str, str]:
    """Why a file may not be found: the same name lies there but for its folder, suffix, case or Unicode form."""

    def plain(text: str) -> str:
        return unicodedata.normalize("NFC", PureWindowsPath(text).stem).casefold()  # takes both kinds of slashes

    files = (path.relative_to(folder) for path in folder.rglob("*")) if folder is not None else ()
    alike = next((str(path) for path in islice(files, MOST_FILES) if plain(path.name) == plain(name)), None)
    if alike is None or alike == name:
        return "files were moved or renamed, or the download is not complete", ""
    return f"{alike!a} is there: the json calls it {name!a}", "write the files' own names into the json, or else "


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
            return replace(look, blank=_blank(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return Look(row, problem=str(error), bomb=True)
    except Exception as error:  # decoders raise whatever their parsers do
        return Look(row, problem=f"{type(error).__name__}: {error}")


def _blank(image: Image.Image) -> bool:
    """Whether every pixel has the same colour, of 16 bits the upper 8."""
    if image.mode == "P" or image.has_transparency_data:
        image = image.convert("RGBA")
    ranges = image.getextrema()
    ranges = ranges if isinstance(ranges[0], tuple) else (ranges,)
    shift = 8 if image.mode.startswith("I") else 0
    return all(int(low) >> shift == int(high) >> shift for low, high in ranges)


def _judged(look: Look, stated: tuple[int, int]) -> str:
    """The code of what is wrong with a picture, or nothing."""
    turned = look.orientation in (5, 6, 7, 8)
    if look.problem:
        return "images-too-large" if look.bomb else "images-unreadable"
    if look.blank:
        return "images-blank"
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

    smallest = min((len(raw.names) for raw, _ in splits), default=0)
    for code, pairs in (("images-in-two-splits", across), ("images-twice", inside)):
        if pairs:
            few = code == "images-in-two-splits" and len(pairs) <= LEAKED * smallest
            yield finding(code, pairs, lambda both: pair(*both), severity=WARNING if few else "")
