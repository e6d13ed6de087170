"""Pictures for the built-in data: rotated outlines on noisy, textured backgrounds.

What visits every pixel is compiled and draws its own random numbers, from a `state` of chance.py.  What is called in
one place only is compiled there (inline="always"), and not a second time by itself.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, cos, pi, sin, sqrt
from statistics import NormalDist

import numpy as np
from PIL import Image

from minidet.data.chance import integer, uniform, words
from minidet.kernels.compiler import compiled

CLASSES = ("circle", "square", "triangle", "star", "ring", "cross", "ell", "half")
CIRCLE, SQUARE, TRIANGLE, STAR, RING, CROSS, ELL, HALF = range(8)
TIPS = tuple((cos(2 * pi * k / 5), sin(2 * pi * k / 5)) for k in range(1, 5))
"""Directions of the star's tips but the first, (1, 0)."""
REACH = (1.0, 1.22, 1.1, 1.06, 1.0, 1.05, 1.28, 1.05)
"""No outline of a class leaves this multiple of its radius."""
QUANTILES = 2**12
LAST = np.uint16(QUANTILES - 1)
POWERS, BASES, AMPLITUDES, LEVELS = map(tuple, np.array([(1, 5), (40, 216), (10, 60), (0, 256)]))
"""Limits of the background's random numbers, cells along a side, as a power of two, middle and spread; and of a
colour's.  Of NumPy's integers: Numba compiles a function anew for every Python number that is written into its call."""
COLOUR_GAP = 60
"""How far, in levels of 255, an object's colour stays from the mean of what lies under it."""


@compiled
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


@compiled(nogil=True)
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


@compiled(nogil=True, inline="always")
def background(planes: np.ndarray, enlargements: np.ndarray, state: np.ndarray) -> None:
    """Fill with a smooth random colour field, and stripes across four in ten.

    Shapes:
        planes: (3, size, size)
        enlargements: (4, 16, size)
        state: (6,)
    Units: float32, levels of 255; one plane a colour, so that all loops run through contiguous memory.
    """
    size, power = planes.shape[2], integer(state, POWERS)
    cells, enlarge = 1 << power, enlargements[power - 1]
    bases, coarse = np.empty(3, np.int64), np.empty((3, cells, cells), np.float32)
    for channel in range(3):
        bases[channel] = integer(state, BASES)
    amplitude = integer(state, AMPLITUDES)
    limits = (-amplitude, amplitude + 1)
    for channel in range(3):
        for y in range(cells):
            for x in range(cells):
                coarse[channel, y, x] = min(max(bases[channel] + integer(state, limits), 0), 255)
    # A stripe is a wave: the sine of two angles' sum, one of the row and one of the column.
    down = across = strength = 0.0
    if uniform(state, 0.0, 1.0) < 0.4:
        turn, frequency = uniform(state, 0.0, pi), uniform(state, 0.1, 0.8) * 128 / size
        down, across, strength = sin(turn) * frequency, cos(turn) * frequency, uniform(state, 5.0, 20.0)
    wide, wave = np.zeros((3, max(4, cells), size), np.float32), np.empty((2, size), np.float32)
    for column in range(size):
        wave[0, column], wave[1, column] = sin(across * column), cos(across * column)
    for channel in range(3):
        for y in range(cells):
            line = wide[channel, y]
            for x in range(cells):
                for column in range(len(line)):
                    line[column] += coarse[channel, y, x] * enlarge[x, column]
    for row in range(size):
        first = 0  # of the four cells that this row is enlarged from
        while first < cells - 4 and enlarge[first, row] == 0:
            first += 1
        straight, turned = np.float32(strength * cos(down * row)), np.float32(strength * sin(down * row))
        for channel in range(3):
            _blend(planes[channel, row], enlarge[first : first + 4, row], wide[channel, first:], straight, turned, wave)


@compiled(nogil=True, inline="always")
def _blend(row, share, wide, straight, turned, wave):
    """A row of the background: four rows of cells, each with its share, and the wave."""
    first, second, third, fourth = share[0], share[1], share[2], share[3]
    for i in range(len(row)):
        field = first * wide[0, i] + second * wide[1, i] + third * wide[2, i] + fourth * wide[3, i]
        row[i] = field + straight * wave[0, i] + turned * wave[1, i]


@lru_cache(maxsize=4)
def enlargements(size: int) -> np.ndarray:
    """How much each of 2, 4, 8 or 16 cells counts at every pixel of a line, if they are enlarged to it.

    Shapes:
        returns: (4, 16, size)
    """
    matrices = np.zeros((4, 16, size), np.float32)
    for matrix, cells in zip(matrices, (2, 4, 8, 16), strict=True):
        # Resizing is linear, so enlarge the identity.
        identity = Image.fromarray(np.eye(cells, dtype=np.float32))
        matrix[:cells] = np.asarray(identity.resize((cells, size), Image.Resampling.BICUBIC)).T
    return matrices


@compiled(nogil=True, inline="always")
def paint(planes: np.ndarray, box: np.ndarray, mask: np.ndarray, state: np.ndarray, quantiles: np.ndarray) -> None:
    """Fill a box where `mask` holds, row after row, with a colour that differs from what is there.

    Half of the objects are grainy.

    Shapes:
        planes: (3, H, W)
        box: (4,)
        mask: (h * w,), or more
        state: (6,)
        quantiles: (4096,)
    """
    x, y, w, h = box[0], box[1], box[2] - box[0], box[3] - box[1]
    colours = np.empty(60, np.int64)
    for n in range(len(colours)):
        colours[n] = integer(state, LEVELS)
    strength = uniform(state, 0.0, 12.0) if uniform(state, 0.0, 1.0) < 0.5 else 0.0
    bits = words(state, (h * w + 3) // 4).view(np.uint16)
    red = green = blue = 0.0
    for row in range(y, y + h):
        for column in range(x, x + w):
            red += planes[0, row, column]
            green += planes[1, row, column]
            blue += planes[2, row, column]
    chosen = 0  # should none of twenty be far enough
    for n in range(0, len(colours), 3):
        r, g, b = colours[n] - red / (h * w), colours[n + 1] - green / (h * w), colours[n + 2] - blue / (h * w)
        if r * r + g * g + b * b > COLOUR_GAP**2:
            chosen = n
            break
    for row in range(h):
        for column in range(w):
            if mask[row * w + column]:
                grain = strength * quantiles[bits[row * w + column] & LAST]
                for channel in range(3):
                    planes[channel, y + row, x + column] = colours[chosen + channel] + grain


@compiled(nogil=True, inline="always")
def add_noise(planes: np.ndarray, image: np.ndarray, state: np.ndarray, quantiles: np.ndarray) -> None:
    """Finish the uint8 image: sensor noise of a random strength, then the limits 0 and 255.

    Shapes:
        planes: (3, H, W)
        image: (H, W, 3)
        state: (6,)
        quantiles: (4096,)
    """
    _, H, W = planes.shape
    strength = np.float32(uniform(state, 3.0, 20.0))
    bits = words(state, (planes.size + 3) // 4).view(np.uint16)
    darkest, brightest, levels = np.float32(0), np.float32(255), np.empty((3, W), np.float32)
    for row in range(H):
        for channel in range(3):
            plane, drawn, level = planes[channel, row], bits[(channel * H + row) * W :], levels[channel]
            for column in range(W):
                noisy = plane[column] + strength * quantiles[drawn[column] & LAST]
                level[column] = min(max(noisy, darkest), brightest)
        for column in range(W):
            for channel in range(3):
                image[row, column, channel] = np.uint8(levels[channel, column])


@lru_cache(maxsize=1)
def normal_quantiles() -> np.ndarray:
    """Equally likely values of the normal distribution, the outermost at 3.7.

    One of them, taken by twelve random bits, is a normal number for a fraction of the price of drawing one.
    """
    quantile = NormalDist().inv_cdf
    return np.array([quantile((i + 0.5) / QUANTILES) for i in range(QUANTILES)], np.float32)
