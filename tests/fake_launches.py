"""What neither CuPy nor a GPU checks about a launch: arguments against the kernel's signature, sizes against limits.

CuPy hands a kernel the bytes it is given: an int as 64 bits, a float as a double, a bool as one byte, NumPy's scalars
as they are, of an array where it begins.  Nothing is converted to what the kernel expects.
Source: cupy/cuda/function.pyx, `_pointer`; CUDA Programming Guide, "Technical Specifications per Compute Capability".
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest

KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\((\w+)\)\s+)?(\w+)\(([^)]*)\)')
ELEMENTS = {
    "bool": "bool", "unsigned char": "uint8", "int": "int32", "long long": "int64", "float": "float32",
    "double": "float64", "Bfloat16": "bfloat16", "Place": "int32", "Plan": "int32",
}  # fmt: skip
"""What an array holds that is passed for a pointer to such a type."""
SCALARS = {
    bool: "bool", int: "long long", float: "double", np.bool_: "bool", np.uint8: "unsigned char", np.int32: "int",
    np.int64: "long long", np.float32: "float", np.float64: "double",
}  # fmt: skip
"""As what CuPy passes a number."""

GRID, BLOCK, THREADS = (2**31 - 1, 65535, 65535), (1024, 1024, 64), 1024
SHARED, MOST_SHARED = 48 << 10, 227 << 10
"""Bytes of shared memory for a block: for every kernel, and for one that has asked for more on a Hopper."""


@dataclass(frozen=True)
class Parameter:
    """`const float *x` is type "float", pointer, constant, name "x"."""

    type: str
    pointer: bool
    constant: bool
    name: str

    def __str__(self) -> str:
        return f"{'const ' * self.constant}{self.type} {'*' * self.pointer}{self.name}"


@dataclass(frozen=True)
class Signature:
    """What a source says of a kernel; `shared`: whether it has shared memory whose size the launch gives."""

    name: str
    parameters: tuple[Parameter, ...]
    threads: int
    shared: bool


@cache
def signatures(source: str, options: tuple[str, ...] = ()) -> dict[str, Signature]:
    """The kernels of a source by name, after its macros."""
    if not shutil.which("g++"):
        pytest.skip("needs g++, to read CUDA sources")
    defined = [option for option in options if option.startswith("-D")]
    command = ["g++", "-E", "-P", "-x", "c++", "-D__CUDACC__", *defined, "-"]
    text = subprocess.run(command, input=source, capture_output=True, text=True, check=True, timeout=60).stdout
    text = re.sub(r"\bWide\b", "double" if "-DREAL=double" in defined else "float", text)
    found = {}
    for bound, name, parameters in KERNEL.findall(text):
        if bound and not bound.isdigit():
            bound = re.search(rf"\b{bound} = (\d+)", text)[1]
        parsed = tuple(map(_parameter, parameters.split(",")))
        found[name] = Signature(name, parsed, int(bound or THREADS), "extern __shared__" in text)
    return found


def _parameter(text: str) -> Parameter:
    words = re.findall(r"\w+|\*", text.replace("__restrict__", ""))
    kind = " ".join(word for word in words[:-1] if word not in ("const", "*"))
    return Parameter(kind, "*" in words, "const" in words, words[-1])


def check(signature: Signature, grid, block, args, shared_mem: int, allowed: int, array: type) -> None:
    """Refuse a launch that would be an error or nonsense; arrays on the device are of type `array`."""
    name, parameters = signature.name, signature.parameters
    for what, sizes, limits in (("grid", grid, GRID), ("block", block, BLOCK)):
        assert isinstance(sizes, tuple) and 1 <= len(sizes) <= 3, f"{name}: {what} {sizes!r}"
        for size, limit in zip(sizes, limits, strict=False):
            assert isinstance(size, int) and 1 <= size <= limit, f"{name}: {what} {sizes}, limits {limits}"
    threads = int(np.prod(block))
    assert threads <= signature.threads, f"{name}: {threads} threads in a block, at most {signature.threads}"
    assert bool(shared_mem) == signature.shared, f"{name}: {shared_mem} bytes of shared memory, or there is none"
    assert 0 <= shared_mem <= allowed <= MOST_SHARED, f"{name}: {shared_mem} bytes of shared memory of {allowed}"
    assert len(args) == len(parameters), f"{name}: {len(args)} arguments for {len(parameters)} parameters"
    for parameter, arg in zip(parameters, args, strict=True):
        _check_argument(f"{name}: {parameter.name}", parameter, arg, array)


def _check_argument(where: str, parameter: Parameter, arg, array: type) -> None:
    if not parameter.pointer:
        passed, kind = SCALARS.get(type(arg)), type(arg).__name__
        assert passed == parameter.type, f"{where} is {parameter.type}, got {kind}, passed as {passed}"
        assert type(arg) is not int or -(2**63) <= arg < 2**63, f"{where}: {arg} has more than 64 bits"
        return
    if type(arg) is np.int64 and arg == 0:
        return  # a null pointer
    assert isinstance(arg, array), f"{where} is a pointer, got {type(arg).__name__}: not an array on the device"
    held = {"uint16": "bfloat16"}.get(arg.dtype.name, arg.dtype.name)  # where nobody has bfloat16, its bits
    assert held == ELEMENTS[parameter.type], f"{where} points to {parameter.type}, got {held}"
    assert arg.flags.c_contiguous, f"{where}: strides {arg.strides} of {arg.shape} would be ignored"
    assert parameter.constant or arg.flags.writeable, f"{where}: cannot be written to"


class Kernel:
    """A kernel as CuPy has it, whose launches are checked; `run(grid, block, args)` then does its work."""

    def __init__(self, signature: Signature, run: Callable, array: type) -> None:
        self.signature, self.run, self.array = signature, run, array
        self.max_dynamic_shared_size_bytes = SHARED

    def __call__(self, grid, block, args, *, shared_mem=0):
        check(self.signature, grid, block, args, shared_mem, self.max_dynamic_shared_size_bytes, self.array)
        self.run(grid, block, args)
