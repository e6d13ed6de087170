"""Files of weights: every container gives the same arrays, and a file that is hostile or damaged runs nothing."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import stat
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from weight_files import (
    call,
    dictionary,
    in_every_container,
    name,
    number,
    numbers,
    storage,
    tensor,
    text,
    torch_legacy,
    torch_zip,
    zipped,
)

from minidet.weights import WeightsError, read_arrays
from minidet.weights.tensors import STORAGES
from minidet.weights.torch_file import state_program, write_torch

SAMPLES = Path(__file__).parent / "samples"
SIX = np.arange(6, dtype="<f4")
STATE = {
    "a.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "a.bias": np.array([1.5, -2.0], np.float32),
    "scalar": np.array(7, np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "é": np.full((1, 1), np.pi, np.float32),
}


def read(content: bytes, folder: Path, filename: str = "file.pth") -> dict[str, np.ndarray]:
    (folder / filename).write_bytes(content)
    return read_arrays(folder / filename)


def assert_same(found: dict, wanted: dict) -> None:
    assert list(found) == list(wanted)
    for key, array in wanted.items():
        assert found[key].dtype == array.dtype and found[key].shape == array.shape, key
        np.testing.assert_array_equal(found[key], array, err_msg=key)


# Containers.


@pytest.mark.parametrize("kind", in_every_container(STATE))
def test_every_container_gives_the_same_arrays(kind, tmp_path):
    assert_same(read(in_every_container(STATE)[kind], tmp_path, kind), STATE)


def test_the_samples_of_torch_and_of_the_zoo_are_the_same_weights():
    states = [read_arrays(SAMPLES / f"sample_tiny_{end}") for end in ("zip.pth", "legacy.pth", "d2style.pkl")]
    assert len(states[0]) == 136 and states[0]["backbone.body.conv1.weight"].shape == (8, 3, 7, 7)
    assert_same(states[1], states[0])
    assert_same(states[2], states[0])


def test_reading_needs_neither_torch_nor_pickle():
    program = (
        "import pickle, sys; from minidet.weights import read_arrays\n"
        "pickle.load = pickle.loads = pickle.Unpickler = None\n"
        f"for end in ('zip.pth', 'legacy.pth', 'd2style.pkl'): read_arrays(r'{SAMPLES}/sample_tiny_' + end)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_every_protocol(protocol, tmp_path):
    by_columns = np.asfortranarray(STATE["a.weight"][0])
    zoo = {"a": STATE["a.weight"], "columns": by_columns, "big": SIX.astype(">f8"), "half": SIX.astype(np.float16)}
    program = pickle.dumps({"model": zoo, "matching_heuristics": True, "n": np.float32(3), "epoch": 2.5}, protocol)
    found = read(program, tmp_path, "zoo.pkl")
    assert_same(found, zoo | {"big": SIX.astype(np.float64)})


def test_bfloat16_and_every_other_type_of_storage(tmp_path):
    values = np.array([0, 1, 2, 100, 1, 0])
    for kind, element in STORAGES.items():
        if element == "bfloat16":
            content, wanted = (np.float32([0, 1, -2.5]).view(np.uint32) >> 16).astype("<u2").tobytes(), [0, 1, -2.5]
        else:
            content, wanted = values.astype(f"<{element}").tobytes(), values.astype(element)
        n = len(wanted)
        program = dictionary(x=tensor([n], [1], of=storage(n, kind)))
        found = read(torch_zip(program, [content]), tmp_path)["x"]
        np.testing.assert_array_equal(found, wanted)
        assert found.dtype == (np.float32 if element == "bfloat16" else element), kind


def test_bytes_in_the_order_of_a_big_endian_machine(tmp_path):
    content = torch_zip(dictionary(x=tensor([6], [1])), [SIX.astype(">f4").tobytes()], byteorder=b"big")
    np.testing.assert_array_equal(read(content, tmp_path)["x"], SIX)


def test_views_share_a_storage_and_keep_their_strides(tmp_path):
    program = dictionary(
        columns=tensor([2, 3], [1, 2]), tail=tensor([2], [1], offset=4), one=tensor([], [], offset=3),
        parameter=call("torch._utils", "_rebuild_parameter", tensor([6], [1]), b"\x88", b"}"),
    )  # fmt: skip
    found = read(torch_zip(program, [SIX.tobytes()]), tmp_path)
    np.testing.assert_array_equal(found["columns"], SIX.reshape(3, 2).T)
    np.testing.assert_array_equal(found["tail"], [4, 5])
    assert found["one"] == 3 and found["parameter"].tolist() == SIX.tolist()
    assert all(array.flags.c_contiguous for array in found.values())


def test_safetensors_of_every_type(tmp_path):
    arrays = {"half": SIX.astype(np.float16), "int": np.arange(3), "double": SIX.reshape(2, 3).astype(np.float64)}
    save_file(arrays, tmp_path / "x.safetensors")
    found = read_arrays(tmp_path / "x.safetensors")
    assert_same({key: found[key] for key in arrays}, arrays)
    header = json.dumps({"x": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}).encode()
    upper = (np.float32([0, 1, -2.5]).view(np.uint32) >> 16).astype("<u2").tobytes()
    content = struct.pack("<Q", len(header)) + header + upper
    assert read(content, tmp_path, "bf16.safetensors")["x"].tolist() == [0, 1, -2.5]


def test_wrappers_and_prefixes_come_off(tmp_path):
    one = tensor([6], [1])
    content = [SIX.tobytes()]
    for wrapper in ("model", "state_dict", "model_state_dict", "net"):
        program = dictionary(epoch=number(3), **{wrapper: b"}" + text("module.a") + one + b"s"}, optimizer=b"}")
        assert list(read(torch_zip(program, content), tmp_path)) == ["a"]
    assert list(read(torch_zip(dictionary(**{"model.a": one, "b": one}), content), tmp_path)) == ["model.a", "b"]


def test_the_weights_are_the_most_tensors_of_a_file(tmp_path):
    """A training that saves its best score as a tensor beside them has wrapped them all the same."""
    two = b"}" + text("a") + tensor([6], [1]) + b"s" + text("b") + tensor([6], [1]) + b"s"
    program = dictionary(best=tensor([6], [1]), state_dict=two)
    assert list(read(torch_zip(program, [SIX.tobytes()]), tmp_path)) == ["a", "b"]
    for program, what in ((dictionary(), "empty"), (b"\x80\x02" + tensor([6], [1]) + b".", "a single tensor")):
        with pytest.raises(WeightsError, match=f"holds no tensors by name, .* it is {what}$"):
            read(torch_zip(program, [SIX.tobytes()]), tmp_path)


def test_what_a_training_saved_besides_is_not_read(tmp_path):
    """The optimizer's storages need not even be there."""
    moments = tensor([9], [1], of=storage(9, key="absent"))
    model = b"}" + text("a") + tensor([6], [1]) + b"s"
    program = dictionary(optimizer=b"}" + text("state") + moments + b"s", model=model)
    assert list(read(torch_zip(program, [SIX.tobytes()]), tmp_path)) == ["a"]


# torch as the judge.


def test_torch_reads_what_is_written_here(tmp_path):
    torch = pytest.importorskip("torch")
    state = STATE | {"count": np.array(3), "half": SIX.astype(np.float16), "bool": np.array([True, False])}
    write_torch(tmp_path / "x.pth", state)
    for mapped in (False, True):
        found = torch.load(tmp_path / "x.pth", weights_only=True, mmap=mapped)
        assert type(found).__name__ == "OrderedDict"
        assert_same({key: value.numpy() for key, value in found.items()}, state)
    assert_same(read_arrays(tmp_path / "x.pth"), state)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_writes_is_read_here(zipped, tmp_path):
    torch = pytest.importorskip("torch")
    for dtype in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"):
        base = torch.arange(60).reshape(3, 4, 5).to(getattr(torch, dtype))
        state = {"x": base, "turned": base.transpose(0, 2), "part": base[1:, ::2], "zero": base[0, 0, 0]}
        state["parameter"] = torch.nn.Parameter(base.float())
        saved = {"model": state, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": base}}}, "lr": [0.1]}
        torch.save(saved, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
        wanted = {k: (v.float() if dtype == "bfloat16" else v).detach().numpy() for k, v in state.items()}
        assert_same(read_arrays(tmp_path / "x.pth"), wanted)


def test_types_that_torch_does_not_have(tmp_path):
    with pytest.raises(ValueError, match="x has type complex64; torch's files hold float64"):
        write_torch(tmp_path / "x.pth", {"x": np.zeros(2, np.complex64)})


# Hostile programs, in every container that holds one.

TWICE = b"]q\x00" + b"".join(b"]h%cah%caq%c" % (i, i, i + 1) for i in range(60))
"""A list of two lists of two lists ...: 61 lists in memory, 2 to the 60th when written out."""
DEEP = b")" + b"\x85" * 20_000
SYSTEM = text("touch CANARY")
NOTHING_RUN = "; nothing was run. Weights are plain tensors"
HOSTILE = {
    "os.system": (call("os", "system", SYSTEM), r"asks for 'os\.system', which no tensor needs; nothing was run"),
    "posix.system": (call("posix", "system", SYSTEM), r"asks for 'posix\.system'"),
    "eval": (call("builtins", "eval", text("open('CANARY', 'w')")), r"asks for 'builtins\.eval'"),
    "exec of Python 2": (call("__builtin__", "exec", text("open('CANARY', 'w')")), r"asks for '__builtin__\.exec'"),
    "by a stack's names": (b"\x80\x04" + text("os") + text("system") + b"\x93" + SYSTEM + b"\x85R", "'os.system'"),
    "a dotted name": (b"\x80\x04" + text("collections") + text("abc.sys.modules") + b"\x93", "'collections.abc.sys"),
    "a name that is no text": (b"\x80\x04" + number(1) + text("system") + b"\x93", "a int where a pickle needs a str"),
    "nested calls": (
        call("collections", "OrderedDict", call("builtins", "getattr", name("os", "system"))), "'builtins.getattr'"
    ),
    "numpy's own loader": (call("numpy", "load", text("x.npy")), r"'numpy\.load'"),
    "torch.load": (call("torch", "load", text("x.pth")), r"'torch\.load'"),
    "a whole module": (name("torch.nn.modules.conv", "Conv2d") + b")\x81", r"'torch\.nn\.modules\.conv\.Conv2d'"),
    "settings of a script": (pickle.dumps(argparse.Namespace(lr=1), 2)[:-1], r"asks for 'argparse\.Namespace'"),
    "INST": (b"(" + SYSTEM + b"ios\nsystem\n", r"instruction INST \(os system\), which no tensor needs; nothing was"),
    "OBJ": (b"(" + name("collections", "OrderedDict") + b"o", "instruction OBJ,"),
    "NEWOBJ": (name("collections", "OrderedDict") + b")\x81", "instruction NEWOBJ,"),
    "the extension registry": (b"\x82\x01", r"instruction EXT1 \(1\),"),
    "a persistent name": (b"Panything\n", r"instruction PERSID \(anything\),"),
    "a persistent id of its own": (text("module") + b"Q", "a storage without kind, key and number of elements"),
    "a storage's view": (storage(6)[:-2] + number(3) + b"tQ", "or a view into another one"),
    "a storage of no known kind": (storage(6).replace(b"torch\nFloatStorage", b"numpy\nndarray"), "a storage without"),
    "BUILD of a list": (b"]}b", f"sets the attributes of a list{NOTHING_RUN}"),
    "BUILD of a text": (text("x") + b"}b", "sets the attributes of a str"),
    "a call of a text": (text("os.system") + SYSTEM + b"\x85R", "calls a str, which is nothing to call"),
    "a call of a storage class": (call("torch", "FloatStorage", number(9)), r"calls torch\.FloatStorage, which is no"),
    "arguments that are none": (name("collections", "OrderedDict") + b"K\x01R", "a int where a pickle needs a tuple"),
    "too many arguments": (call("collections", "OrderedDict", b"]", b"]"), "OrderedDict with arguments it does not"),
    "a dict of a text": (call("collections", "OrderedDict", text("ab")), "a dict of no pairs"),
    "a dict of a list of numbers": (call("collections", "OrderedDict", b"]K\x01a"), "a dict of no pairs"),
    "another encoding": (call("_codecs", "encode", text("x"), text("rot13")), "bytes that are no latin1 text"),
    "a tensor of texts": (
        call("torch._utils", "_rebuild_tensor_v2", *[text("x")] * 6), "a tensor without storage, shape and strides"
    ),
    "a parameter of a list": (call("torch._utils", "_rebuild_parameter", b"]", b"\x88", b"}"), "that is no tensor"),
    "objects in an array": (call("numpy", "dtype", text("O8"), b"\x89", b"\x88"), "holds arrays of 'O8': only float"),
    "a type of a list": (call("numpy", "dtype", b"]"), "holds arrays of 'list'"),
    "a type with fields": (
        call("numpy", "dtype", text("f4")) + b"(" + number(3) + text("<") + b"N" + text("f") + b"NJ\0\0\0\0J\0\0\0\0tb",
        "an element type of NumPy's with parts",
    ),
    "an array of too few bytes": (
        call("numpy.core.numeric", "_frombuffer", b"C\x08" + bytes(8), call("numpy", "dtype", text("f4")),
             numbers([3]), text("C")), r"an array of shape \(3,\) with 8 bytes for elements of 4",
    ),
    "an array of negative size": (
        call("numpy.core.numeric", "_frombuffer", b"C\x00", call("numpy", "dtype", text("f4")),
             numbers([-1]), text("C")),
        "an array whose shape is negative, absurd or no integers",
    ),
    "a memo that is empty": (b"h\x05", "instruction 1 of its pickle, BINGET, has no sense"),
    "a stack that is empty": (b"\x85", "TUPLE1, has no sense"),
    "below the mark": (b"}(s", "SETITEM, has no sense"),
    "no mark": (b"}u", "SETITEMS, has no sense"),
    "a key without a value": (b"}(K\x01u", "a key without a value"),
    "a key that cannot be one": (b"}]K\x01s", "a list as a key"),
    "a key that would crash hashing": (b"}" + DEEP + b"K\x01s", "a tuple as a key"),
    "a name twice": (b"}(" + 2 * (text("x") + b"K\x01") + b"u", "the name 'x' comes twice"),
    "items of a number": (b"K\x01(K\x02e", "a int where a pickle needs a list"),
    "a list in itself": (b"]q\x00h\x00a", "holds no tensors by name, neither at its top nor.*; it is list"),
    "a dict in itself": (b"}q\x00" + text("model") + b"h\x00s", "holds no tensors by name.*; it is model"),
    "nothing but a mark": (b"(", r"damaged: instruction \d of its pickle, STOP, has no sense"),
    "a deep nest": (DEEP, "holds no tensors by name"),
    "a bomb of lists": (TWICE + b"Q", "a storage without kind"),
    "a bomb of lists as a shape": (
        TWICE + call("torch._utils", "_rebuild_tensor_v2", storage(6), b"K\x00(h<t", numbers([1]), b"\x89", b"}"),
        "negative, absurd or no integers",
    ),
    "a length beyond the file": (b"\x8e" + struct.pack("<Q", 2**62), "ends early, or is none"),
    "a number beyond the file": (b"\x8b\xff\xff\xff\x7f", "ends early, or is none"),
    "an unknown instruction": (b"\xff", "ends early, or is none"),
    "storages of two sizes": (storage(6) + storage(7), "its storage 0 is described in two ways"),
    "a negative storage": (storage(-6), "a storage without kind, key and number"),
    "beyond the storage": (tensor([6], [1], offset=1), r"shape \(6,\) .* does not lie in its storage of 6 elements"),
    "strides beyond the storage": (tensor([2, 2], [5, 1]), "does not lie in its storage"),
    "negative strides": (tensor([6], [-1]), "shape, strides or offset are negative"),
    "a negative offset": (tensor([1], [1], offset=-4), "shape, strides or offset are negative"),
    "a huge shape": (tensor([2**30, 2**30], [0, 0]), "does not lie in its storage"),
    "a shape of NaN": (tensor([float("nan")], [1]), "negative, absurd or no integers"),
    "a shape of True": (
        call("torch._utils", "_rebuild_tensor_v2", storage(6), number(0), b"(\x88t", numbers([1]), b"\x89", b"}"),
        "negative, absurd or no integers",
    ),
    "more axes than strides": (tensor([2, 3], [1]), "a tensor of 2 axes with 1 strides"),
    "more axes than any tensor": (tensor([1] * 70, [1] * 70), "a tensor of 70 axes"),
}  # fmt: skip
CONTAINERS = {
    "plain": lambda program: program,
    "zip": lambda program: torch_zip(program, [SIX.tobytes()]),
    "legacy": lambda program: torch_legacy(program, [SIX.tobytes()] if b"FloatStorage" in program else []),
}


@pytest.fixture
def nothing_runs(tmp_path, monkeypatch):
    """Whatever a file could start would leave a trace."""
    monkeypatch.chdir(tmp_path)
    ran = []
    for module, attribute in ((os, "system"), (subprocess, "Popen"), (subprocess, "run")):
        monkeypatch.setattr(module, attribute, lambda *a, **k: ran.append(a))
    before = set(sys.modules)
    yield
    assert not ran and not (tmp_path / "CANARY").exists()
    assert {"torch"} & (set(sys.modules) - before) == set()


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("program", HOSTILE)
def test_a_hostile_program_is_refused_by_name(program, container, tmp_path, nothing_runs):
    content, message = HOSTILE[program]
    if not content.startswith(b"\x80"):
        content = b"\x80\x02" + content
    with pytest.raises(WeightsError, match=rf"file\.pth: .*{message}"):
        read(CONTAINERS[container](content + b"."), tmp_path)


def test_hostile_programs_of_the_first_protocol(tmp_path, nothing_runs):
    with pytest.raises(WeightsError, match=r"x\.pkl: asks for 'os\.system'"):
        read(b"cos\nsystem\n(S'touch CANARY'\ntR.", tmp_path, "x.pkl")


def test_what_pickle_would_run_is_not_run(tmp_path, nothing_runs):
    """The programs are real: Python's own reader obeys the first of them."""
    content = b"\x80\x02" + HOSTILE["eval"][0] + b"."
    pickle.loads(content).close()
    (tmp_path / "CANARY").unlink()
    with pytest.raises(WeightsError, match=r"builtins\.eval"):
        read(content, tmp_path)


# Damaged files.

WHOLE = in_every_container({"x": SIX})
GOOD = dictionary(x=tensor([6], [1]))


def patched(content: bytes, marker: bytes, offset: int, new: bytes) -> bytes:
    """The file with `new` at `offset` behind the last `marker`."""
    at = content.rindex(marker) + offset
    return content[:at] + new + content[at + len(new) :]


def with_link() -> bytes:
    entry = zipfile.ZipInfo("a/data/0")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    file = io.BytesIO(torch_zip(GOOD))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(entry, "/etc/passwd")
    return file.getvalue()


def twice() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for _ in range(2):
            archive.writestr("a/data.pkl", GOOD)
    return file.getvalue()


def sharing() -> bytes:
    views = {f"x{i}": tensor([40_000], [1], of=storage(40_000)) for i in range(50)}
    return torch_zip(dictionary(**views), [bytes(160_000)])


DAMAGED = {
    "cut.pth": (lambda: WHOLE["zip.pth"][:400], "a truncated zip archive: its end, .* is missing; copy it again"),
    "cut.pkl": (lambda: WHOLE["zoo.pkl"][:150], "damaged or truncated: its pickle ends early"),
    "cut_old.pth": (lambda: WHOLE["legacy.pth"][:-4], r"truncated: [\d,]+ of [\d,]+ bytes; copy it again"),
    "twice.pth": (twice, r"its entry 'a/data\.pkl' comes twice"),
    "absolute.pth": (lambda: zipped({"/a/data.pkl": GOOD}), r"'/a/data\.pkl' leads outside the archive"),
    "up.pth": (lambda: zipped({"a/data.pkl": GOOD, "a/../../x": b""}), "leads outside the archive"),
    "link.pth": (with_link, "its entry 'a/data/0' leads outside the archive"),
    "packed.pth": (
        lambda: zipped({"a/data.pkl": GOOD, "a/data/0": SIX.tobytes()}, compression=zipfile.ZIP_DEFLATED),
        "its entry 'a/data/0' is compressed or lies about its size",
    ),
    "missing.pth": (lambda: torch_zip(GOOD), "its entry 'a/data/0' is missing"),
    "short.pth": (lambda: torch_zip(GOOD, [bytes(20)]), "storage 0 has 20 bytes for 6 elements of 4"),
    "long.pth": (lambda: torch_zip(GOOD, [bytes(28)]), "storage 0 has 28 bytes for 6 elements of 4"),
    "lying.pth": (  # in the central directory, which comes last: the size after unpacking is 24 bytes in
        lambda: patched(torch_zip(GOOD, [SIX.tobytes()]), b"PK\x01\x02", 24, struct.pack("<I", 4096)),
        "compressed or lies about its size",
    ),
    "bomb.npz": (
        lambda: patched(WHOLE["arrays.npz"], b"PK\x01\x02", 24, struct.pack("<I", 0xF0000000)),
        "claim to unpack to 4,026,531,840: a decompression bomb",
    ),
    "sum.pth": (
        lambda: patched(torch_zip(GOOD, [SIX.tobytes()]), SIX.tobytes(), 1, b"\x01"), "damaged: Bad CRC-32 for file"
    ),
    "locked.pth": (  # flag bits, 8 bytes into the central directory
        lambda: patched(torch_zip(GOOD, [SIX.tobytes()]), b"PK\x01\x02", 8, b"\x01"), "damaged: .*encrypted"
    ),
    "order.pth": (lambda: torch_zip(GOOD, [SIX.tobytes()], byteorder=b"middle"), "its byte order is b'middle'"),
    "sharing.pth": (sharing, "more than 8 times the .* bytes of the file: a bomb of shared storages"),
    "magic.pth": (lambda: torch_legacy(GOOD, magic=7), "holds no tensors by name.*; it is int"),
    "version.pth": (lambda: torch_legacy(GOOD, version=1002), "old container in version 1002, known is 1001"),
    "count.pth": (
        lambda: torch_legacy(GOOD, [SIX.tobytes()], counts=[3]), "storage 0 has not the length that its tensors say"
    ),
    "keys.pth": (lambda: torch_legacy(GOOD, [b"", b""]), "its list of storages names others than its tensors"),
    "no_keys.pth": (lambda: torch_legacy(GOOD), "its storage 0 is missing"),
    "undescribed.pkl": (
        lambda: dictionary(x=call("numpy.core.multiarray", "_reconstruct", name("numpy", "ndarray"), b")", text("b"))),
        "the array x was never described",
    ),
    "archive.npz": (lambda: zipped({"readme.txt": b"hello"}), "its entry 'readme.txt' is no array"),
    "empty.pth": (lambda: b"", "or a damaged one: it begins with b''"),
    "page.pth": (lambda: b"<!DOCTYPE html><html>", "it begins with b'<!DOCTYPE html><html>'"),
    "pointer.pth": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "fetch the file itself, git lfs pull"),
    "old.pth": (lambda: bytes(257) + b"ustar" + bytes(300), "torch's container of before 2017"),
    "type.safetensors": (
        lambda: b"@".ljust(8, b"\0") + b'{"x":{"dtype":"F8_E5M2","shape":[2],"data_offsets":[0,2]}}'.ljust(66),
        "holds numbers of type F8_E5M2; known are F64",
    ),
    "beyond.safetensors": (
        lambda: b"@".ljust(8, b"\0") + b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(64),
        "damaged or truncated: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("filename", DAMAGED)
def test_a_damaged_file_is_refused(filename, tmp_path, nothing_runs):
    make, message = DAMAGED[filename]
    with pytest.raises(WeightsError, match=rf"{filename.replace('.', '[.]')}: .*{message}"):
        read(make(), tmp_path, filename)


def test_any_byte_may_be_wrong(tmp_path, rng):
    """Whatever is changed in a small file: arrays of the right kind come out, or a WeightsError that names it."""
    for kind, whole in WHOLE.items():
        for at in rng.integers(0, len(whole), 80):
            content = bytearray(whole)
            content[at] ^= int(rng.integers(1, 256))
            try:
                found = read(bytes(content), tmp_path, kind)
            except WeightsError as error:
                assert kind in str(error)
            else:
                assert all(isinstance(array, np.ndarray) for array in found.values())


def test_too_long_a_program(tmp_path, monkeypatch):
    monkeypatch.setattr("minidet.weights.unpickling.MOST_STEPS", 100)
    with pytest.raises(WeightsError, match="a pickle of more than 100 instructions"):
        read(b"\x80\x02" + b"N" * 200 + b".", tmp_path)


def test_the_program_of_a_state_can_be_read_by_python(tmp_path):
    """Step by step, with pickletools: texts, shapes and strides are there."""
    import pickletools

    steps = [(operation.name, argument) for operation, argument, _ in pickletools.genops(state_program(STATE))]
    assert steps[0] == ("PROTO", 2) and steps[-1] == ("STOP", None)
    assert ("GLOBAL", "torch._utils _rebuild_tensor_v2") in steps and ("BINUNICODE", "a.weight") in steps
