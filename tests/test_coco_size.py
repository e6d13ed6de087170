"""Data at COCO's size: a large json is read in pieces, checked in columns, and kept as an index."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import coco_size
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_coco import content, write

from minidet.data import Loader, coco, index, json_stream
from minidet.data.annotations import Annotations, read_annotations
from minidet.data.index import COLUMNS, index_places, indexed
from minidet.data.json_stream import NotPlainError, pieces
from minidet.data.refusal import DataError
from minidet.images import Preprocess

# --- pieces ----------------------------------------------------------------------------------------------

number = st.integers(-(10**6), 10**6) | st.floats(-1e6, 1e6).map(lambda value: round(value, 2))
text = st.text(st.sampled_from('ab"\\{}[],:é\n '), max_size=6)
outline = st.lists(st.lists(number, max_size=4), max_size=2)
flat = st.dictionaries(
    st.sampled_from(["id", "bbox", "name", "segmentation"]), number | text | st.lists(number, max_size=3) | outline
)
top = st.dictionaries(
    st.sampled_from(["images", "annotations", "categories", "info", "é"]),
    st.lists(flat, max_size=6) | flat | number | text | st.lists(number, max_size=2),
    min_size=1,
)


def without_polygons(value):
    """What `pieces` promises of an entry."""
    if not isinstance(value, dict):
        return value
    polygons = isinstance(value.get("segmentation"), list)
    return {**value, "segmentation": 0} if polygons else value


@settings(max_examples=300, deadline=None, derandomize=True)
@given(top, st.sampled_from([None, 1]), st.booleans(), st.sampled_from([1, 7, 64, 2**20]))
def test_pieces_are_the_lists(data, indent, ascii_only, block):
    written = json.dumps(data, indent=indent, ensure_ascii=ascii_only).encode()
    before, json_stream.BLOCK = json_stream.BLOCK, block
    try:
        found: dict[str, list] = {}
        for name, entries in pieces(io.BytesIO(written)):
            found.setdefault(name, []).extend(entries)
    finally:
        json_stream.BLOCK = before
    lists = {name: value for name, value in data.items() if isinstance(value, list)}
    assert found == {name: list(map(without_polygons, value)) for name, value in lists.items()}


@pytest.mark.parametrize("block", [1, 5, 2**20])
@pytest.mark.parametrize(
    "bad", ['{"a": [{"b": 1}', '{"a": [1, 2}', '{"a": [1] "b": 2}', '{"a": 1} x', "[1]", "", '{"a": tru}', '{a: 1}',
            '{"a": [{"b": 1},, {"b": 2}]}', '{"a": [{"b": 1} {"b": 2}]}', '{"a": [{"x": "\\q"}, {"b": 1}]}']
)  # fmt: skip
def test_what_is_no_json_is_not_plain(bad, block, monkeypatch):
    monkeypatch.setattr(json_stream, "BLOCK", block)
    with pytest.raises(NotPlainError):
        list(pieces(io.BytesIO(bad.encode())))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_what_nobody_else_writes_is_read_as_a_whole(tmp_path, encoding):
    data = content()
    data["annotations"][0]["parts"] = [{"x": 1}, {"x": 2}, {"x": [{"y": 1}, {"y": 2}]}]  # looks like an end of entries
    path = tmp_path / "a.json"
    path.write_bytes(json.dumps(data).encode(encoding))
    found = read_annotations(path, 2)
    assert found.names == ["a.png", "b.png", "empty.png"] and found.ids.tolist() == [70, 72, 73, 71]


# --- columns ---------------------------------------------------------------------------------------------


def entry_by_entry(path: Path) -> dict[str, list]:
    """The columns as the definition of the file says, one annotation after the other."""
    data = json.loads(path.read_bytes())
    ids = sorted(category["id"] for category in data["categories"])
    of_image = {image["id"]: [] for image in data["images"]}
    for entry in data["annotations"]:
        of_image[entry["image_id"]].append(entry)
    entries = [entry for of_one in of_image.values() for entry in of_one]
    return {
        "image_ids": list(of_image),
        "sizes": [[image["height"], image["width"]] for image in data["images"]],
        "starts": np.cumsum([0] + [len(of_one) for of_one in of_image.values()]).tolist(),
        "ids": [entry["id"] for entry in entries],
        "bbox": [entry["bbox"] for entry in entries],
        "labels": [ids.index(entry["category_id"]) for entry in entries],
        "area": [entry.get("area", entry["bbox"][2] * entry["bbox"][3]) for entry in entries],
        "crowd": [bool(entry.get("iscrowd", 0)) for entry in entries],
    }


def columns(found: Annotations) -> dict[str, list]:
    return {name: getattr(found, name).tolist() for name in COLUMNS}


@pytest.fixture
def large(tmp_path, monkeypatch) -> Path:
    """A json of 60 images that counts as large, an hour old; the user's cache is a folder of this test."""
    monkeypatch.setattr(index, "SMALL", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = coco_size.write(tmp_path / "instances_train2017.json", images=60, boxes=400)
    hour_ago = path.stat().st_mtime - 3600
    os.utime(path, (hour_ago, hour_ago))
    return path


@pytest.mark.parametrize("block", [100, 2**21])
def test_columns_are_what_the_entries_say(large, block, monkeypatch):
    monkeypatch.setattr(json_stream, "BLOCK", block)
    found = read_annotations(large, 2)
    assert columns(found) == entry_by_entry(large)
    assert found.categories == dict(zip(coco_size.IDS, coco_size.NAMES, strict=True))
    assert (found.ids.dtype, found.bbox.dtype, found.boxes.dtype) == (np.int64, np.float64, np.float32)
    assert found.owners.tolist() == [n for n in range(60) for _ in range(found.starts[n], found.starts[n + 1])]


@pytest.mark.parametrize("seed", range(60))
def test_every_odd_file_is_explained(tmp_path, seed):
    """Whatever is put in place of a value is accepted, or refused with the file's name: never another error."""
    rng = random.Random(seed)
    data = content()
    entry = rng.choice(data[rng.choice(["images", "annotations", "categories"])])
    odd = [None, True, -1, 0, 2**63, 1e300, 10**400, float("nan"), "", "\ud800", [], [1] * 4, {}, [[{}, {}], {}], 5.0]
    entry[rng.choice([*entry, "area", "iscrowd", "more"])] = rng.choice(odd)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(data))
    try:
        assert columns(read_annotations(path, 2)) == entry_by_entry(path)
    except DataError as error:
        assert "a.json: " in str(error)


# --- the index -------------------------------------------------------------------------------------------


@pytest.fixture
def readings(monkeypatch) -> list:
    """The json files that were read although an index may have been there."""
    read = []
    monkeypatch.setattr(index, "read_annotations", lambda *given: (read.append(given), read_annotations(*given))[1])
    return read


def test_an_index_is_written_once_and_says_the_same(large, readings):
    first, second = indexed(large, 2), indexed(large, 2)
    assert len(readings) == 1 and index_places(large)[0].exists()
    assert columns(first) == columns(second) and (first.names, first.categories) == (second.names, second.categories)
    assert np.array_equal(first.boxes, second.boxes) and first.ground_truth() == second.ground_truth()
    assert not list(large.parent.glob("*.tmp"))


def rewritten(path: Path) -> None:
    """Another content of the same size and time."""
    stat = path.stat()
    path.write_bytes(path.read_bytes().replace(b"class 7", b"class x"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "anew"),
    [
        (lambda path: path.touch(), 0),  # the same content, by its hash
        (lambda path: path.write_text(path.read_text() + " "), 1),
        (lambda path: (rewritten(path), path.touch()), 1),
        (lambda path: shutil.copy(path, path.with_name("copy.json")), 0),
    ],
    ids=["touched", "longer", "other bytes", "copied"],
)
def test_an_index_is_as_old_as_its_json(large, readings, change, anew):
    indexed(large, 2)
    change(large)
    assert columns(indexed(large, 2)) == entry_by_entry(large) and len(readings) == 1 + anew
    indexed(large, 2)
    assert len(readings) == 1 + anew


def test_a_json_changed_within_the_clocks_tick_is_read_again(large, readings):
    """Same size, same time: only the hash tells, and it is asked while that time is too recent to be sure."""
    os.utime(large)
    indexed(large, 2)
    rewritten(large)
    assert "class x" in indexed(large, 2).categories.values() and len(readings) == 2


def test_other_questions_need_another_reading(large, readings, monkeypatch):
    indexed(large, 2)
    indexed(large, 3)
    monkeypatch.setattr(index, "FORMAT", index.FORMAT + 1)
    indexed(large, 3)
    assert len(readings) == 3


def flipped(path: Path, at: float) -> None:
    """One byte changed, that part of the way through the file."""
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 0x55
    path.write_bytes(data)


LONE_ARRAY = (
    b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f8', 'fortran_order': False, 'shape': (1,)}".ljust(117) + b"\n" + bytes(8)
)
DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "other": lambda path: path.write_bytes(b"not an index at all"),
    "lone array": lambda path: path.write_bytes(LONE_ARRAY),
    "objects": lambda path: np.savez(path, head=np.array([{"any": "object"}], object)),
    **{f"flipped at {at:.2f}": (lambda path, at=at: flipped(path, at)) for at in np.linspace(0, 1, 25)},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_index_is_written_anew(large, damage):
    expected = columns(indexed(large, 2))
    place = index_places(large)[0]
    good = place.read_bytes()
    DAMAGE[damage](place)
    assert columns(indexed(large, 2)) == expected
    if not damage.startswith("flipped"):  # bytes that only fill up may differ
        assert len(place.read_bytes()) == len(good)


def test_where_the_json_cannot_be_accompanied_the_users_cache_is_used(large, readings):
    beside, cached = index_places(large)
    beside.mkdir()  # as good as a folder that is read-only, and also for root
    (beside / "x").touch()
    indexed(large, 2)
    assert cached.is_file() and columns(indexed(large, 2)) == entry_by_entry(large) and len(readings) == 1
    cached.unlink()
    cached.parent.rmdir()
    cached.parent.touch()  # no place at all
    indexed(large, 2)
    indexed(large, 2)
    assert len(readings) == 3


def test_an_index_from_elsewhere_cannot_name_files_outside(large):
    found = indexed(large, 2)
    place = index_places(large)[0]
    with np.load(place) as file:
        arrays = dict(file)
    names = ["../../secret.jpg", *found.names[1:]]
    np.savez(place, **{**arrays, "names": np.frombuffer("\0".join(names).encode(), np.uint8)})
    assert indexed(large, 2).names == found.names


def test_small_files_are_not_accompanied(tmp_path):
    root = write(tmp_path, content())
    coco(root)
    assert [path.name for path in (root / "annotations").iterdir()] == ["instances_train.json"]


def test_sizes_are_known_without_opening_images(tmp_path):
    dataset = coco(write(tmp_path, content()))
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"")
    assert dataset.sizes.tolist() == [list(dataset.size(n)) for n in range(3)] == [[30, 40], [30, 40], [10, 20]]


# --- full size -------------------------------------------------------------------------------------------

MEASURE = r"""
import re, sys, time
from pathlib import Path
from minidet.data.index import indexed
def peak():  # not getrusage's, which begins with what the parent had
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before, began, cpu = peak(), time.perf_counter(), time.process_time()
found = indexed(Path(sys.argv[1]), 2.0)
print(len(found.names), len(found.bbox), time.process_time() - cpu, time.perf_counter() - began, peak() - before)
"""


@pytest.mark.slow
def test_the_whole_of_train2017(tmp_path):
    """118,287 images and 860,001 boxes in 460 MB: at most 15 s once and 1 s from then on, and 400 MB."""
    path = coco_size.write(tmp_path / "instances_train2017.json")
    os.utime(path, (1e9, 1e9))
    for name, most_seconds in (("without an index", 15), ("with its index", 1)):
        done = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True)
        images, boxes, cpu, seconds, peak = map(float, done.stdout.split())
        took = f"{cpu:.2f} s of CPU ({seconds:.2f} s), {peak:.0f} MB more"
        print(f"\n{name}: {images:,.0f} images, {boxes:,.0f} boxes: {took}")
        assert (images, boxes) == (coco_size.IMAGES, coco_size.BOXES)
        assert cpu < most_seconds and peak < 400  # time of the CPU: others may be using the machine
    print(f"json {path.stat().st_size / 1e6:.0f} MB, index {index_places(path)[0].stat().st_size / 1e6:.0f} MB")

    folder = tmp_path / "train2017"
    folder.mkdir()
    for name in indexed(path, 2).names:
        (folder / name).touch()
    began = perf_counter()
    dataset = coco(path)
    print(f"coco(): {perf_counter() - began:.2f} s, every file looked for")
    assert dataset.sizes.shape == (coco_size.IMAGES, 2) and dataset.folder == folder
    assert re.search(r"118287 images .* 2 boxes without area", dataset.summary().replace("\n", " "))
    an_epoch_goes_on_where_it_stopped(dataset)


def an_epoch_goes_on_where_it_stopped(dataset) -> None:
    def loader(start: int = 0) -> Loader:
        images = 2 * len(dataset)
        return Loader(dataset, Preprocess(), batch_size=16, seed=3, images=images, start=start, aspect_factor=factor)

    for factor in (None, 0):
        one = loader()
        began = perf_counter()
        order = one._order(0)
        print(f"an epoch's order, aspect_factor={factor}: {perf_counter() - began:.4f} s")
        assert np.array_equal(np.sort(order), np.arange(len(dataset)))
        assert np.array_equal(loader(start=50_000)._order(0), order) and not np.array_equal(one._order(1), order)
