"""How fast this machine multiplies: the register tile on numbers that lie in the first-level cache."""

from __future__ import annotations

import time

import numpy as np
from numba import get_num_threads

from minidet.kernels.convolution.cpu.lanes import ROWS, VECTORS, WIDTH
from minidet.kernels.convolution.cpu.microkernel import product_tile
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
    y = np.empty(ROWS * WIDTH, np.float32)
    for _ in range(repeats):
        product_tile(x, 0, DEPTH, panel, 0, DEPTH, 0, y, 0, WIDTH, ROWS, VECTORS)
