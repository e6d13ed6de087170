"""A fake GPU's streams, events and memory.

What another stream than the null stream is told to do, it does at the last moment: when somebody waits for it.  So
whoever forgets to wait finds the memory as it was before, and whoever overwrites what a copy has yet to read sees it
in the copy.
"""

from __future__ import annotations

from collections import deque
from threading import RLock

ORDERS: list[tuple[str, str, object]] = []
"""Which stream was told to do what, in the order of telling: ("null" or "own", what, an event or what is copied)."""

_one_at_a_time = RLock()


class Stream:
    """The null stream does at once what it is told; another one when an event that comes later is waited for."""

    null: Stream

    def __init__(self, null=False, non_blocking=False):
        assert null or non_blocking, "another stream that blocks would wait for the null stream, and it for that one"
        self._todo = None if null else deque()

    def order(self, what: str, about: object, work) -> None:
        with _one_at_a_time:
            ORDERS.append(("null" if self._todo is None else "own", what, about))
            if self._todo is None:
                work()
            else:
                self._todo.append(work)

    def run_until(self, event: Event) -> None:
        with _one_at_a_time:
            while not event.done:
                self._todo.popleft()()

    def synchronize(self) -> None:
        with _one_at_a_time:
            while self._todo:
                self._todo.popleft()()

    def wait_event(self, event: Event) -> None:
        self.order("wait", event, event.finish)


Stream.null = Stream(null=True)


class Event:
    """As CuPy's: one that was never recorded is done."""

    waits: list[str]  # where the host waited for one that was not done

    def __init__(self, block=False, disable_timing=False):
        self._stream, self._recorded, self._reached = Stream.null, 0, 0

    @property
    def done(self) -> bool:
        return self._reached == self._recorded

    def record(self, stream=None) -> None:
        self._stream, self._recorded = stream or Stream.null, self._recorded + 1
        number = self._recorded

        def reach() -> None:
            self._reached = number

        self._stream.order("record", self, reach)

    def finish(self) -> None:
        if not self.done:
            self._stream.run_until(self)

    def synchronize(self) -> None:
        if not self.done:
            self.waits.append("an event")
        self.finish()


class PinnedMemory(bytearray):
    """Memory of the host that a GPU can read; of unknown content."""


def alloc_pinned_memory(size):
    return PinnedMemory(b"\xcc" * (-(-size // 512) * 512))  # CuPy's pool rounds up


class MemoryPool:
    """That of a GPU which nobody uses."""

    def used_bytes(self) -> int:
        return 0

    def total_bytes(self) -> int:
        return 0


class Device:
    """The only one."""

    def __init__(self, device=None):
        self.id = 0

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other) -> bool:
        return isinstance(other, Device)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        pass
