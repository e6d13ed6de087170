"""What all foreign state dicts have in common: other names for the same modules, and filters as OIHW."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

TO_OHWI = (0, 2, 3, 1)
TO_OIHW = (0, 3, 1, 2)
STAGES, BLOCKS, LEVELS, DEPTH = 4, 64, 8, 16  # at least as many as any network has


def translate(
    state: Mapping[str, np.ndarray], paths: Mapping[str, str], axes: tuple[int, int, int, int]
) -> dict[str, np.ndarray]:
    """The same arrays under the names of another system, filters with their axes in its order.

    `paths` maps modules: "conv1" for "conv1.weight" and "conv1.bias".  A name it does not know is kept, so
    that loading, which knows what is needed, can say that it does not fit.
    """
    translated = {}
    for name, array in state.items():
        path, _, leaf = name.rpartition(".")
        # A transposed view would be written to files, and read by kernels, as it lies in memory.
        values = np.ascontiguousarray(np.transpose(array, axes)) if array.ndim == 4 else array
        translated[f"{paths[path]}.{leaf}" if path in paths else name] = values
    return translated
