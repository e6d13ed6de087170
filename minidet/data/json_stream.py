"""The lists of a large json object, piece by piece: never the whole file in memory, and outlines not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import BinaryIO

BLOCK = 2**21
"""Bytes read at a time."""
_OUTLINE = re.compile(rb'"segmentation"\s*:\s*\[[][0-9.eE+,\s-]*\](?=\s*(?:\}|,\s*"))')
"""Polygons, two thirds of COCO's json, which detection does not read.  After them comes a key or the end."""
_KEY = re.compile(rb'\s*("(?:[^"\\]|\\.)*")\s*:\s*')
LONGEST_KEY = 1000
_BETWEEN = re.compile(rb"\}\s*,\s*(?=\{)")
_decode = json.JSONDecoder().raw_decode


class NotPlainError(ValueError):
    """Json that has to be read as a whole: damaged, or not as COCO and most programs write it."""


def pieces(file: BinaryIO) -> Iterator[tuple[str, list]]:
    """The lists directly inside of a json object, as (name, some of the entries), in the order of the file.

    The entries are those of `json.load`, but for polygons, which become 0 and are not checked.  A list is cut
    where an object ends and another begins: pieces that are valid between brackets make a valid list.

    Raises:
        NotPlainError: if the file is not json in UTF-8, or nests objects inside of lists inside of its lists.
    """
    try:
        yield from _pieces(file)
    except (ValueError, RecursionError) as error:
        raise NotPlainError(str(error)) from error


def _pieces(file: BinaryIO) -> Iterator[tuple[str, list]]:
    text = file.read(BLOCK).lstrip()
    if text[:1] != b"{":
        raise NotPlainError("no object")
    text = text[1:]
    while True:
        while not ((key := _KEY.match(text)) and len(text) > key.end()):
            if len(text) > LONGEST_KEY:
                raise NotPlainError("no key")
            text += _more(file, text)
        text = text[key.end() :]
        name = json.loads(key[1])
        if text[:1] == b"[":
            text = text[1:]
            while True:
                entries, text, ended = _piece(text, file)
                yield name, entries
                if ended:
                    break
        else:
            _, text = _value(text, file)
        while not (text := text.lstrip()):
            text = _more(file, text)
        if text[:1] == b"}" and not (text[1:] + file.read()).strip():
            return
        if text[:1] != b",":
            raise NotPlainError("no comma")
        text = text[1:]


def _piece(text: bytes, file: BinaryIO) -> tuple[list, bytes, bool]:
    """Some entries of a list whose bracket was read, what follows them, and whether the list ended there."""
    while True:
        text = without_outlines(text)
        cuts = [cut.span() for cut in _BETWEEN.finditer(text, max(0, len(text) - BLOCK // 8))]
        if cuts:
            try:
                return json.loads(b"[" + text[: cuts[-1][0] + 1] + b"]"), text[cuts[-1][1] :], False
            except ValueError:  # the list ends before the cut, or something is wrong
                break
        if not (block := file.read(max(BLOCK, len(text)))):
            break
        text += block
    entries, rest = _value(b"[" + text, None)
    return entries, rest, True


def _value(text: bytes, file: BinaryIO | None) -> tuple[object, bytes]:
    """The json value that the text begins with, and what follows it; reads on as long as it is cut off."""
    while True:
        try:
            _, end = _decode(text.decode("latin-1"))  # a byte a character: `end` counts bytes
            if text[:1] in b"[{" or text[end : end + 1] in (b",", b"}", b" ", b"\n"):  # else a number may go on
                return json.loads(text[:end]), text[end:]
        except json.JSONDecodeError:
            if file is None:
                raise
        text += _more(file, text)


def _more(file: BinaryIO, text: bytes) -> bytes:
    """As much again: what is tried anew with every block then takes at most twice as long."""
    block = file.read(max(BLOCK, len(text)))
    if not block:
        raise NotPlainError("ends early")
    return block


def without_outlines(text: bytes) -> bytes:
    """The text with 0 for every list of numbers under the key "segmentation" that it holds whole."""
    return _OUTLINE.sub(b'"segmentation":0', text)
