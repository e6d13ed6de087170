"""How fast this machine multiplies: the register tile on numbers that lie in the first-level cache."""

from __future__ import annotations

import time

import numpy as np
from numba import get_num_threads

from minidet.kernels.convolution.cpu.lanes import ROWS, VECTORS, WIDTH
from minidet.kernels.convolution.cpu.microkernel import multiply_tile
from minidet.kernels.parallel import parallel

DEPTH = 128
REPEATS = 20_000


def peak_gflops() -> float:
    """The best of several tries on all threads; two operations for each multiplication."""
    threads = get_num_threads()
    best = np.inf
    for _ in range(10):
        clock = time.perf_counter()
        _tiles(threads, REPEATS)
        best = min(best, time.perf_counter() - clock)
    return 2e-9 * threads * REPEATS * ROWS * WIDTH * DEPTH / best


@parallel
def _tiles(thread, repeats):
    x, panel = np.ones(ROWS * DEPTH, np.float32), np.ones(DEPTH * WIDTH, np.float32)
    y, pixels = np.empty(ROWS * WIDTH, np.float32), np.arange(ROWS).astype(np.int32)
    epilogue = np.ones(2 * WIDTH, np.float32)
    for _ in range(repeats):
        multiply_tile(
            x, DEPTH, x, pixels, 0, 0, 1, DEPTH, panel, 0, 0, y, None, WIDTH, pixels, 0, 0, 0, WIDTH, epilogue,
            np.float32(0), ROWS, VECTORS,
        )  # fmt: skip
