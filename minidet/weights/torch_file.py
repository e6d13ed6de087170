"""A state dict as torch.save writes it, without torch: a pickle that is put together by hand, in a zip."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from minidet.weights.tensors import STORAGES

FOLDER = "archive"  # of every entry in the zip
ALIGNMENT = 64  # bytes: where in the file torch may map a storage into memory
PADDING = 0x4246  # the kind of extra field that torch fills up with
LOCAL_HEADER = 30  # bytes before an entry's name
CLASSES = {np.dtype(element).name: name for name, element in STORAGES.items() if element != "bfloat16"}


def write_torch(path: str | Path, state: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name so that torch.load(path, weights_only=True) gives an OrderedDict of tensors.

    Raises:
        ValueError: if an array is of a type that torch's storages do not have.
    """
    program = state_program(state)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "data.pkl", program)
        _add(archive, "byteorder", b"little")
        for i, array in enumerate(state.values()):
            _add(archive, f"data/{i}", array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
        _add(archive, "version", b"3\n")


def state_program(state: Mapping[str, np.ndarray]) -> bytes:
    """The pickle of an OrderedDict of tensors, array number i in storage "i"; pickletools.dis shows its steps."""
    ordered_dict = b"ccollections\nOrderedDict\n)R"  # GLOBAL, EMPTY_TUPLE, REDUCE
    parts = [b"\x80\x02", ordered_dict, b"("]  # PROTO 2, and a MARK below the items
    for i, (name, array) in enumerate(state.items()):
        if array.dtype.name not in CLASSES:
            raise ValueError(f"{name} has type {array.dtype}; torch's files hold {', '.join(CLASSES)}")
        strides = np.cumprod([1, *reversed(array.shape[1:])])[::-1] if array.ndim else ()
        parts += [_text(name), b"ctorch._utils\n_rebuild_tensor_v2\n("]
        parts += [b"(", _text("storage"), f"ctorch\n{CLASSES[array.dtype.name]}\n".encode()]
        parts += [_text(str(i)), _text("cpu"), _number(array.size), b"tQ"]  # TUPLE, BINPERSID: the storage
        parts += [_number(0), _numbers(array.shape), _numbers(strides), b"\x89", ordered_dict, b"tR"]
    return b"".join([*parts, b"u."])  # SETITEMS, STOP


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded  # BINUNICODE


def _number(number: int) -> bytes:
    if number < 2**31:
        return b"J" + struct.pack("<i", number)  # BININT
    return b"\x8a\x08" + struct.pack("<q", number)  # LONG1, of eight bytes


def _numbers(numbers) -> bytes:
    return b"(" + b"".join(_number(int(number)) for number in numbers) + b"t"


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Add an entry, its content beginning at a multiple of the alignment."""
    entry = zipfile.ZipInfo(f"{FOLDER}/{name}")
    begin = archive.fp.tell() + LOCAL_HEADER + len(entry.filename) + 4
    padding = -begin % ALIGNMENT
    entry.extra = struct.pack("<HH", PADDING, padding) + bytes(padding)
    archive.writestr(entry, content)
