"""How functions are compiled and kept, and how the machine is set up before the first kernel runs.

`minidet.kernels` imports this file first; it changes nothing that the user has set.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import importlib
import os
import re
import shutil
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import llvmlite.binding as llvm
import numba
from numba import njit
from numba.core import event
from numba.core.caching import IndexDataCacheFile
from numba.core.dispatcher import Dispatcher

SPINS = 1_000_000
"""Turns an idle thread of Numba's OpenMP pool spins before it sleeps.  A training step forks and joins hundreds of
times with little Python in between, and on a virtual machine a thread that sleeps takes long to wake: with 1,000
turns, two threads were hardly faster than one.  No other pool of threads runs in between: float32 convolutions
leave NumPy's matrix products alone, whose own threads would be kept from the cores by the spinning."""

COMPILES = re.compile(rb"^from minidet\.kernels\.(compiler|parallel) import", re.MULTILINE)
"""What a file says whose functions are compiled."""

KEPT_DAYS = 30
"""Compiled code of other sources is kept so long after its last use: somebody may go back and forth."""


@cache
def fingerprint() -> str:
    """A hash of what compiled code depends on and Numba does not look at.

    Numba sees a change in the file of a function, but not in the files that it imports.  So this covers every
    file here, those elsewhere that compile something, Numba's version and the vector width that the environment may
    force.
    """
    digest = hashlib.sha256(numba.__version__.encode() + os.environ.get("MINIDET_LANES", "").encode())
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        text = path.read_bytes()
        if path.is_relative_to(package / "kernels") or COMPILES.search(text):
            digest.update(path.relative_to(package).as_posix().encode() + b"\0" + text)
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Where compiled kernels are kept: a folder per fingerprint.  Those that nobody used for long are deleted."""
    root = _user_cache() / "minidet"
    folder = root / fingerprint()
    if not folder.is_dir():
        for old in root.glob("[0-9a-f]" * 16):
            if time.time() - _last_use(old) > KEPT_DAYS * 86_400:
                shutil.rmtree(old, ignore_errors=True)  # another process may be at it too
    return folder


def _last_use(folder: Path) -> float:
    """When a file in the folder was last read or written, as far as the file system tells."""
    files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return max((max(file.st_atime, file.st_mtime) for file in files), default=0)


def _user_cache() -> Path:
    """The user's cache folder on this system, or a private temporary one where that cannot be written."""
    home = Path.home()
    if sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        folder = home / "Library" / "Caches"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return _private_folder()
    return folder if os.access(folder, os.W_OK) else _private_folder()


def _private_folder() -> Path:
    """A folder for temporary files that only this user can write: code is loaded from it."""
    if not hasattr(os, "getuid"):
        return Path(tempfile.gettempdir())
    folder = Path(tempfile.gettempdir()) / f"minidet-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            return Path(tempfile.mkdtemp(prefix="minidet-"))
    return folder


os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
if not numba.config.CACHE_DIR:
    numba.config.CACHE_DIR = str(cache_folder())


def widen_vectors(features: llvm.FeatureMap) -> None:
    """Have LLVM use all of AVX-512 in ordinary loops too.

    It halves the vectors of most CPUs, for some once slowed their clocks when they saw whole ones.  The convolutions
    use whole ones, so that is no reason here.
    """
    if numba.config.CPU_FEATURES is None and features.get("avx512f"):
        numba.config.CPU_FEATURES = f"{features.flatten()},-prefer-256-bit"


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next array; whether it will.

    A training step frees what the next one allocates again.  Given back to the system in between, every page
    must be fetched and cleared anew.  Only glibc can be asked, and only where the environment says nothing about it.
    """
    asked = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
    if sys.platform != "linux" or any(name in os.environ for name in asked):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, mmap_threshold = -1, -3  # glibc's numbers for the two, with the largest values it takes
    return mallopt is not None and mallopt(trim_threshold, 2**31 - 1) == mallopt(mmap_threshold, 1 << 25) == 1


class KeptCode(IndexDataCacheFile):
    """Compiled functions on disk, each in a file that is named after what it was compiled from and for.

    Numba's own numbers the files, in an index that every process reads, changes and writes.  Two processes that
    compile a function at the same time, for different types, may give both the same number; from then on the
    arguments of one go to the code for the other.  Nor does it look at more sources than one.

    In a folder of the user's choice (NUMBA_CACHE_DIR) nobody deletes what was compiled from older sources.
    """

    def save(self, key, data) -> None:
        """In one step, whatever other processes do."""
        self._save_data(self._file(key), data)

    def load(self, key):
        """What was saved under this key, by whichever process; None if there is nothing that can be read."""
        try:
            return self._load_data(self._file(key))
        except OSError:
            return None

    def _file(self, key) -> str:
        text = repr((fingerprint(), self._source_stamp, key))
        return self._data_name(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))


def inner(function: Callable | None = None, **options):
    """Decorate a function that is compiled as a part of others; options are those of `numba.njit`.

    Without the wrapper by which C would call it, which Numba adds to every function: compiling that takes time, too.
    """
    return njit(function, no_cfunc_wrapper=True, **options)


def compiled(function: Callable | None = None, **options):
    """Decorate a function that Python calls, or threads: as `inner`, and the compiled code is kept on disk."""
    if function is None:
        return lambda function: compiled(function, **options)
    result = inner(function, cache=True, **options)
    if isinstance(result, Dispatcher):  # not where the environment forbids to compile
        result._cache._cache_file.__class__ = KeptCode
    return result


class NoCollection(event.Listener):
    """While Numba compiles, Python does not look for garbage in cycles.

    A compiler makes objects by the million, hardly any of them garbage yet, and Python would go through all of
    them again and again.  Compilations nest; the outermost begins and ends it.
    """

    def __init__(self) -> None:
        self.depth, self.was_on = 0, False

    def on_start(self, event: event.Event) -> None:
        """The outermost compilation stops the collector."""
        if self.depth == 0:
            self.was_on = gc.isenabled()
            gc.disable()
        self.depth += 1

    def on_end(self, event: event.Event) -> None:
        """And starts it again, if it ran before."""
        self.depth -= 1
        if self.depth == 0 and self.was_on:
            gc.enable()


def thread_pool_advice() -> str | None:
    """What to install if Numba has no thread pool but its slow one, "workqueue"; None if all is well.

    A training step forks and joins hundreds of times, which it does far more slowly than OpenMP and TBB.
    """
    for pool in ("omppool", "tbbpool"):
        try:
            importlib.import_module(f"numba.np.ufunc.{pool}")
            return None
        except ImportError:
            continue
    return (
        "Numba finds neither OpenMP nor TBB here and falls back on its slow 'workqueue' threads: "
        "pip install tbb, or install your system's OpenMP library (Debian: libgomp1; macOS: brew install libomp)"
    )


widen_vectors(llvm.get_host_cpu_features())
keep_freed_memory()
event.register("numba:compile", NoCollection())

if advice := thread_pool_advice():
    warnings.warn(advice, RuntimeWarning, stacklevel=2)
