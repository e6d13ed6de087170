"""The weights that the reference systems ran with, by name: nothing so large need be stored.

Every number comes from NumPy's legacy RandomState, whose stream is promised never to change.  A generator for
each tensor, seeded by the CRC-32 of "SEED:NAME": the order of the names does not matter.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np

GAIN = {"cls": 0.55, "box": 0.12, "stem": 1.0}
"""Sizes of the last layers' weights, and of detectron2's first, which sees pixels of 0 to 255."""


def make_weights(
    shapes: Mapping[str, Sequence[int]], seed: int, gain: Mapping[str, float] | None = None
) -> dict[str, np.ndarray]:
    """A state dict of these names and shapes (OIHW): float32, and int64 for counts of batches."""
    return {name: make_tensor(name, tuple(shape), seed, GAIN | dict(gain or {})) for name, shape in shapes.items()}


def make_tensor(name: str, shape: tuple[int, ...], seed: int, gain: Mapping[str, float]) -> np.ndarray:
    random = np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode()))
    path, _, leaf = name.rpartition(".")
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if leaf == "running_mean" or (leaf == "bias" and is_norm(path, shape)):
        values = 0.1 * random.standard_normal(shape)
    elif leaf == "running_var":
        values = random.uniform(0.5, 1.5, shape)
    elif leaf == "weight" and is_norm(path, shape):
        # The last norm of a residual branch is kept small, or sixteen blocks would blow up.
        last = ".bn3." in name or ".conv3.norm." in name
        values = random.uniform(*((0.2, 0.4) if last else (0.7, 1.1)), shape)
    elif leaf == "weight":
        values = deviation(name, shape, gain) * random.standard_normal(shape)
    elif "cls_logits" in name or "cls_score" in name:  # the prior, 0.01, and a little noise
        values = -np.log((1 - 0.01) / 0.01) + 0.3 * random.standard_normal(shape)
    else:
        values = 0.05 * random.standard_normal(shape)
    return values.astype(np.float32)


def deviation(name: str, shape: tuple[int, ...], gain: Mapping[str, float]) -> float:
    """The standard deviation of a filter's weights."""
    fan_in = int(np.prod(shape[1:]))
    if "cls_logits" in name or "cls_score" in name:
        return gain["cls"] / np.sqrt(fan_in)
    if "bbox_reg." in name or "bbox_pred" in name:
        return gain["box"] / np.sqrt(fan_in)
    if "fpn" in name and "bottom_up" not in name:
        return np.sqrt(1.0 / fan_in)
    std = np.sqrt(2.0 / fan_in)
    return std * gain["stem"] if name.endswith("stem.conv1.weight") else std


def is_norm(path: str, shape: tuple[int, ...]) -> bool:
    """Whether the module is a batch or group norm, by torchvision's or detectron2's names."""
    parts = ["", "", "", *path.split(".")]
    if len(shape) != 1:
        return False
    in_shortcut = parts[-2] == "downsample" and parts[-1] == "1"
    in_head = parts[-3] == "conv" and parts[-1] == "1" and "_head" in path
    return parts[-1].startswith("bn") or parts[-1] == "norm" or in_shortcut or in_head
