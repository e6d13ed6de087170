"""Pictures for the built-in data: rotated outlines on noisy, textured backgrounds."""

from __future__ import annotations

from math import ceil, cos, log, pi, sin

import numpy as np
from PIL import Image

CLASSES = ("circle", "square", "triangle", "star", "ring", "cross", "ell", "half")
REACH = 1.28
"""No outline leaves this multiple of its radius; the square's corners and the ell's come closest."""
COLOUR_GAP = 60
"""How far, in levels of 255, an object's colour stays from the mean of what lies under it."""


def outline(label: int, radius: float, turn: float, stretch: tuple[float, float]) -> np.ndarray:
    """The pixels of one object, cropped to its bounding box.

    Shapes:
        returns: (h, w)
    """
    half_w, half_h = (ceil(radius * s * REACH) + 1 for s in stretch)
    x = np.arange(-half_w, half_w + 1, dtype=np.float32) / np.float32(radius * stretch[0])
    y = np.arange(-half_h, half_h + 1, dtype=np.float32)[:, None] / np.float32(radius * stretch[1])
    c, s = np.float32(cos(turn)), np.float32(sin(turn))
    inside = _inside(label, c * x + s * y, c * y - s * x)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if not len(rows):
        return inside[:0, :0]
    return inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _inside(label: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which points (u, v), in radii from the centre and turned with the object, belong to it."""
    match CLASSES[label]:
        case "circle":
            return u * u + v * v < 1
        case "square":
            return np.maximum(np.abs(u), np.abs(v)) < 0.86
        case "triangle":
            return (v < 0.55) & (v > 1.75 * np.abs(u) - 1.1)
        case "star":
            # Folded into one tenth of the star, whose edge there is a straight line.
            from_tip = pi / 5 - np.abs(np.arctan2(v, u) % (2 * pi / 5) - pi / 5)
            return np.hypot(u, v) * (np.cos(from_tip) + 1.35 * np.sin(from_tip)) < 1.05
        case "ring":
            squared = u * u + v * v
            return (squared < 1) & (squared > 0.3)
        case "cross":
            u, v = np.abs(u), np.abs(v)
            return (np.minimum(u, v) < 0.3) & (np.maximum(u, v) < 1)
        case "ell":
            return (np.maximum(np.abs(u), np.abs(v)) < 0.9) & ((u < -0.25) | (v > 0.25))
        case _:  # half
            return (u * u + v * v < 1.1) & (v > 0)


def background(size: int, rng: np.random.Generator) -> np.ndarray:
    """A smooth random colour field, and stripes across four in ten; float32 (size, size, 3)."""
    cells = int(rng.choice([2, 4, 8, 16]))
    base, amplitude = rng.integers(40, 216, 3), rng.integers(10, 60)
    coarse = base + rng.integers(-amplitude, amplitude + 1, (cells, cells, 3))
    coarse = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8))
    image = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)).astype(np.float32)
    if rng.random() < 0.4:
        turn, frequency = rng.random() * pi, rng.uniform(0.1, 0.8) * 128 / size
        along = np.arange(size, dtype=np.float32) * np.float32(frequency)
        phase = np.float32(cos(turn)) * along + np.float32(sin(turn)) * along[:, None]
        image += np.float32(rng.uniform(5, 20)) * np.sin(phase)[:, :, None]
    return image


def paint(image: np.ndarray, mask: np.ndarray, corner: tuple[int, int], rng: np.random.Generator) -> None:
    """Fill `mask`, its upper left pixel at `corner` (x, y), with a colour that differs from what is there."""
    x, y = corner
    region = image[y : y + mask.shape[0], x : x + mask.shape[1]]
    colours = rng.integers(0, 256, (20, 3)).astype(np.float32)
    far = np.linalg.norm(colours - region.mean((0, 1)), axis=1) > COLOUR_GAP
    colour = colours[far.argmax()]  # the first one, should none of twenty be far
    if rng.random() < 0.5:
        grain = rng.standard_normal((np.count_nonzero(mask), 1), dtype=np.float32)
        colour = colour + np.float32(rng.uniform(0, 12)) * grain
    region[mask] = colour


def add_noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The finished uint8 image: sensor noise of a random strength, then the limits 0 and 255."""
    image += np.float32(rng.uniform(3, 20)) * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image, 0, 255, out=image).astype(np.uint8)


def log_uniform(low: float, high: float, rng: np.random.Generator) -> float:
    """A size such that halving and doubling are equally likely."""
    return float(np.exp(rng.uniform(log(low), log(high))))
