"""The package's CUDA kernels on a CPU: compiled as C++ with cuda_emulator.h, called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from fake_launches import Kernel, signatures
from source import PACKAGE

HERE, SOURCES = Path(__file__).parent, PACKAGE / "kernels/convolution/gpu"


@functools.cache
def library(file: str) -> ctypes.CDLL:
    """The emulated kernels of a .cu file; the test is skipped where there is no C++ compiler."""
    return compiled(SOURCES, file)


def compiled(sources: Path, file: str) -> ctypes.CDLL:
    """The kernels of `file` in the folder `sources`."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to compile the CUDA kernels for the emulator")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "emulated.so"
        options = [
            *("-std=c++17", "-O1", "-fPIC", "-shared", "-fno-gnu-unique", "-U_FORTIFY_SOURCE"),
            *("-Wall", "-Werror", "-Wno-clobbered", "-Wno-unknown-pragmas", "-Wno-unused-function"),
            *(f"-I{sources}", f"-I{HERE}"),
        ]
        wrapper = HERE / f"emulated_{file.removesuffix('.cu')}.cpp"
        done = subprocess.run(
            [compiler, *options, str(wrapper), "-o", str(target)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        loaded = ctypes.CDLL(str(target))
    loaded.conflicts.restype = ctypes.c_longlong
    return loaded


def kernel(file: str, name: str, device: int = 0, emulator=None) -> Kernel:
    """What `cuda._kernel` gives, for NumPy arrays: a mistake that is seen is an AssertionError."""
    emulator = emulator or library(file)
    launch = getattr(emulator, f"launch_{name}")
    launch.restype = ctypes.c_char_p

    def run(grid, block, args) -> None:
        emulator.forget_arrays()
        passed = []
        for argument in args:
            if isinstance(argument, np.ndarray):
                emulator.know_array(ctypes.c_void_p(argument.ctypes.data), ctypes.c_longlong(argument.nbytes))
                argument = ctypes.c_void_p(argument.ctypes.data)
            passed.append(np.ctypeslib.as_ctypes(argument) if isinstance(argument, np.generic) else argument)
        message = launch(*map(int, grid), *passed).decode()
        assert not message, f"{name}: {message}"

    return Kernel(signatures((SOURCES / file).read_text())[name], run, np.ndarray)
