"""Pictures for the built-in data: rotated outlines on noisy, textured backgrounds.

What visits every pixel is compiled and draws its own random numbers, from a `state` of chance.py.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, cos, pi, sin, sqrt
from statistics import NormalDist

import numpy as np
from numba import njit
from PIL import Image

from minidet.data.chance import integers, uniform, words

CLASSES = ("circle", "square", "triangle", "star", "ring", "cross", "ell", "half")
CIRCLE, SQUARE, TRIANGLE, STAR, RING, CROSS, ELL, HALF = range(8)
TIPS = tuple((cos(2 * pi * k / 5), sin(2 * pi * k / 5)) for k in range(1, 5))
"""Directions of the star's tips but the first, (1, 0)."""
REACH = (1.0, 1.22, 1.1, 1.06, 1.0, 1.05, 1.28, 1.05)
"""No outline of a class leaves this multiple of its radius."""
QUANTILES = 2**12
LAST = np.uint16(QUANTILES - 1)
COLOUR_GAP = 60
"""How far, in levels of 255, an object's colour stays from the mean of what lies under it."""


@njit(cache=True)
def inside(label: int, u: float, v: float) -> bool:
    """Whether the point (u, v), in radii from the centre and turned with the object, belongs to it."""
    if label == CIRCLE:
        return u * u + v * v < 1
    if label == SQUARE:
        return max(abs(u), abs(v)) < 0.86
    if label == TRIANGLE:
        return 1.75 * abs(u) - 1.1 < v < 0.55
    if label == STAR:
        # Seen from its nearest tip, the star's edge is a straight line on either side of the tip's axis.
        along = u
        for tip_u, tip_v in TIPS:
            along = max(along, u * tip_u + v * tip_v)
        across = sqrt(max(u * u + v * v - along * along, 0.0))
        return along + 1.35 * across < 1.05
    if label == RING:
        return 0.3 < u * u + v * v < 1
    if label == CROSS:
        return min(abs(u), abs(v)) < 0.3 and max(abs(u), abs(v)) < 1
    if label == ELL:
        return max(abs(u), abs(v)) < 0.9 and (u < -0.25 or v > 0.25)
    return u * u + v * v < 1.1 and v > 0  # HALF


@njit(cache=True, nogil=True)
def outline(label: int, radius_x: float, radius_y: float, turn: float) -> np.ndarray:
    """The pixels of one object, turned, then stretched to its two radii, cropped to its bounding box.

    Shapes:
        returns: (h, w)
    """
    half_w, half_h = ceil(radius_x * REACH[label]) + 1, ceil(radius_y * REACH[label]) + 1
    xs = np.empty(2 * half_w + 1)
    for column in range(len(xs)):
        xs[column] = (column - half_w) / radius_x
    mask = np.zeros((2 * half_h + 1, len(xs)), np.bool_)
    top, bottom, left, right = mask.shape[0], 0, mask.shape[1], 0
    c, s = cos(turn), sin(turn)
    for row in range(mask.shape[0]):
        y = (row - half_h) / radius_y
        for column, x in enumerate(xs):
            if inside(label, c * x + s * y, c * y - s * x):
                mask[row, column] = True
                top, bottom = min(top, row), max(bottom, row + 1)
                left, right = min(left, column), max(right, column + 1)
    return mask[top:bottom, left:right]


def background(size: int, state: np.ndarray) -> np.ndarray:
    """A smooth random colour field, and stripes across four in ten.

    Shapes:
        state: (6,)
        returns: (3, size, size)
    Units: float32, levels of 255; one plane a colour, so that stripes add to contiguous memory.
    """
    cells = 2 ** int(integers(state, 1, 5, 1)[0])
    base, amplitude = integers(state, 40, 216, 3), int(integers(state, 10, 60, 1)[0])
    coarse = integers(state, -amplitude, amplitude + 1, 3 * cells**2).reshape(3, cells, cells)
    coarse += base[:, None, None]
    enlarge = _bicubic(cells, size)
    planes = enlarge @ coarse.clip(0, 255).astype(np.float32) @ enlarge.T
    if uniform(state, 0.0, 1.0) < 0.4:
        turn, frequency = uniform(state, 0.0, pi), uniform(state, 0.1, 0.8) * 128 / size
        along = np.arange(size, dtype=np.float32) * np.float32(frequency)
        stripes = np.float32(cos(turn)) * along + np.float32(sin(turn)) * along[:, None]
        np.sin(stripes, out=stripes)
        stripes *= np.float32(uniform(state, 5.0, 20.0))
        planes += stripes
    return planes


@lru_cache(maxsize=16)
def _bicubic(cells: int, size: int) -> np.ndarray:
    """The matrix (size, cells) that enlarges a column: resizing is linear, so enlarge the identity."""
    identity = Image.fromarray(np.eye(cells, dtype=np.float32))
    return np.asarray(identity.resize((cells, size), Image.Resampling.BICUBIC))


def paint(planes: np.ndarray, mask: np.ndarray, x: int, y: int, state: np.ndarray) -> None:
    """Fill `mask`, its upper left pixel at (x, y), with a colour that differs from what is there.

    Half of the objects are grainy.
    """
    colours = integers(state, 0, 256, 60)
    strength = uniform(state, 0.0, 12.0) if uniform(state, 0.0, 1.0) < 0.5 else 0.0
    _fill(planes, mask, x, y, colours, strength, _bits(mask.size, state), normal_quantiles())


@njit(cache=True, nogil=True)
def _fill(planes, mask, x, y, colours, strength, bits, quantiles):
    h, w = mask.shape
    red = green = blue = 0.0
    for row in range(y, y + h):
        for column in range(x, x + w):
            red += planes[0, row, column]
            green += planes[1, row, column]
            blue += planes[2, row, column]
    chosen = 0  # should none of twenty be far enough
    for n in range(0, len(colours), 3):
        r, g, b = colours[n] - red / mask.size, colours[n + 1] - green / mask.size, colours[n + 2] - blue / mask.size
        if r * r + g * g + b * b > COLOUR_GAP**2:
            chosen = n
            break
    for row in range(h):
        for column in range(w):
            if mask[row, column]:
                grain = strength * quantiles[bits[row * w + column] & LAST]
                for channel in range(3):
                    planes[channel, y + row, x + column] = colours[chosen + channel] + grain


def add_noise(planes: np.ndarray, state: np.ndarray) -> np.ndarray:
    """The finished uint8 image: sensor noise of a random strength, then the limits 0 and 255.

    Shapes:
        planes: (3, H, W)
        state: (6,)
        returns: (H, W, 3)
    """
    strength = np.float32(uniform(state, 3.0, 20.0))
    return _expose(planes, strength, _bits(planes.size, state).reshape(planes.shape), normal_quantiles())


@njit(cache=True, nogil=True)
def _expose(planes, strength, bits, quantiles):
    _, H, W = planes.shape
    image = np.empty((H, W, 3), np.uint8)
    darkest, brightest = np.float32(0), np.float32(255)
    for row in range(H):
        for column in range(W):
            for channel in range(3):
                level = planes[channel, row, column] + strength * quantiles[bits[channel, row, column] & LAST]
                image[row, column, channel] = np.uint8(min(max(level, darkest), brightest))
    return image


def _bits(count: int, state: np.ndarray) -> np.ndarray:
    """Random indices into `normal_quantiles`, and four bits more."""
    return words(state, -(-count // 4)).view(np.uint16)[:count]


@lru_cache(maxsize=1)
def normal_quantiles() -> np.ndarray:
    """Equally likely values of the normal distribution, the outermost at 3.7.

    One of them, taken by twelve random bits, is a normal number for a fraction of the price of drawing one.
    """
    quantile = NormalDist().inv_cdf
    return np.array([quantile((i + 0.5) / QUANTILES) for i in range(QUANTILES)], np.float32)
