"""Direct convolution: every tile of output pixels gathers its inputs through a table of their places.

Nothing is laid out or padded: the plan says for each tap and each of a tile's ROWS pixels which input
pixel it meets, and outside of the map that is a row of zeros.  The input gradient is the same loop over
another plan.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from minidet.kernels.convolution.cpu.lanes import GROUP, LANES, ROWS, WIDTH
from minidet.kernels.convolution.cpu.microkernel import multiply_rows
from minidet.kernels.convolution.cpu.panels import pack_tap, padded, vectors_of
from minidet.kernels.convolution.cpu.plan import Plan
from minidet.kernels.convolution.cpu.scratch import aligned, row_of_zeros
from minidet.kernels.parallel import in_turn, parallel

NOTHING = np.zeros(0, dtype=np.float32)
"""The shortcut of a convolution that has none: compiled code takes an array of one kind."""

DEEP = 2048
"""Channels, of all taps together, that a group of tiles multiplies before it goes on to the rest of a panel: the part
that is read and the one that is fetched meanwhile fit the second-level cache."""


def gathered_product(
    x, plan: Plan, weight, memo: dict, *, scale=None, bias=None, shortcut=NOTHING, relu=False, turned=False
):
    """y[target] = act(bias + shortcut[target] + scale * sum over taps of x[source] @ w[tap]), tile by tile of the plan.

    The panels of weights (panels.py) are kept in `memo` while the weights do not change.

    Shapes:
        x: (N, S, C), of whose pixels `depth` numbers are read
        weight: (outputs, taps, depth); `turned` swaps outputs and depth: the input gradient
        scale, bias: (outputs,) or None
        shortcut: (N * S' * outputs,), or empty for none
        returns: (N, S', outputs)
    """
    N, _, C = x.shape
    depth, _, outputs = weight.shape if turned else weight.shape[::-1]
    repeats, order = N // plan.images, plan.order
    y = aligned(N, plan.written // plan.images, outputs)
    tiles, all_panels = repeats * len(plan.tiles), -(-outputs // WIDTH)
    groups = -(-tiles // GROUP)
    # Of inputs and weights, the larger is read once.  With more weights, even a few tiles are work for all threads.
    parts = all_panels if weight.size > x.size else 1
    chunks = max(1, min(plan.most, -(-plan.most * depth // DEEP)))
    loops, key = ((_unit, 0, groups * parts),), ("cpu panels", weight.shape, turned)
    panels = memo.get(key)
    if panels is None:
        panels = aligned(padded(outputs) * len(order) * depth)
        loops = (_pack, 0, all_panels * len(order)), *loops
    in_turn(
        loops, groups, parts, chunks, tiles, x.reshape(-1), C, depth, row_of_zeros(depth),
        plan.tiles, plan.sources, plan.targets.reshape(-1), plan.read, plan.written, weight.reshape(-1), order, turned,
        panels, y.reshape(-1), shortcut, outputs, epilogue_of(outputs, scale, bias),
        np.float32(0 if relu else -np.inf),
    )  # fmt: skip
    memo[key] = panels
    return y


def epilogue_of(outputs: int, scale, bias):
    """Scale and shift of every output column, padded to whole vectors: (2, padded), flat; not to be written to."""
    return _no_epilogue(outputs) if scale is None and bias is None else _epilogue(outputs, scale, bias)


@lru_cache(maxsize=256)
def _no_epilogue(outputs: int):
    return _epilogue(outputs, None, None)


def _epilogue(outputs: int, scale, bias):
    epilogue = np.zeros((2, padded(outputs)), dtype=np.float32)
    epilogue[0, :outputs] = 1 if scale is None else scale
    if bias is not None:
        epilogue[1, :outputs] = bias
    return epilogue.reshape(-1)


# Both loops take the same arguments, for one follows the other.


@parallel
def _pack(
    unit, groups, parts, chunks, tiles, x, pitch, depth, zeros, table, sources, targets, read, written,
    weight, order, turned, panels, y, shortcut, outputs, epilogue, floor,
):  # fmt: skip
    """A tap of a panel of weights."""
    pack_tap(unit // len(order), unit % len(order), weight, order, panels, outputs, depth, turned)


@parallel
def _unit(
    unit, groups, parts, chunks, tiles, x, pitch, depth, zeros, table, sources, targets, read, written,
    weight, order, turned, panels, y, shortcut, outputs, epilogue, floor,
):  # fmt: skip
    """Some neighbouring tiles, panel by panel: of all panels, or of the one that is this unit's part.

    Where a panel comes in chunks, what a tile has summed up so far waits in y.
    """
    taps, group, part = len(order), unit % groups, unit // groups
    first, last = group * tiles // groups, (group + 1) * tiles // groups
    start, stop = (0, outputs) if parts == 1 else (part * WIDTH, min(outputs, (part + 1) * WIDTH))
    for column in range(start, stop, WIDTH):
        valid = min(WIDTH, outputs - column)
        vectors = vectors_of(valid)
        width = vectors * LANES
        following = column + WIDTH if column + WIDTH < outputs else 0
        if parts > 1 and group + 1 < groups:
            following = column  # for the next unit's tiles read this panel again
        share = taps * depth * width // (GROUP * chunks)  # of what follows, fetched with each tile
        for chunk in range(chunks):
            for i in range(first, last):
                repeat, tile = divmod(i, len(table))
                used = table[tile, 2]
                begin, end = chunk * used // chunks, (chunk + 1) * used // chunks
                panel = (column * taps + (table[tile, 1] + begin) * width) * depth
                ahead = following * taps * depth if chunk + 1 == chunks else panel + (end - begin) * width * depth
                multiply_rows(
                    vectors, x, pitch, zeros, sources, table[tile, 0] + begin * ROWS, repeat * read, end - begin, depth,
                    panels, panel, ahead + (i - first) * share, y, shortcut, outputs, targets, tile * ROWS,
                    repeat * written, column, valid, epilogue, floor, chunk > 0, chunk + 1 < chunks,
                )  # fmt: skip
