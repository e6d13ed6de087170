"""CUDA kernels on a CPU: g++ compiles the source beside cuda_serial.h, and a loop is the grid."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from minidet.kernels import precision

HEADER = Path(__file__).parent / "cuda_serial.h"
KERNEL = re.compile(r'extern "C" __global__ void (\w+)\(([^)]*)\)')
POINTERS = {"long long": np.int64, "int": np.int32, "unsigned char": np.uint8, "bool": np.bool_, "double": np.float64}
NUMBERS = {"long long": (int, ctypes.c_longlong), "double": (float, ctypes.c_double), "bool": (bool, ctypes.c_bool)}


@cache
def compile(source: str, real: str) -> dict:
    """The kernels of a source by name, each a function of grid, block and arguments, NumPy arrays among them."""
    if not shutil.which("g++"):
        pytest.skip("needs g++, to run CUDA kernels on the CPU")
    found = {name: [p.strip() for p in parameters.split(",")] for name, parameters in KERNEL.findall(source)}
    launchers = "".join(
        f'extern "C" void launch_{name}(int grid_size, int block_size, {", ".join(parameters)}) {{ '
        f"GRID({name}({', '.join(re.split(r'[ *]', p)[-1] for p in parameters)})) }}\n"
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
    narrow = precision.bfloat16(np) if real.endswith("Bfloat16") else None
    wide = np.dtype(np.float64 if real.endswith("double") else np.float32)
    types = POINTERS | {"REAL": narrow or wide, "Wide": wide}
    return {name: _launcher(getattr(library, f"launch_{name}"), p, types) for name, p in found.items()}


def _launcher(function, parameters: list[str], types: dict):
    def run(grid, block, args):
        assert len(grid) == len(block) == 1 and len(args) == len(parameters), (grid, block, parameters)
        passed = []
        for parameter, arg in zip(parameters, args, strict=True):
            kind = re.sub(r"const |__restrict__|\w+$", "", parameter).strip()
            if kind.endswith("*"):
                assert isinstance(arg, np.ndarray), f"{parameter}: got {type(arg)}"
                assert arg.dtype == types[kind[:-1].strip()], f"{parameter}: got {arg.dtype}"
                assert arg.flags.c_contiguous, f"{parameter}: strides {arg.strides} of {arg.shape} would be ignored"
                assert "const" in parameter or arg.flags.writeable, f"{parameter}: cannot be written to"
                passed.append(arg.ctypes.data_as(ctypes.c_void_p))
            else:
                python, c = NUMBERS[kind]
                assert type(arg) is python, f"{parameter}: got {type(arg)}"  # CuPy passes what it gets, unconverted
                passed.append(c(arg))
        function(grid[0], block[0], *passed)

    return run
