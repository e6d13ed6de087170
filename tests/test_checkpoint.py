"""Checkpoints: whole or absent, exact, and clear about what is wrong with a bad one."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from minidet.training import checkpoint as module
from minidet.training.checkpoint import (
    BEST,
    FORMAT,
    LAST,
    Checkpoint,
    CheckpointError,
    find_checkpoint,
    is_checkpoint,
    read_checkpoint,
    write_checkpoint,
)


@pytest.fixture
def saved(rng):
    return Checkpoint(
        model={"class": "Config", "sizes": [1, 2.5]},
        classes=("α-cell", "b"),
        category_ids=(3, 90),
        weights={
            "conv.weight": rng.normal(size=(4, 3, 3, 2)).astype(np.float32),
            "turned": rng.normal(size=(3, 5)).T,  # not contiguous
            "count": np.array(7),
        },
        optimizer={"step.conv.weight": np.array(12), "mean.conv.weight": np.zeros((4, 3, 3, 2), np.float32)},
        training={"config": {"images": 480}, "state": {"position": 192}},
    )


def test_round_trip_is_exact(saved, tmp_path):
    write_checkpoint(tmp_path / "new" / LAST, saved)
    read = read_checkpoint(tmp_path / "new" / LAST)
    assert (read.model, read.classes, read.category_ids, read.training) == (
        saved.model, saved.classes, saved.category_ids, saved.training,
    )  # fmt: skip
    for name in ("weights", "optimizer"):
        assert getattr(read, name).keys() == getattr(saved, name).keys()
        for key, array in getattr(saved, name).items():
            got = getattr(read, name)[key]
            assert got.dtype == array.dtype and got.shape == array.shape
            np.testing.assert_array_equal(got, array)
    assert os.listdir(tmp_path / "new") == [LAST]


def test_a_checkpoint_is_known_by_what_it_says(saved, tmp_path):
    write_checkpoint(tmp_path / "renamed.safetensors", saved)
    save_file({"weight": np.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    names = ("renamed.safetensors", "other.safetensors", "broken.safetensors", "absent.safetensors", "x.npz", "")
    assert [is_checkpoint(tmp_path / name) for name in names] == [True, False, False, False, False, True]


def test_a_folder_stands_for_its_best_or_else_its_last(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds neither best\.safetensors nor last\.safetensors"):
        find_checkpoint(tmp_path)
    write_checkpoint(tmp_path / LAST, saved)
    assert find_checkpoint(tmp_path) == tmp_path / LAST
    write_checkpoint(tmp_path / BEST, saved)
    assert find_checkpoint(str(tmp_path)) == tmp_path / BEST
    assert find_checkpoint(tmp_path / LAST) == tmp_path / LAST


@pytest.mark.parametrize("failing", ["serialize", "os.fsync", "os.replace"])
def test_a_failed_write_leaves_the_old_checkpoint(failing, saved, tmp_path, monkeypatch):
    path = tmp_path / LAST
    write_checkpoint(path, saved)
    before = path.read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    owner, _, name = failing.rpartition(".")
    monkeypatch.setattr(getattr(module, owner) if owner else module, name, full)
    with pytest.raises(OSError, match="no space left"):
        write_checkpoint(path, saved)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [LAST]


def test_every_truncation_is_noticed(saved, tmp_path):
    path = tmp_path / LAST
    write_checkpoint(path, saved)
    whole = path.read_bytes()
    for length in {*range(0, len(whole), 97), 8, 9, len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="truncated" if length > 8 else "not a safetensors file"):
            read_checkpoint(path)


def rewritten(path, **changes):
    """The file at `path` with other metadata, everything else the same."""
    whole = path.read_bytes()
    n = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + n])
    header["__metadata__"] |= changes
    text = json.dumps({k: v for k, v in header.items() if v is not None}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + n :])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "2"}, r"checkpoint format '2'; this minidet reads 1 to 1: install a newer one"),
        ({"version": "one"}, r"checkpoint format 'one'"),
        ({"version": "0"}, r"checkpoint format '0'"),
        ({"format": "pt"}, "a safetensors file, but not a minidet checkpoint"),
        ({"layout": "OIHW"}, "weights in layout 'OIHW', expected 'OHWI'"),
        ({"header": "{"}, "damaged: its header cannot be read"),
        ({"header": '{"model": {}}'}, "damaged: its header cannot be read .*'classes'"),
        ({"header": "[]"}, "damaged: its header cannot be read"),
    ],
)
def test_what_is_no_checkpoint_is_refused(changes, message, saved, tmp_path):
    path = tmp_path / LAST
    write_checkpoint(path, saved)
    rewritten(path, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such checkpoint"):
        read_checkpoint(path)
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="not a minidet checkpoint"):
        read_checkpoint(path)
    for content in (b"", b"PK\x03\x04 a zip file, as torch.save writes", b"\x93NUMPY" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{path}: not a safetensors file"):
            read_checkpoint(path)
    for header in (b"{not json}", b"{}x", b'{"a": 5}', b'{"a": {"data_offsets": []}}'):
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(CheckpointError, match="the list of its arrays cannot be read"):
            read_checkpoint(path)


def test_a_damaged_list_of_arrays_is_refused(saved, tmp_path):
    path = tmp_path / LAST
    write_checkpoint(path, saved)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"dtype":"F32"', b'"dtype":"F99"'))
    with pytest.raises(CheckpointError, match=r"last\.safetensors: damaged: "):
        read_checkpoint(path)
    assert FORMAT.encode() in whole  # readable in any hex viewer


def test_random_damage_to_the_header_never_escapes(saved, tmp_path, rng):
    path = tmp_path / LAST
    write_checkpoint(path, saved)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for _ in range(300):
        at = int(rng.integers(8, header))
        path.write_bytes(whole[:at] + bytes([int(rng.integers(256))]) + whole[at + 1 :])
        try:
            read_checkpoint(path)
        except CheckpointError:
            refused += 1
    assert refused > 200
