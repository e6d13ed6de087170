"""A kernel is an array function with a definition, and faster functions that must equal it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import update_wrapper

from minidet import backend
from minidet.kernels import trust
from minidet.kernels.precision import is_bfloat16, rounded_once

_only: ContextVar[str | None] = ContextVar("only", default=None)


@contextmanager
def only(version: str):
    """Inside, every kernel that has a version of this name uses it; "textbook" is one."""
    token = _only.set(version)
    try:
        yield
    finally:
        _only.reset(token)


class Kernel:
    """An array function that is *defined* by its textbook version.

    The textbook version is written in the Array API standard only, so it runs on any library; it is
    what a reader reads.  Faster versions are registered right below it with
    `@name.faster_on("numpy", when=rule)` and must give the same answer (tests/test_kernels.py holds
    every one to it).

    Calling the kernel runs the first version, in order of registration, for the library that owns the
    first argument whose rule accepts the arguments; else the textbook.  Before a CPU sees the first result
    of a fast version, trust.py compares it with the definition's.
    """

    def __init__(self, textbook: Callable) -> None:
        update_wrapper(self, textbook)
        self.textbook = textbook
        self.fast: dict[str, tuple[str, Callable, Callable]] = {}
        self.narrow: set[str] = set()
        self.many: dict[str, Callable] = {}
        self._proved: set[tuple] = set()
        """Versions for NumPy, and dtypes of the first argument, that trust.py knows to be right on this CPU."""

    def faster_on(
        self, library: str, version: str = "fast", *, when: Callable = lambda *_: True, narrow=False, many=False
    ) -> Callable:
        """Register the decorated function for arrays of `library` whenever `when(*args)` holds.

        Bfloat16 it gets only if it is made for that, `narrow`; else it computes in float32 (`rounded_once`).  One for
        `many` calls takes a list of their arguments and gives a list of their results, or None if it will not take
        them together; if `when` holds it takes each alone.
        """

        def register(implementation: Callable) -> Callable:
            name = f"{library}:{version}"
            if name in self.fast:
                raise ValueError(f"{self.__name__} already has a version {name!r}")
            self.fast[name] = (library, when, (lambda *args: implementation([args])[0]) if many else implementation)
            self.narrow |= {name} if narrow else set()
            self.many |= {name: implementation} if many else {}
            return implementation

        return register

    def each(self, calls: Sequence[tuple]) -> Sequence:
        """[self(*args) for args in calls], all at once where a version does that and has proved itself."""
        version = self.choose(*calls[0])[0] if calls else ""
        together = version in self.many and self._has_proved_itself(version, calls[0][0].dtype)
        return (together and self.many[version](calls)) or [self(*args) for args in calls]

    def choose(self, *args) -> tuple[str, Callable]:
        """The version a call with these arguments runs, by name: tests assert it."""
        wanted = _only.get()
        if wanted != "textbook" and self.fast:
            library = backend.library(args[0])
            for name, (owner, when, implementation) in self.fast.items():
                if owner == library and (wanted is None or wanted == name.split(":")[1]) and when(*args):
                    return name, implementation
        return "textbook", self.textbook

    def __call__(self, *args):
        """The result for these arguments, from the version that `choose` names."""
        version, run = self.choose(*args)
        if self._has_proved_itself(version, args[0].dtype):
            return run(*args)
        if is_bfloat16(args[0]) and version not in self.narrow:
            return rounded_once(self, args)
        if not version.startswith("numpy:"):
            return run(*args)
        result, right = trust.prove(self._name(version, args[0].dtype), run, self.textbook, args)
        if not right:
            # A new dictionary: another thread may be going through the old one.
            self.fast = {other: entry for other, entry in self.fast.items() if other != version}
        return result

    def _has_proved_itself(self, version: str, dtype) -> bool:
        """Whether a version for NumPy may run without further questions."""
        if (version, dtype) in self._proved:  # nearly always; what follows costs more than some kernels
            return True
        if not version.startswith("numpy:") or not trust.trusted(self._name(version, dtype)):
            return False
        self._proved.add((version, dtype))
        return True

    def _name(self, version: str, dtype) -> str:
        """Of a version for a dtype, in the ledger of those that are trusted."""
        return f"{self.__module__}.{self.__name__}/{version}/{dtype}"
