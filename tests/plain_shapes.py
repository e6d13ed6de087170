"""The built-in images once more: every number drawn by NumPy's generator, in arrays instead of compiled loops."""

from __future__ import annotations

from math import cos, pi, sin

import numpy as np

from minidet.data import drawing
from minidet.data.shapes import MAX_CONTAINED, MAX_IOU, SPLITS, TRIES, VARIANTS, Shapes


def drawn(dataset: Shapes, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, boxes and labels of a sample."""
    size = dataset.image_size
    rng = np.random.Generator(np.random.SFC64((dataset.seed, SPLITS.index(dataset.split), index)))
    masks, boxes, labels = layout(VARIANTS[dataset.variant], size, rng)
    planes = background(size, rng)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        paint(planes[:, y1:y2, x1:x2], mask, rng)
    strength = np.float32(rng.uniform(3, 20))
    noisy = planes + strength * normal(planes.shape, rng)
    return np.clip(noisy, 0, 255).astype(np.uint8).transpose(1, 2, 0), np.reshape(boxes, (-1, 4)), np.array(labels)


def layout(variant, size, rng):
    """What lies where: masks, boxes, labels."""
    scale, (fewest, most) = size / 128, variant.objects
    masks, boxes, labels = [], [], []
    wanted = 0 if rng.random() < variant.empty else int(rng.integers(fewest, most + 1))
    for _ in range(wanted):
        for _ in range(TRIES):
            chance = rng.random(6)
            label = int(chance[0] * len(drawing.CLASSES))
            radius = between(variant.sizes, chance[1]) / 2 * scale
            side = 2 * chance[3] - 1
            stretch = between(variant.aspects, abs(side)) ** (0.5 if side > 0 else -0.5)
            mask = outline(label, radius * stretch, radius / stretch, 2 * pi * chance[2])
            h, w = mask.shape
            x, y = int(chance[4] * (size - w)), int(chance[5] * (size - h))
            box = (x, y, x + w, y + h)
            if max(h, w) >= size or min(h, w) / scale < variant.min_side:
                continue
            aspect_fits = variant.aspects[0] <= (max(h, w) / scale) / (min(h, w) / scale) <= variant.aspects[1]
            if (variant.aspects == (1, 1) or aspect_fits) and not any(too_close(box, other) for other in boxes):
                masks.append(mask)
                boxes.append(box)
                labels.append(label)
                break
    return masks, boxes, labels


def between(limits, chance):
    """A number such that halving and doubling are equally likely."""
    low, high = limits
    return low * (high / low) ** chance


def outline(label, radius_x, radius_y, turn):
    """Every pixel near the object asked by itself."""
    half_w, half_h = (int(np.ceil(radius * max(drawing.REACH))) + 1 for radius in (radius_x, radius_y))
    ys, xs = np.arange(-half_h, half_h + 1) / radius_y, np.arange(-half_w, half_w + 1) / radius_x
    c, s = cos(turn), sin(turn)
    mask = np.array([[drawing.inside(label, c * x + s * y, c * y - s * x) for x in xs] for y in ys])
    rows, columns = np.nonzero(mask)
    if len(rows) == 0:
        return mask[:0, :0]
    return mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def too_close(a, b):
    """Whether two boxes overlap more than they may."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    shared = max(w, 0) * max(h, 0)
    return shared > MAX_IOU * (sum(areas) - shared) or shared > MAX_CONTAINED * min(areas)


def background(size, rng):
    """A smooth colour field (3, size, size), with stripes or without."""
    cells = 2 ** int(rng.integers(1, 5))
    base, amplitude = rng.integers(40, 216, (3, 1, 1)), rng.integers(10, 60)
    coarse = np.clip(base + rng.integers(-amplitude, amplitude + 1, (3, cells, cells)), 0, 255)
    enlarge, coarse = drawing.enlargements(size)[cells.bit_length() - 2], coarse.astype(np.float32)
    wide = sum(coarse[:, :, x, None] * enlarge[x] for x in range(cells))
    planes = sum(enlarge[y, :, None] * wide[:, y, None, :] for y in range(cells))
    if rng.random() < 0.4:
        turn, frequency = rng.random() * pi, rng.uniform(0.1, 0.8) * 128 / size
        columns, rows = (part * frequency * np.arange(size) for part in (cos(turn), sin(turn)))
        strength = rng.uniform(5, 20)
        # sin(row + column), by what is known of each
        planes += np.float32([strength * cos(row) for row in rows])[:, None] * np.float32([sin(c) for c in columns])
        planes += np.float32([strength * sin(row) for row in rows])[:, None] * np.float32([cos(c) for c in columns])
    return planes


def paint(planes, mask, rng):
    """Fill the mask in what lies under its box (3, h, w)."""
    colours = rng.integers(0, 256, (20, 3))
    strength = rng.uniform(0, 12) if rng.random() < 0.5 else 0.0
    gaps = np.linalg.norm(colours - planes.mean((1, 2), np.float64), axis=1)
    colour = colours[np.argmax(gaps > drawing.COLOUR_GAP)]
    grain = strength * normal(mask.shape, rng).astype(np.float64)
    planes[:, mask] = colour[:, None] + grain[mask]


def normal(shape, rng):
    """Normal numbers, each by twelve of sixteen random bits."""
    count = int(np.prod(shape))
    bits = rng.bit_generator.random_raw(-(-count // 4)).view(np.uint16)[:count] % drawing.QUANTILES
    return drawing.normal_quantiles()[bits].reshape(shape)
