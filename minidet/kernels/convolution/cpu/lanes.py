"""How many float32 numbers one instruction of this machine handles, and the tile that follows from it."""

from __future__ import annotations

import os

import llvmlite.binding as llvm


def _host_lanes() -> int:
    """16 with AVX-512, 8 with AVX2, else 4 (SSE, NEON); MINIDET_LANES overrides, for tests."""
    forced = os.environ.get("MINIDET_LANES", "")
    if forced:
        if forced not in ("4", "8", "16"):
            raise ValueError(f"MINIDET_LANES={forced!r}: vectors have 4, 8 or 16 lanes")
        return int(forced)
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 16
    return 8 if features.get("avx2") else 4


LANES = _host_lanes()
"""float32 numbers in a vector register.  LLVM would also split wider vectors, only slower."""

LINE = 64
"""Bytes of a cache line, and of the widest vector."""

GAP = LINE // 4
"""float32 numbers left free between what would else lie a power of two apart, where all that is used together
shares the few places of one set of the first-level cache."""

ROWS = 6
"""Rows of the register tile.  ROWS * VECTORS sums, VECTORS weights and one broadcast input fit in the 32
registers of AVX-512 or the 16 of AVX2; six rows 4 KiB apart still fit the eight ways of a first-level cache."""

VECTORS = 4 if LANES == 16 else 2
"""Vectors in a row of the register tile: every broadcast input is used this often.  Square tiles need the fewest loads
for a multiplication, which matters most where two threads share a core: they share what it can decode, too."""

FILTERS = 8 if LANES == 16 else 4
"""Rows of the register tile that adds up outer products: filters, so it must divide LANES, for these come in vectors;
in the stem the numbers of a window's row."""

PAIR = 2
"""Vectors in a row of that tile.  A narrower panel leaves room for more pixels in the first-level cache, and the sums,
which do not fit there, are touched less often."""

UNROLLED = 4
"""Channels that a turn of the innermost loop handles: counting and jumping is then a small part of it."""

WIDTH = LANES * VECTORS
"""Columns of the register tile, and of a panel of weights."""

GROUP = 8
"""Tiles that one unit of a direct convolution runs through a panel of weights before it turns to the next panel."""
