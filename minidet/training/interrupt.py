"""Ctrl-C as a request that is granted between two steps, where there is something consistent to save."""

from __future__ import annotations

import signal
import sys
import threading


class Stopped(KeyboardInterrupt):
    """The training was interrupted between two steps, in all its processes, and is saved."""


class Interrupt:
    """Inside `with Interrupt() as interrupt`, Ctrl-C or SIGTERM sets `interrupt.requested`; twice acts at once.

    mpiexec passes both on to every process; of those only one, not `quiet`, answers.  Signals belong to the main
    thread: in any other this does nothing.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, *, quiet: bool = False):
        self.requested, self.quiet = False, quiet
        self._before = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if not self.quiet:
            print("\nstopping after this step; once more stops at once, without saving", file=sys.stderr)
