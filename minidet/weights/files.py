"""Arrays out of the files that weights come in, with NumPy alone; nothing in them is ever executed."""

from __future__ import annotations

import io
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from minidet.weights.tensors import BFLOAT16, Rebuilt, Storage, Strided, WeightsError, elements
from minidet.weights.unpickling import unpickle

State = dict[str, np.ndarray]
Find = Callable[[Storage], Any]
"""The bytes of a storage."""

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # of torch before 1.6
LEGACY_VERSION = 1001
WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "net")
"""What training programs call the weights among the other things they save."""
PREFIXES = ("module.", "model.", "_orig_mod.")
"""What modules around the model add to every name."""
SAFETENSORS = {
    "F64": "f8", "F32": "f4", "F16": "f2", "BF16": BFLOAT16, "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1",
    "U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1", "BOOL": "b1",
}  # fmt: skip
MOST_SHARED = 8  # times a file's size that its tensors may take: some share a storage, some widen
MOST_UNPACKED = 2**30  # bytes out of a compressed file a hundredth of that size


def read_arrays(path: str | Path) -> State:
    """The arrays of a file by name, whichever kind it is: its content says so, not its suffix.

    torch's .pth, in a zip or in the container before 1.6; pickles of NumPy arrays, as detectron2's .pkl;
    .safetensors; .npz.  Of what a training saved besides the weights, nothing is read; prefixes that wrappers
    such as DistributedDataParallel add to all names are taken off.  bfloat16 becomes float32.

    Raises:
        WeightsError: if there is no such file, it is damaged or of no known kind, or asks for anything but
            tensors; the message names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        state = _read(path)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    except MemoryError as error:
        raise WeightsError(f"{path}: its arrays do not fit into memory") from error
    except (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise WeightsError(f"{path}: damaged: {error}") from error
    for prefix in PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): array for name, array in state.items()}
    return state


def _read(path: Path) -> State:
    with open(path, "rb") as file:
        start = file.read(512)
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        if not zipfile.is_zipfile(path):
            raise WeightsError(
                "a truncated zip archive: its end, which lists what is inside, is missing; copy it again"
            )
        with zipfile.ZipFile(path) as archive:
            _check(archive, path.stat().st_size)
            programs = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
            return _torch_zip(archive, programs[0], path) if len(programs) == 1 else _npz(path)
    if start[8:9] == b"{":
        return _safetensors(path)
    if start[:1] in (b"\x80", b"(", b"}", b"]", b"c"):  # with its protocol, or one from before they were written
        return _pickle(path)
    if start[257:262] == b"ustar":
        raise WeightsError("torch's container of before 2017: load it with torch and save it again")
    raise WeightsError(
        "no .pth, .pkl, .safetensors or .npz, or a damaged one: it begins with "
        f"{start[:24]!r}"
        + ("; fetch the file itself, git lfs pull" if start.startswith(b"version https://git-lfs") else "")
    )


def _check(archive: zipfile.ZipFile, size: int) -> None:
    """Before anything is unpacked: one entry a name, nothing but files, and no more bytes than there can be."""
    seen: set[str] = set()
    for entry in archive.infolist():
        name = entry.filename
        if name in seen:
            raise WeightsError(f"damaged: its entry {name[:80]!r} comes twice")
        if name.startswith("/") or ".." in name.split("/") or stat.S_ISLNK(entry.external_attr >> 16):
            raise WeightsError(f"its entry {name[:80]!r} leads outside the archive: not written by torch or NumPy")
        seen.add(name)
    unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > max(MOST_UNPACKED, 100 * size):
        raise WeightsError(f"{size:,} bytes that claim to unpack to {unpacked:,}: a decompression bomb")


def _torch_zip(archive: zipfile.ZipFile, program: str, path: Path) -> State:
    folder, names = program.removesuffix("data.pkl"), set(archive.namelist())
    order = archive.read(f"{folder}byteorder") if f"{folder}byteorder" in names else b"little"
    if order not in (b"little", b"big"):
        raise WeightsError(f"damaged: its byte order is {order[:20]!r}")

    def find(storage: Storage) -> bytes:
        name = f"{folder}data/{storage.key}"
        if name not in names:
            raise WeightsError(f"damaged: its entry {name[:80]!r} is missing")
        entry = archive.getinfo(name)
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise WeightsError(f"its entry {name!r} is compressed or lies about its size: not written by torch")
        return archive.read(entry)

    return _arrays(unpickle(io.BytesIO(archive.read(program))), find, order == b"little", path.stat().st_size)


def _pickle(path: Path) -> State:
    """A pickle of NumPy arrays, or torch's container before 1.6.

    That is five pickles: a magic number, a version, facts about the machine, the tensors, and the keys of the
    storages.  Then each storage, in the order of the keys: its number of elements, in eight bytes, and the
    elements; both are little-endian whatever the machine was.
    """
    content = path.read_bytes()
    stream, storages, places = io.BytesIO(content), {}, {}
    tree = unpickle(stream, storages)
    if tree == LEGACY_MAGIC:
        if (version := unpickle(stream)) != LEGACY_VERSION:
            raise WeightsError(f"torch's old container in version {version}, known is {LEGACY_VERSION}")
        unpickle(stream)
        tree, keys = unpickle(stream, storages), unpickle(stream)
        at = stream.tell()
        if type(keys) is not list or any(type(key) is not str or key not in storages for key in keys):
            raise WeightsError("damaged: its list of storages names others than its tensors")
        for key in keys:
            count, at = int.from_bytes(content[at : at + 8], "little"), at + 8
            if count != storages[key].count:
                raise WeightsError(f"damaged or truncated: storage {key} has not the length that its tensors say")
            places[key] = slice(at, at + count * storages[key].itemsize)
            at = places[key].stop
        if at > len(content):
            raise WeightsError(f"truncated: {len(content):,} of {at:,} bytes; copy it again")

    def find(storage: Storage) -> memoryview:
        if storage.key not in places:
            raise WeightsError(f"damaged: its storage {storage.key} is missing")
        return memoryview(content)[places[storage.key]]

    return _arrays(tree, find, True, len(content))


def _arrays(tree: Any, find: Find, little: bool, size: int) -> State:
    """The weights among what a pickle held, as arrays."""
    leaves = _weights(tree)
    if sum(leaf.nbytes for leaf in leaves.values() if isinstance(leaf, Strided)) > MOST_SHARED * size:
        raise WeightsError(
            f"tensors of more than {MOST_SHARED} times the {size:,} bytes of the file: a bomb of shared storages"
        )
    flat: dict[str, np.ndarray] = {}
    state = {}
    for name, leaf in leaves.items():
        if isinstance(leaf, Strided):
            key = leaf.storage.key
            if key not in flat:
                flat[key] = leaf.storage.values(find(leaf.storage), little)
            state[name] = leaf.array(flat[key])
        elif leaf.values is not None:
            state[name] = leaf.values
        else:
            raise WeightsError(f"damaged: the array {name} was never described")
    return state


def _weights(tree: Any) -> dict[str, Strided | Rebuilt]:
    """The dict with most tensors: the file itself, or what training programs wrap beside counts and averages."""
    wrapped = [tree[name] for name in WRAPPERS if name in tree] if type(tree) is dict else []
    places = [place for place in [tree, *wrapped] if type(place) is dict]
    found = [
        {name: leaf for name, leaf in place.items() if type(name) is str and isinstance(leaf, Strided | Rebuilt)}
        for place in places
    ]
    most = max(found, key=len, default={})
    if most:
        return most
    content = "a single tensor" if isinstance(tree, Strided | Rebuilt) else type(tree).__name__
    if type(tree) is dict:
        content = ", ".join(str(name)[:40] for name in list(tree)[:8]) or "empty"
    raise WeightsError(f"holds no tensors by name, neither at its top nor under {', '.join(WRAPPERS)}; it is {content}")


def _safetensors(path: Path) -> State:
    try:
        entries = deserialize(path.read_bytes())
    except SafetensorError as error:
        raise WeightsError(f"damaged or truncated: {error}") from error
    unknown = {entry["dtype"] for _, entry in entries} - SAFETENSORS.keys()
    if unknown:
        raise WeightsError(f"holds numbers of type {', '.join(sorted(unknown))}; known are {', '.join(SAFETENSORS)}")
    return {
        name: elements(entry["data"], SAFETENSORS[entry["dtype"]], "<").reshape(entry["shape"])
        for name, entry in entries
    }


def _npz(path: Path) -> State:
    try:
        with np.load(path, allow_pickle=False) as file:
            state = dict(file.items())
    except ValueError as error:
        if "pickle" in str(error):
            error = WeightsError("holds pickled objects, which can run any program; save plain arrays with numpy.savez")
        raise error
    for name, array in state.items():
        if not isinstance(array, np.ndarray):
            raise WeightsError(f"its entry {name[:80]!r} is no array: a zip archive, but neither torch's nor NumPy's")
    return state
