"""Where compiled code lies: a folder for every state of the sources, which nobody else can write to."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numba
import pytest
from llvmlite import binding as llvm

from minidet.kernels import compiler


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The cache folder of a user who has compiled other versions before."""
    monkeypatch.setattr(compiler, "_user_cache", lambda: tmp_path)
    return tmp_path / "minidet"


def compiled(folder, days: float):
    """A folder with code that was last used so many days ago."""
    folder.mkdir(parents=True)
    file = folder / "kernel.nbc"
    file.write_bytes(b"code")
    for path in (file, folder):
        os.utime(path, 2 * (time.time() - days * 86_400,))
    return folder


def test_compiled_code_of_long_ago_is_deleted(root):
    old, recent = compiled(root / ("0" * 16), 31), compiled(root / ("1" * 16), 29)
    other = compiled(root / "somebody else's", 99)
    folder = compiler.cache_folder()
    assert folder.parent == root
    assert [path.exists() for path in (old, recent, other)] == [False, True, True]


def test_nothing_is_deleted_while_the_sources_stay(root):
    compiled(root / compiler.fingerprint(), 0)
    old = compiled(root / ("0" * 16), 31)
    compiler.cache_folder()
    assert old.exists()


def test_the_fingerprint_follows_the_vector_width(monkeypatch):
    before = compiler.fingerprint()
    monkeypatch.setenv("MINIDET_LANES", "4")
    assert compiler.fingerprint.__wrapped__() != before


@pytest.mark.parametrize("changed", ["kernels/convolution/cpu/lanes.py", "data/drawing.py", "ops/shape.py"])
def test_the_fingerprint_follows_the_sources_of_compiled_code(changed, monkeypatch):
    read = Path.read_bytes
    before = compiler.fingerprint()
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + path.as_posix().endswith(changed) * b"#")
    assert (compiler.fingerprint.__wrapped__() != before) == (changed != "ops/shape.py")


def test_code_for_other_sources_is_not_taken(tmp_path, monkeypatch):
    kept = compiler.KeptCode(str(tmp_path), "f", "source")
    kept.save("ints", "for ints")
    monkeypatch.setattr(compiler, "fingerprint", lambda: "other")
    assert kept.load("ints") is None


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="folders have no owners here")
def test_a_temporary_cache_is_private(tmp_path, monkeypatch):
    monkeypatch.setattr(compiler.tempfile, "tempdir", str(tmp_path))
    folder = compiler._private_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert compiler._private_folder() == folder
    folder.chmod(0o777)  # anybody could have put code there
    assert compiler._private_folder() != folder
    folder.rmdir()
    folder.symlink_to(tmp_path)
    assert compiler._private_folder() not in (folder, tmp_path)


@pytest.mark.parametrize(
    ("avx512", "told", "want"),
    [
        (True, None, "+avx512f,+fma,-prefer-256-bit"),
        (False, None, None),
        (True, "+sse4.2", "+sse4.2"),
    ],
)
def test_loops_use_the_widest_vectors_unless_told_otherwise(avx512, told, want, monkeypatch):
    monkeypatch.setattr(numba.config, "CPU_FEATURES", told)
    compiler.widen_vectors(llvm.FeatureMap({"fma": True, "avx512f": avx512}))
    assert numba.config.CPU_FEATURES == want


def test_two_processes_that_compile_at_once_do_not_mix_up_their_code(tmp_path):
    """Before the first writes anything, the second writes all of its own."""

    class Interrupted(compiler.KeptCode):
        def _open_for_write(self, path):
            if self is first and not others:
                others.append(compiler.KeptCode(str(tmp_path), "f", "source"))
                others[0].save("ints", "for ints")
            return super()._open_for_write(path)

    others, first = [], Interrupted(str(tmp_path), "f", "source")
    first.save("floats", "for floats")
    kept = compiler.KeptCode(str(tmp_path), "f", "source")
    assert [kept.load(key) for key in ("ints", "floats", "none")] == ["for ints", "for floats", None]
    assert compiler.KeptCode(str(tmp_path), "f", "another source").load("ints") is None


def add_one(number):
    return number + 1


@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="nothing is compiled")
def test_a_compiled_function_is_kept_for_the_next_process(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    assert (compiler.compiled(add_one)(1), compiler.compiled(error_model="numpy")(add_one)(1.5)) == (2, 2.5)
    assert len(list(tmp_path.rglob("*.nbc"))) == 2
    again = compiler.compiled(add_one)
    assert again(1) == 2
    assert sum(again.stats.cache_hits.values()) == 1
