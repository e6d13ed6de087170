"""Which objects the anchors can overlap enough to learn: measured over a whole data set, and in closed form."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from minidet.detection import AnchorConfig
from minidet.detection.anchors import cell_anchors
from minidet.inspection.advice import finding
from minidet.inspection.findings import MUST_FIX, NOTE, WARNING, Finding, aligned
from minidet.models import RetinaNetConfig

Maps = Callable[[int, int], Sequence[tuple[int, int]]]

BLOCK = 2**14  # objects whose overlaps are computed at once
BUCKETS = {"small": 32**2, "medium": 96**2, "large": np.inf}
"""COCO's sizes: areas in pixels of the original image up to these."""
SAMPLE = 5_000  # objects that settings are tried on
GOOD = 0.9  # share of objects with an anchor of its own from which nothing is recommended
UNREACHED = {MUST_FIX: 0.4, WARNING: 0.1}
"""Share of objects that no anchor overlaps by `matcher.low`; twice that where the matcher gives every object its best
anchor all the same."""
SPARSE = {MUST_FIX: 0.4, WARNING: 0.5}
"""Share of objects with an anchor of their own; where every object is given its best one, too few only warns."""


def shapes_of(config: AnchorConfig) -> tuple[np.ndarray, np.ndarray]:
    """Width and height of every anchor of a cell, and its level.

    Shapes:
        returns: (L * A, 2) and (L * A,)
    """
    cells = [cell_anchors(config, level) for level in range(len(config.sizes))]
    levels = np.repeat(np.arange(len(cells)), [len(cell) for cell in cells])
    boxes = np.concatenate(cells)
    return boxes[:, 2:] - boxes[:, :2], levels


def iou_of_sides(sides: np.ndarray, anchor_sides: np.ndarray, shifts: np.ndarray | float = 0.0) -> np.ndarray:
    """IoU of boxes of these sides whose centres are `shifts` apart along x and y.

    Shapes:
        sides, anchor_sides: (..., 2)
        returns: (...,)
    Rule: along one axis, sides a and b with centres d apart share min(a, b, (a + b) / 2 - d).
    """
    shared = np.minimum(np.minimum(sides, anchor_sides), (sides + anchor_sides) / 2 - shifts).clip(0).prod(axis=-1)
    return shared / (sides.prod(axis=-1) + anchor_sides.prod(axis=-1) - shared)


def best_possible(sides: np.ndarray, config: AnchorConfig, *, shift: float = 0.0) -> np.ndarray:
    """The best IoU that boxes of these sides reach with centres `shift` strides apart: 0 is the best case, 0.5 the
    worst wherever anchors stand all around.

    Shapes:
        sides: (M, 2), width and height
        returns: (M,)
    """
    anchor_sides, levels = shapes_of(config)
    steps = np.array(config.strides or [8 * 2**level for level in range(len(config.sizes))], float)[levels, None]
    return np.max(iou_of_sides(sides[:, None], anchor_sides[None], shift * steps[None]), axis=1)


def longest(iou: float, config: AnchorConfig) -> float:
    """The largest length : breadth at which an anchor still reaches this IoU.

    A box q times as elongated as an anchor of its area overlaps it by 1 / (2 sqrt(q) - 1), and no other size more.
    """
    return ((1 / iou + 1) / 2) ** 2 * max(max(config.ratios), 1 / min(config.ratios))


@dataclass(frozen=True, eq=False)
class Coverage:
    """The best anchor of every object, as one image a batch would be padded.

    Shapes:
        sides: (M, 2), after resizing
        areas: (M,), before
        labels: (M,)
        iou: (M,)
        levels: (M,)
    """

    config: RetinaNetConfig
    sides: np.ndarray
    areas: np.ndarray
    labels: np.ndarray
    iou: np.ndarray
    levels: np.ndarray

    def __len__(self) -> int:
        return len(self.iou)

    def shares(self, rows: np.ndarray | slice = slice(None)) -> tuple[float, float, float]:
        """Parts of the objects whose best IoU is at least matcher.high, at least low, and less."""
        iou, matcher = self.iou[rows], self.config.matcher
        high, low = np.mean(iou >= matcher.high), np.mean(iou < matcher.low)
        return float(high), float(1 - high - low), float(low)

    @cached_property
    def groups(self) -> dict[str, np.ndarray]:
        """Rows by class, COCO size and level of the best anchor; only groups that have any."""
        bucket = np.searchsorted(list(BUCKETS.values()), self.areas, side="right")
        groups = {f"{name} objects": bucket == n for n, name in enumerate(BUCKETS)}
        groups |= {f"level P{n + 3}": self.levels == n for n in range(len(self.config.anchors.sizes))}
        groups |= {f"class {name}": self.labels == n for n, name in enumerate(self.config.classes)}
        return {name: np.flatnonzero(rows) for name, rows in groups.items() if rows.any()}

    def table(self, classes: int = 12) -> str:
        """Shares of all objects and of each group; of many classes the worst covered ones."""
        high, low = self.config.matcher.high, self.config.matcher.low
        named = [name for name in self.groups if name.startswith("class ")]
        worst = sorted(named, key=lambda name: self.shares(self.groups[name])[0])[:classes]
        rows = [("all", slice(None), len(self))]
        rows += [(name, r, len(r)) for name, r in self.groups.items() if name not in named or name in worst]
        lines = [(name, f"{count:,}", *(f"{share:.1%}" for share in self.shares(r))) for name, r, count in rows]
        return aligned(("best anchor", "objects", f"IoU >= {high:g}", f">= {low:g}", f"< {low:g}"), lines)


def measure_coverage(
    config: RetinaNetConfig, maps: Maps, boxes: np.ndarray, image_sizes: np.ndarray, labels: np.ndarray
) -> Coverage:
    """The best of all anchors for every object; exact, but without ever laying the anchors out.

    Of anchors of one shape the one whose centre is nearest overlaps an object most, so that only one a shape is
    looked at.

    Shapes:
        boxes: (M, 4)
        image_sizes: (M, 2), height and width of each object's image
        labels: (M,)
    Units: pixels of the original image.
    """
    sizes, which = np.unique(image_sizes.astype(np.int64), axis=0, return_inverse=True)
    anchor_sides, levels = shapes_of(config.anchors)
    scale, steps, grids = (np.empty((len(sizes), *shape)) for shape in ((2,), (len(levels), 2), (len(levels), 2)))
    for n, (H, W) in enumerate(sizes):
        new, multiple = np.array(config.preprocess.size(int(H), int(W))), config.preprocess.pad_multiple
        padded = -(-new // multiple) * multiple
        grid = np.array(maps(*map(int, padded)))
        strides = padded // grid if config.anchors.strides is None else np.repeat(config.anchors.strides, 2)
        scale[n] = (new / (H, W))[::-1]
        grids[n], steps[n] = (pairs.reshape(-1, 2)[levels][:, ::-1] for pairs in (grid, np.asarray(strides)))
    iou, best = np.empty(len(boxes), np.float32), np.empty(len(boxes), np.int64)
    for start in range(0, len(boxes), BLOCK):
        rows = slice(start, start + BLOCK)
        n = which[rows].reshape(-1)
        corners = boxes[rows].astype(np.float64).reshape(-1, 2, 2) * scale[n][:, None]
        centres, sides = corners.mean(axis=1)[:, None], (corners[:, 1] - corners[:, 0])[:, None]
        cell = np.round(centres / steps[n] - config.anchors.offset).clip(0, grids[n] - 1)
        shifts = np.abs(centres - (cell + config.anchors.offset) * steps[n])
        overlaps = iou_of_sides(sides, anchor_sides[None], shifts)
        best[rows] = levels[overlaps.argmax(axis=1)]
        iou[rows] = overlaps.max(axis=1)
    sides = (boxes[:, 2:] - boxes[:, :2]).astype(np.float32)
    return Coverage(config, sides * scale[which.reshape(-1)], sides.prod(axis=1), labels, iou, best)


def limits_text(config: RetinaNetConfig) -> str:
    """The closed-form limits of these anchors, in words."""
    anchors, matcher = config.anchors, config.matcher
    sides, _ = shapes_of(anchors)
    smallest = matcher.high * sides.prod(axis=1).min()
    worst = best_possible(np.array([[s, s] for s in (min(anchors.sizes[0]),)]), anchors, shift=0.5)[0]
    high, low = (f"{longest(iou, anchors):.1f} : 1" for iou in (matcher.high, matcher.low))
    return (
        f"IoU {matcher.high:g} needs {smallest:,.0f} px² after resizing ({smallest**0.5:.1f} px square) and at most "
        f"{high}, IoU {matcher.low:g} at most {low}.\nAn object like the smallest square anchor, half a stride off "
        f"along both axes, still reaches {worst:.2f}."
    )


def check_coverage(
    coverage: Coverage, maps: Maps, boxes: np.ndarray, image_sizes: np.ndarray, least_levels: int
) -> Iterator[Finding]:
    """What the coverage means for training, with the settings that would improve it."""
    if not len(coverage):
        return
    config = coverage.config
    high, _, low = coverage.shares()
    claimed = config.matcher.low_quality
    limit = next((s for s in (MUST_FIX, WARNING) if low > UNREACHED[s] * (2 if claimed else 1)), None)
    limit = limit or next((s for s in (MUST_FIX, WARNING) if high < SPARSE[s] and (s == WARNING or not claimed)), None)
    if limit or high < GOOD:
        narrow, area = coverage.sides.max(axis=1) / coverage.sides.min(axis=1), coverage.sides.prod(axis=1)
        missed = coverage.iou < config.matcher.high
        least = config.matcher.high * shapes_of(config.anchors)[0].prod(axis=1).min()
        small, long = missed & (area < least), missed & (narrow > longest(config.matcher.high, config.anchors))
        kinds = {"objects-too-small": small.sum(), "objects-too-elongated": long.sum()}
        code = max(kinds, key=kinds.get) if 2 * max(kinds.values()) > missed.sum() else "objects-between-anchors"
        lines, gain = recommend(coverage, maps, boxes, image_sizes)
        yield finding(
            code, int(missed.sum()), severity=limit or NOTE, low=low, least=config.matcher.low, high=high,
            most=config.matcher.high, area=least, length=longest(config.matcher.high, config.anchors),
            small=small.sum(), long=long.sum(), rest=missed.sum() - (small | long).sum(),
            then="but for its best anchor, however little that overlaps" if claimed else "and are not learned at all",
            fix=f"{' '.join(lines)}   ({gain})" if lines else gain,
        )  # fmt: skip
    used = np.bincount(coverage.levels, minlength=len(config.anchors.sizes)) >= 1e-3 * len(coverage)
    kept = max(least_levels, int(np.flatnonzero(used).max()) + 1)
    if kept < len(config.anchors.sizes):
        strides = config.anchors.strides and f" --set 'model.anchors.strides={list(config.anchors.strides[:kept])}'"
        fix = f"--set model.pyramid.levels={kept} {_sizes(config.anchors.sizes[:kept])}{strides or ''}"
        yield finding("levels-unused", level=kept + 2, fix=fix)


def recommend(coverage: Coverage, maps: Maps, boxes: np.ndarray, image_sizes: np.ndarray) -> tuple[list[str], str]:
    """Up to two changes of the settings that bring most objects an anchor of IoU `high`, and what they bring.

    Tried on a sample: half, a quarter or twice the anchors' sizes, more ratios, larger images.  Costs count:
    two points for twice the anchors or pixels.
    """
    rows = np.unique(np.linspace(0, len(coverage) - 1, SAMPLE).astype(int))
    boxes, image_sizes, labels = boxes[rows], image_sizes[rows], coverage.labels[rows]

    def worth(config: RetinaNetConfig, cost: float) -> float:
        return measure_coverage(config, maps, boxes, image_sizes, labels).shares()[0] - 0.02 * np.log2(cost)

    config, lines, before = coverage.config, [], worth(coverage.config, 1)
    best = before
    for _ in range(2):
        tried = [(worth(c, cost), c, line) for c, line, cost in _changes(config, image_sizes)]
        value, changed, line = max(tried, key=lambda t: t[0])
        if value < best + 0.02:
            break
        best, config, lines = value, changed, [*lines, line]
    if not lines:
        return [], "no other anchors or image size found that help: cut the images into tiles around the objects"
    now = measure_coverage(config, maps, boxes, image_sizes, labels).shares()[0]
    return lines, f"then {now:.1%} reach {config.matcher.high:g}"


def _changes(config: RetinaNetConfig, image_sizes: np.ndarray) -> Iterator[tuple[RetinaNetConfig, str, float]]:
    """Other settings, the flags that choose them, and how many times the work they cost."""
    anchors, preprocess = config.anchors, config.preprocess
    for factor in (0.25, 0.5, 2):
        sizes = tuple(tuple(round(size * factor, 1) for size in level) for level in anchors.sizes)
        yield replace(config, anchors=replace(anchors, sizes=sizes)), _sizes(sizes), 1
    for wide in ((1 / 3, 1, 3), (0.2, 1, 5), (0.25, 0.5, 1, 2, 4), (0.15, 0.4, 1, 2.5, 6.5)):
        ratios = tuple(round(ratio, 3) for ratio in wide)
        line = f"--set 'model.anchors.ratios={json.dumps(ratios, separators=(',', ':'))}'"
        yield replace(config, anchors=replace(anchors, ratios=ratios)), line, len(ratios) / len(anchors.ratios)
    short = preprocess.min_size or int(np.median(image_sizes.min(axis=1)))
    long = max(preprocess.max_size, int(np.median(image_sizes.max(axis=1))))
    for factor in (1.5, 2, 3):
        low, high = round(short * factor), round(long * factor)
        larger = replace(config, preprocess=replace(preprocess, min_size=low, max_size=high))
        flags = f"--set model.preprocess.min_size={low} --set model.preprocess.max_size={high}"
        yield larger, flags, factor**2


def _sizes(sizes: Sequence[Sequence[float]]) -> str:
    return f"--set 'model.anchors.sizes={json.dumps([[round(s, 1) for s in level] for level in sizes])}'"
