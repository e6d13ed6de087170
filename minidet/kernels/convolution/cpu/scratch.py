"""Memory that a kernel needs only while it runs: the same again in the next call."""

from __future__ import annotations

import threading

import numpy as np

_kept = threading.local()


def scratch(purpose: str, size: int) -> np.ndarray:
    """`size` float32 numbers, undefined; until this thread asks for the same purpose again.

    Fresh memory costs more than the work on it: the system hands it out page by page, each filled with zeros at
    its first touch.  A thread keeps the largest array that it ever needed for a purpose.
    """
    arrays = _kept.__dict__
    if purpose not in arrays or arrays[purpose].size < size:
        arrays[purpose] = np.empty(size, dtype=np.float32)
    return arrays[purpose][:size]
