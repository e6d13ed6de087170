"""A fast kernel proves itself on every new CPU, once, on the first real arguments it gets.

Compiled code depends on the machine: vector instructions, compilers, thread pools.  So the first time that a
fast version runs on a CPU, its definition runs too, on copies of the same arguments, and the two must agree.
The result is remembered beside the compiled code, for this CPU and these sources.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numba
import numpy as np
from llvmlite import binding as llvm

from minidet.kernels.compiler import fingerprint

MOST_ELEMENTS = 1 << 23
"""Arguments larger than this, together, prove nothing now: the definition would be long.  A later call will."""

TOLERANCE = {"float32": 1e-3, "float64": 1e-8}
"""Largest error relative to the largest value.  Not a test of rounding, which the suite does, but of right and
wrong: a miscompiled kernel is off by whole values."""


def cpu() -> str:
    """This machine's processor and the instructions it has."""
    features = ",".join(sorted(name for name, there in llvm.get_host_cpu_features().items() if there))
    return f"{llvm.get_host_cpu_name()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


@cache
def _ledger_name() -> str:
    return f"trusted-{cpu()}-{fingerprint()}.txt"


def _ledger() -> Path:
    return Path(numba.config.CACHE_DIR) / _ledger_name()


def _recorded() -> set[str]:
    try:
        return set(_ledger().read_text().split())
    except OSError:  # none yet, or the folder cannot be read: then prove everything again
        return set()


_trusted: set[str] | None = None  # read at the first question


def trusted(name: str) -> bool:
    """Whether this version has proved itself on this CPU."""
    return name in _known()


def _known() -> set[str]:
    global _trusted
    if _trusted is None:
        _trusted = _recorded()
    return _trusted


def first_run() -> bool:
    """Whether nothing was ever compiled and proved here, so that the first calls take their time.

    What another process proves from now on, this one still proves for itself.
    """
    return not _known() and not numba.config.DISABLE_JIT


def prove(name: str, fast: Callable, textbook: Callable, args: tuple):
    """(result, whether to go on using `fast`): both versions run, and the definition's word counts."""
    arrays = [a for a in args if isinstance(a, np.ndarray)]
    # Nothing in, nothing out: arrays without elements prove nothing either, as when an image has no object.
    if sum(a.size for a in arrays) > MOST_ELEMENTS or not all(a.size for a in arrays):
        return fast(*args), True
    copies = tuple(a.copy() if isinstance(a, np.ndarray) else {} if isinstance(a, dict) else a for a in args)
    with np.errstate(all="ignore"):
        want = textbook(*copies)
    kept = [a.copy() for a in arrays]
    got = fast(*args)
    written = [a for a in copies if isinstance(a, np.ndarray)]
    # A kernel may write to its arguments: they are compared as well as the results.
    error = difference(_arrays(got), _arrays(want)) or difference(arrays, written)
    if error is None:
        _trusted.add(name)
        if not numba.config.DISABLE_JIT:  # else it was Python that was right, not what will be compiled
            _remember(name)
        return got, True
    for array, old, right in zip(arrays, kept, written, strict=True):
        if not np.array_equal(array, old, equal_nan=array.dtype.kind == "f"):
            array[...] = right
    warnings.warn(
        f"the fast kernel {name} disagrees with its definition on this CPU ({cpu()}): {error}.  The definition "
        "is used instead, which is slower and right; please report this with the output of `numba -s`",
        RuntimeWarning,
        stacklevel=4,
    )
    return want, False


def difference(got: list[np.ndarray], want: list[np.ndarray]) -> str | None:
    """What is different, in words; None if nothing is beyond rounding."""
    if len(got) != len(want):
        return f"{len(got)} results instead of {len(want)}"
    for g, w in zip(got, want, strict=True):
        if g.shape != w.shape or g.dtype != w.dtype:
            return f"{g.dtype} {g.shape} instead of {w.dtype} {w.shape}"
        if w.dtype.kind != "f":
            if not np.array_equal(g, w):
                return f"{np.count_nonzero(g != w)} of {w.size} decisions differ"
            continue
        finite = np.isfinite(w)
        if not np.array_equal(finite, np.isfinite(g)):
            return "other numbers are infinite or NaN"
        scale = np.abs(w[finite]).max(initial=0)
        error = np.abs(g[finite] - w[finite]).max(initial=0)
        if error > TOLERANCE.get(w.dtype.name, 1e-3) * max(scale, np.finfo(w.dtype).tiny):
            return f"off by {error:.3g} where the largest value is {scale:.3g}"
    return None


def _arrays(results) -> list[np.ndarray]:
    results = results if isinstance(results, tuple) else (results,)
    return [np.asarray(r) for r in results if r is not None]


def _remember(name: str) -> None:
    ledger = _ledger()
    try:
        ledger.parent.mkdir(parents=True, exist_ok=True)
        with open(ledger, "a") as file:  # one short line: appended whole, whatever other processes do
            file.write(f"{name}\n")
    except OSError as error:
        warnings.warn(f"cannot remember in {ledger} which kernels are right on this CPU: {error}", stacklevel=5)
