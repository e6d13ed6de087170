"""CUDA kernels on a CPU: g++ compiles the source beside cuda_serial.h, and a loop is the grid."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from fake_launches import Parameter, signatures

HEADER = Path(__file__).parent / "cuda_serial.h"
NUMBERS = {
    "long long": ctypes.c_longlong, "int": ctypes.c_int, "double": ctypes.c_double, "float": ctypes.c_float,
    "bool": ctypes.c_bool,
}  # fmt: skip


@cache
def compile(source: str, real: str) -> dict:
    """The kernels of a source by name, each a function of grid, block and arguments, checked and NumPy's."""
    if not shutil.which("g++"):
        pytest.skip("needs g++, to run CUDA kernels on the CPU")
    found = {name: signature.parameters for name, signature in signatures(source, (real,)).items()}
    launchers = "".join(
        f'extern "C" void launch_{name}(int grid_size, int block_size, {", ".join(map(str, parameters))}) {{ '
        f"GRID({name}({', '.join(p.name for p in parameters)})) }}\n"
        for name, parameters in found.items()
    )
    folder = Path(tempfile.mkdtemp(prefix="minidet-cuda-"))
    (folder / "kernels.cpp").write_text(f'#include "{HEADER}"\n{source}\n{launchers}')
    # As nvcc is told: no product is merged with a sum.
    flags = ("-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-fno-strict-aliasing", "-Wall", real)
    done = subprocess.run(
        ["g++", *flags, "kernels.cpp", "-o", "kernels.so"], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(folder / "kernels.so"))
    shutil.rmtree(folder)
    return {name: _launcher(getattr(library, f"launch_{name}"), parameters) for name, parameters in found.items()}


def _launcher(function, parameters: tuple[Parameter, ...]):
    def run(grid, block, args):
        assert {1, *grid[1:], *block[1:]} == {1}, (grid, block)
        function(grid[0], block[0], *map(_passed, parameters, args))

    return run


def _passed(parameter: Parameter, arg):
    if parameter.pointer:
        return ctypes.c_void_p(arg.ctypes.data if isinstance(arg, np.ndarray) else None)
    return NUMBERS[parameter.type](arg)
