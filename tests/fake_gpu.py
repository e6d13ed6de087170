"""The backend "cupy" on a fake GPU, with all that has to be forgotten before and after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import fake_cupy
import pytest
import stand_ins

from minidet import backend, kernels
from minidet.kernels.convolution.gpu import cuda


@contextmanager
def fake_gpu() -> Iterator[ModuleType]:
    """Inside, `backend.load("cupy")` is fake_cupy.py; the module, whose `counts` say who waited for it."""
    with pytest.MonkeyPatch.context() as patch, fake_cupy.installed():
        _forget()  # kernels of a real one
        patch.setattr(backend, "_cupy_checked", True)  # nothing to count yet
        stand_ins.on_bare_arrays(patch, cuda, fake_cupy.bare)
        yield fake_cupy
        _forget()


def _forget() -> None:
    for remembered in (backend.cuda_module, kernels.cuda._kernel, cuda._kernel):
        remembered.cache_clear()
