"""How often a GPU is told to do something, counted in Python: CuPy has no count of its own.

A captured stream would tell exactly, but CuPy refuses cuBLAS in one.  So three things are counted: kernels of our own;
matrix products, by cuBLAS; and calls of CuPy's functions and operators that make or change an array, each of which
starts at least one kernel.  Views, shapes, and copies from and to the host start none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from minidet import backend, kernels
from minidet.kernels.convolution.gpu import cuda

PRODUCTS = ("matmul", "tensordot", "vecdot", "__matmul__", "__rmatmul__")
NO_KERNEL = ("array", "asarray", "empty", "empty_like", "from_dlpack")
"""They make arrays, and start no kernel."""
METHODS = (
    "astype", "copy", "fill", "sum", "__getitem__", "__setitem__", "__matmul__", "__rmatmul__",
    "__neg__", "__abs__", "__invert__", "__lt__", "__le__", "__eq__", "__ne__", "__gt__", "__ge__",
    *(f"__{i}{name}__" for i in ("", "r", "i") for name in "add sub mul truediv floordiv mod pow and or xor".split()),
)  # fmt: skip


@contextmanager
def counted(xp) -> Iterator[dict[str, int]]:
    """What is started inside: {"own": ..., "cublas": ..., "cupy": ...}."""
    counts, array, depth = {"own": 0, "cublas": 0, "cupy": 0}, backend.cuda().ndarray, 0

    def counting(function: Callable, kind: Callable[[tuple, object], str | None]) -> Callable:
        def call(*args, **kwargs):
            nonlocal depth
            depth += 1
            try:
                result = function(*args, **kwargs)
            finally:
                depth -= 1
            if depth == 0 and (found := kind(args, result)):  # what CuPy calls for it is part of it
                counts[found] += 1
            return result

        return call

    def in_library(name: str) -> Callable[[tuple, object], str | None]:
        changes = name in ("__setitem__", "fill", "at") or (name[:3] == "__i" and name != "__invert__")

        def kind(args: tuple, result: object) -> str | None:
            results = result if isinstance(result, tuple | list) else (result,)
            new = any(isinstance(a, array) and a.base is None and not any(a is b for b in args) for a in results)
            return ("cublas" if name in PRODUCTS else "cupy") if new or changes else None

        return kind

    def lookup(found: Callable) -> Callable:
        return lambda *names: counting(found(*names), lambda args, result: "own")

    before = []

    def put(owner: object, name: str, value: object) -> None:
        before.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, value)

    try:
        for module in (kernels.cuda, cuda):
            put(module, "_kernel", lookup(module._kernel))
        put(cuda, "multiply", counting(cuda.multiply, lambda args, result: "cublas"))
        for name in METHODS:
            if hasattr(array, name):
                put(array, name, counting(getattr(array, name), in_library(name)))
        for name, function in list(vars(xp).items()):
            if callable(function) and not isinstance(function, type) and name[0] != "_" and name not in NO_KERNEL:
                put(xp, name, counting(function, in_library(name)))
                if hasattr(function, "at"):
                    getattr(xp, name).at = counting(function.at, in_library("at"))
        yield counts
    finally:
        for owner, name, value in reversed(before):
            delattr(owner, name) if value is None else setattr(owner, name, value)
