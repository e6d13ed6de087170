"""Where coverage may rest inside a test: a program that is traced, no matter where, takes up to twice as long."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable


def untraced(function: Callable) -> Callable:
    """The function without coverage looking: for what is not ours, or what ran before in the same test.

    Coverage keeps a stack of its own of the calls it saw, so it must look again in the frame where it stopped.
    """

    @functools.wraps(function)
    def resting(*arguments, **named):
        trace = sys.gettrace()
        sys.settrace(None)
        try:
            return function(*arguments, **named)
        finally:
            sys.settrace(trace)

    return resting
