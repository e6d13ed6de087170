"""What a GPU does for the convolutions, on NumPy arrays: in the place of cuBLAS, and of the kernels in shift.cu."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np


def wide(x):
    """Numbers of any kind as float64; 16 bits are a bfloat16."""
    if x is None:
        return None
    return (x.astype(np.uint32) << 16).view(np.float32).astype(float) if x.dtype == np.uint16 else x.astype(float)


def matrices(stack, rows, columns, count):
    """All elements of the stack as (count, rows, columns); they lie inside of its array."""
    array, size = stack.array.reshape(-1), stack.array.itemsize
    last = stack.start + (count - 1) * stack.step + (rows - 1) * stack.pitch + columns
    assert 0 <= stack.start and last <= array.size
    assert stack.pitch >= columns, "cuBLAS refuses rows that overlap"
    strides = (stack.step * size, stack.pitch * size, size)
    return np.lib.stride_tricks.as_strided(array[stack.start :], (count, rows, columns), strides)


def multiply(c, a, b, shape, count, *, a_transposed=False, b_transposed=False, add=False):
    """`cuda.multiply` on NumPy."""
    m, n, k = shape
    left = matrices(a, k, m, count).swapaxes(1, 2) if a_transposed else matrices(a, m, k, count)
    right = matrices(b, n, k, count).swapaxes(1, 2) if b_transposed else matrices(b, k, n, count)
    target = matrices(c, m, n, count)
    assert target.dtype != np.uint16
    target[...] = wide(left) @ wide(right) + (target if add else 0)


def ends_of_shift(name, args):
    """The two kernels of shift.cu, for numbers of any kind."""
    images, H, W, C, _, start, before, rows = map(int, args[2 if name.startswith("spread") else 5])
    shape = (images, H + 1, W + 1, C)
    if name.startswith("spread"):
        x, rim, _ = args
        assert rim.shape == (rows, C)
        rim[...] = 0
        inner = rim[before : before + math.prod(shape[:3])].reshape(shape)
        inner[:, :H, :W] = x[:, start : start + H * W].reshape(images, H, W, C)
        return
    sums, scale, bias, shortcut, y, _, relu = args
    scale, bias, shortcut = (a if isinstance(a, np.ndarray) else None for a in (scale, bias, shortcut))  # else null
    level = sums[: math.prod(shape[:3])].reshape(shape)[:, :H, :W].reshape(images, H * W, C)
    level = level * (1 if scale is None else scale) + (0 if bias is None else bias)
    level = level + (0 if shortcut is None else shortcut[:, start : start + H * W])
    y[:, start : start + H * W] = np.maximum(level, 0) if relu else level


def kernels_of_shift(names) -> dict:
    """By name, as `cuda_serial.compile` gives those of other files."""
    return {name: lambda grid, block, args, name=name: ends_of_shift(name, args) for name in names}


def on_bare_arrays(monkeypatch, cuda, bare) -> None:
    """The convolutions' `cuda` on arrays of which `bare` gives NumPy's.

    The GPU is older than those whose tensor cores the implicit product needs: its emulator is too slow for networks.
    """

    def stripped(stack):
        return replace(stack, array=bare(stack.array))

    def product(c, a, b, *rest, **how):
        multiply(stripped(c), stripped(a), stripped(b), *rest, **how)

    for name, stand_in in {"device": lambda: 0, "capability": lambda device: 75, "multiply": product}.items():
        monkeypatch.setattr(cuda, name, stand_in)
