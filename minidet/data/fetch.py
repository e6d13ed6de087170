"""One file from the network: gone on with where it was cut, checked, and there as a whole or not at all."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

TRIES = 8
"""Attempts in a row that bring next to nothing, before giving up."""
PAUSE, LONGEST_PAUSE = 0.5, 60.0
"""Seconds between attempts; doubled from one to the next that brings nothing."""
PATIENCE = 30.0
SLOWEST = 30_000
"""A connection is given up after so many seconds without an answer, or with fewer bytes than that."""
WRONG_BYTES = 2
"""Complete files with another hash than the expected one, before giving up."""
RETRIED = (408, 425, 429, 500, 502, 503, 504)
"""Answers that may be better a moment later."""


class FetchError(RuntimeError):
    """A file that could not be had; the message says from where, why, and what to do."""


class _InterruptedError(Exception):
    """An attempt that failed, and is worth another."""


@dataclass(frozen=True)
class Source:
    """A file on the network, with what is known about it."""

    url: str
    size: int | None = None
    """Bytes."""
    sha256: str | None = None


def fetch(source: Source, path: Path, *, room: int = 0, progress: bool = False) -> dict[str, Any]:
    """Have the file at `path`; returns its url, size and sha256, as they were found.

    What was received lies in `path`.part until it is complete and right; a later call goes on with it, if the
    server still has the same file.  `room` is what else must fit on the disk, in bytes.

    Raises:
        FetchError: if the server does not have the file, offers another one, or cannot be reached any more.
    """
    if path.exists():
        found = _sha256(path)
        if source.sha256 not in (None, found):
            raise FetchError(
                f"{path}: is there already, but with the sha256 {found} instead of {source.sha256}: remove it"
            )
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = _completed(source, path, room, progress)
    return {"url": source.url, "size": path.stat().st_size, "sha256": found}


def _completed(source: Source, path: Path, room: int, progress: bool) -> str:
    """Attempt after attempt until the file is there; its sha256."""
    part, failures, wrong = _part(path), 0, 0
    while True:
        before = _length(part)
        try:
            _attempt(source, path, room, progress)
            found = _sha256(part)
            if source.sha256 in (None, found):
                break
            part.unlink()
            wrong, problem = wrong + 1, f"what came has the sha256 {found}, expected {source.sha256}"
            if wrong == WRONG_BYTES:
                raise FetchError(f"{source.url}: {problem}, twice: the server, or something on the way, changes it")
        except _InterruptedError as stop:
            problem = str(stop)
        # Whoever sends something at each attempt is asked until it is all there.
        failures = 0 if _length(part) >= before + SLOWEST else failures + 1
        if failures == TRIES:
            raise FetchError(
                f"{source.url}: {problem}; given up after {TRIES} attempts, {_length(part):,} bytes are kept"
            )
        time.sleep(min(PAUSE * 2**failures, LONGEST_PAUSE))
    os.replace(part, path)
    _note(path).unlink(missing_ok=True)
    return found


def _attempt(source: Source, path: Path, room: int, progress: bool) -> None:
    """Append to the part what one connection brings; returns if that is all."""
    part, note = _part(path), _note(path)
    have, known = _length(part), _read_note(note)
    ours = known.get("url") == source.url
    if ours and have == source.size:
        return
    headers = {"User-Agent": "minidet", "Accept-Encoding": "identity"}
    # Of a file without a version, only a hash can tell afterwards whether two halves belong together.
    if have and ours and (known["version"] or source.sha256):
        headers["Range"] = f"bytes={have}-"
        if known["version"]:
            headers["If-Range"] = known["version"]
    try:
        answer = urllib.request.urlopen(urllib.request.Request(source.url, headers=headers), timeout=PATIENCE)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # there is nothing beyond what was received: that is all, or of another file
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return
            part.unlink()
            raise _InterruptedError("the server has less than was received before") from None
        if error.code in RETRIED:
            raise _InterruptedError(f"the server answers {error.code} {error.reason}") from None
        raise FetchError(f"{source.url}: the server answers {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise _InterruptedError(f"no connection ({error})") from None
    with answer:
        if source.url.startswith("https:") and not answer.url.startswith("https:"):
            raise FetchError(f"{source.url}: redirected to {answer.url}, which is not encrypted: not followed")
        have, total = _offered(answer, have)
        if source.size is not None and total not in (None, source.size):
            raise FetchError(f"{source.url}: the server offers {total:,} bytes, expected {source.size:,}: another file")
        total = total or source.size
        _check_space(path, (total or 0) - have + room)
        version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        note.write_text(json.dumps({"url": source.url, "version": "" if version.startswith("W/") else version}))
        with open(part, "r+b" if have else "wb") as file, tqdm(
            desc=path.name, total=total, initial=have, unit="B", unit_scale=True, disable=not progress, leave=False
        ) as bar:  # fmt: skip
            file.truncate(have)
            file.seek(have)
            for block in _blocks(answer):
                have += file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and have < total:
        raise _InterruptedError(f"the connection ended after {have:,} of {total:,} bytes")
    if total is not None and have > total:
        part.unlink()
        raise _InterruptedError(f"the server sent {have:,} bytes instead of {total:,}")


def _offered(answer, have: int) -> tuple[int, int | None]:
    """Where the answer begins, which is 0 if the server starts anew, and the length of the whole file if told."""
    if answer.status != 206:
        length = answer.headers.get("Content-Length", "")
        return 0, int(length) if length.isdigit() else None
    given = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
    if not given or int(given[1]) != have:
        sent = answer.headers.get("Content-Range")
        raise FetchError(f"{answer.url}: asked for the bytes from {have} on, the server sends {sent!r}")
    return have, None if given[2] == "*" else int(given[2])


def _blocks(answer) -> Iterator[bytes]:
    """What arrives, as long as enough arrives."""
    since, received = time.monotonic(), 0
    while True:
        try:
            block = answer.read1(2**18)
        except (OSError, http.client.HTTPException) as error:
            raise _InterruptedError(f"the connection was cut ({type(error).__name__})") from None
        if not block:
            return
        yield block
        received += len(block)
        if time.monotonic() - since > PATIENCE:
            if received < SLOWEST:
                raise _InterruptedError(f"only {received:,} bytes came in {PATIENCE:g} seconds")
            since, received = time.monotonic(), 0


def _check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        amounts = f"{needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
        raise FetchError(f"{path.parent}: {amounts}: choose a folder on another disk")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _note(path: Path) -> Path:
    """Which version of what the part belongs to."""
    return path.with_name(path.name + ".part.json")


def _read_note(note: Path) -> dict[str, str]:
    try:
        found = json.loads(note.read_text())
        return {"url": str(found["url"]), "version": str(found["version"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _length(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0
