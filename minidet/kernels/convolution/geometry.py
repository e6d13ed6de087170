"""The shape arithmetic of a convolution over one map or over all levels of a pyramid."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from minidet.kernels.windows import Pair, output_size


@dataclass(frozen=True)
class Geometry:
    """Which input pixels meet which weights.

    `maps` are the (H, W) of the levels that lie one after the other along S in an input (N, S, C): a
    detector runs one filter over a whole pyramid, and a single image is a pyramid of one level.
    """

    maps: tuple[Pair, ...]
    size: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def __hash__(self) -> int:
        return self._hash  # asked for by every cache that has a convolution's shape as its key

    @cached_property
    def _hash(self) -> int:
        return hash((self.maps, self.size, self.stride, self.padding, self.dilation, self.groups))

    @cached_property
    def output_maps(self) -> tuple[Pair, ...]:
        """The (P, Q) of every level, P = (H + 2*padding - dilation*(k - 1) - 1) // stride + 1."""
        rules = tuple(zip(self.padding, self.size, self.stride, self.dilation, strict=True))
        return tuple(
            tuple(output_size(n + 2 * pad, *rule) for n, (pad, *rule) in zip(map_, rules, strict=True))
            for map_ in self.maps
        )

    @cached_property
    def pixels(self) -> int:
        """S, input positions over all levels."""
        return sum(math.prod(map_) for map_ in self.maps)

    @cached_property
    def output_pixels(self) -> int:
        """Output positions over all levels."""
        return sum(math.prod(map_) for map_ in self.output_maps)

    @cached_property
    def taps(self) -> int:
        """Weights of a filter per input channel."""
        return math.prod(self.size)

    @property
    def is_matrix_product(self) -> bool:
        """Whether every output pixel reads just the input pixel of the same number."""
        return self.size == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)

    def levels(self) -> Iterator[tuple[Pair, slice, Pair, slice]]:
        """Of every level: its map and its place along S, before and after."""
        start = output_start = 0
        for map_, output_map in zip(self.maps, self.output_maps, strict=True):
            stop, output_stop = start + math.prod(map_), output_start + math.prod(output_map)
            yield map_, slice(start, stop), output_map, slice(output_start, output_stop)
            start, output_start = stop, output_stop


@lru_cache(maxsize=1024)
def geometry_of(
    maps: tuple[Pair, ...],
    size: Pair,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Geometry:
    """The `Geometry` of these fields, the same object whenever they are the same: what it knows, it works out once."""
    return Geometry(maps, size, stride, padding, dilation, groups)
