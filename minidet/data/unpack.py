"""A zip archive from the network, unpacked into a folder that is there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from tqdm import tqdm


class UnpackError(RuntimeError):
    """An archive that is damaged, or not what it should be; the message says which entry and why."""


def unpack(
    archive: Path, folder: Path, place: Callable[[str], str | None], *, files: int, most: int, progress: bool = False
) -> None:
    """Write the archive's files below `folder`, which must not exist yet.

    `place` says where an entry goes, as a path inside of the folder, or None for one that is not wanted.

    Raises:
        UnpackError: if the archive is damaged, an entry is a link, is there twice or leaves the folder, or if they
            are fewer than `files` or have more than `most` bytes.
    """
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as file:
            wanted = _checked(archive, file, place, most)
            if len(wanted) < files:
                raise UnpackError(f"{archive}: holds {len(wanted):,} of the files that are wanted, expected {files:,}")
            rows = tqdm(wanted.items(), desc=folder.name, unit=" files", disable=not progress, leave=False)
            for target, entry in rows:
                path = unfinished / target
                path.parent.mkdir(parents=True, exist_ok=True)
                with file.open(entry) as source, open(path, "wb") as out:
                    shutil.copyfileobj(source, out)  # no more than the size that was checked; and its checksum
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, UnpackError):
            raise
        raise UnpackError(f"{archive}: a damaged archive ({error}): remove it and download it again") from error
    os.replace(unfinished, folder)


def _checked(
    archive: Path, file: zipfile.ZipFile, place: Callable[[str], str | None], most: int
) -> dict[str, zipfile.ZipInfo]:
    """The wanted entries by where they go."""
    wanted: dict[str, zipfile.ZipInfo] = {}
    for entry in file.infolist():
        target = None if entry.is_dir() else place(entry.filename)
        if target is None:
            continue
        parts = PurePosixPath(target).parts
        if ".." in parts or target.startswith("/") or "\\" in target or ":" in target or not parts:
            raise UnpackError(f"{archive}: {entry.filename!r} would leave the folder: not the archive it should be")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise UnpackError(f"{archive}: {entry.filename!r} is a link: not the archive it should be")
        if target in wanted:
            raise UnpackError(f"{archive}: {entry.filename!r} is there twice")
        wanted[target] = entry
    total = sum(entry.file_size for entry in wanted.values())
    if total > most:
        raise UnpackError(f"{archive}: its files would take {total:,} bytes, expected at most {most:,}")
    return wanted
