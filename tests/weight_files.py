"""Checkpoint files put together byte by byte: what torch and detectron2 write, and what an attacker would."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Mapping

import numpy as np

from minidet.weights.files import LEGACY_MAGIC, LEGACY_VERSION
from minidet.weights.torch_file import state_program

State = Mapping[str, np.ndarray]


def zipped(entries: Mapping[str, bytes], **how) -> bytes:
    """A zip archive, stored unless said otherwise."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **how) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file.getvalue()


def torch_zip(program: bytes, storages: list[bytes] = (), **others: bytes) -> bytes:
    """torch's container since 1.6."""
    entries = {"a/data.pkl": program} | {f"a/{name}": content for name, content in others.items()}
    return zipped(entries | {f"a/data/{i}": content for i, content in enumerate(storages)})


def torch_legacy(
    program: bytes,
    storages: list[bytes] = (),
    counts: list[int] | None = None,
    magic: int = LEGACY_MAGIC,
    version: int = LEGACY_VERSION,
) -> bytes:
    """torch's container before 1.6; the storages hold float32, unless `counts` says how many numbers."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    start = b"".join(pickle.dumps(value, 2) for value in (magic, version, system))
    keys = pickle.dumps([str(i) for i in range(len(storages))], 2)
    counts = [len(s) // 4 for s in storages] if counts is None else counts
    return start + program + keys + b"".join(struct.pack("<q", n) + s for n, s in zip(counts, storages, strict=True))


def in_every_container(state: State) -> dict[str, bytes]:
    """The same weights as all kinds of files hold them, by suffix."""
    program, storages = state_program(state), [array.tobytes() for array in state.values()]
    npz = io.BytesIO()
    np.savez(npz, **state)
    return {
        "zip.pth": torch_zip(program, storages, byteorder=b"little", version=b"3\n"),
        "legacy.pth": torch_legacy(program, storages, [array.size for array in state.values()]),
        "zoo.pkl": pickle.dumps({"model": dict(state), "__author__": "somebody"}, 2),
        "arrays.npz": npz.getvalue(),
    }


# Instructions of a pickle, to write programs with.


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int | float) -> bytes:
    return b"G" + struct.pack(">d", value) if isinstance(value, float) else b"J" + struct.pack("<i", value)


def numbers(values) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def call(module: str, attribute: str, *arguments: bytes) -> bytes:
    return name(module, attribute) + b"(" + b"".join(arguments) + b"tR"


def storage(count: int, kind: str = "FloatStorage", key: str = "0") -> bytes:
    return b"(" + text("storage") + name("torch", kind) + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(shape, strides, offset=0, of: bytes | None = None) -> bytes:
    """One that lies in a storage of six float32 numbers, or says so."""
    of = storage(6) if of is None else of
    return call(
        "torch._utils", "_rebuild_tensor_v2", of, number(offset), numbers(shape), numbers(strides), b"\x89", b"}"
    )


def dictionary(**values: bytes) -> bytes:
    """A whole program."""
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in values.items()) + b"u."
