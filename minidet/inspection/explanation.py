"""What there is to say about one picture: its objects as training sees them, its detections and their origin."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from minidet.inspection.findings import aligned
from minidet.plots import contact_sheet, draw_boxes

Box = tuple[float, float, float, float]

STATUSES = {"positive": 2, "low-quality": 1, "ignored": 6, "taken": 3, "none": 4}
"""What training makes of an object, and its colour in the picture: green, orange, purple, pink, red.

positive: anchors with IoU >= matcher.high answer for it.  low-quality: only its best ones do, though below.
ignored: its best anchors are neither object nor background.  taken: they overlap another object more.  none: all
its anchors are background, so nothing is learned of it.
"""
PANEL = 640  # pixels of the longer side of each drawing


@dataclass(frozen=True)
class ExplainedObject:
    """One annotated object; boxes in pixels of the picture."""

    label: str
    box: Box
    status: str
    """One of STATUSES."""
    level: int
    """Of its best anchor: 3 for P3."""
    anchor: Box
    iou: float
    anchors: int
    """How many answer for it."""
    loss: float
    """Of these anchors, classes and boxes together."""
    share: float
    """Of the whole loss of the picture."""


@dataclass(frozen=True)
class Suppressed:
    """A box that a better one of its class overlaps too much."""

    score: float
    iou: float
    box: Box


@dataclass(frozen=True)
class ExplainedDetection:
    """One detection; `box` in pixels of the picture, `anchor` and `decoded` in those of the network's input."""

    label: str
    score: float
    logit: float
    level: int
    anchor: Box
    deltas: Box
    """dx, dy, dw, dh: the centre moves by dx, dy anchor sides, the sides grow by exp(dw), exp(dh)."""
    decoded: Box
    """What they make of the anchor, before it is cut at the picture's borders."""
    box: Box
    object: int | None
    """Which of the objects it overlaps most, if any."""
    iou: float
    suppressed: tuple[Suppressed, ...]


@dataclass(frozen=True, eq=False)
class Explanation:
    """A picture's objects and detections; the share of the loss that no object has is the background's."""

    name: str
    image: np.ndarray
    scale: tuple[float, float]
    """Pixels of the network's input per pixel of the picture, along x and y."""
    classes: tuple[str, ...]
    objects: tuple[ExplainedObject, ...]
    detections: tuple[ExplainedDetection, ...]
    loss: float
    background: float
    """Loss of the anchors that are background."""

    def table(self, threshold: float = 0.3) -> str:
        """The objects, and the detections that score more than `threshold`, in columns."""
        shown = [found for found in self.detections if found.score > threshold]
        lines = [f"{self.name}: {len(self.objects)} objects, {len(shown)} detections score > {threshold:g} "
                 f"({len(self.detections)} in all)"]  # fmt: skip
        if self.objects:
            rows = [
                (str(n), o.label, _text(o.box), o.status, f"P{o.level}", _sides(o.anchor), f"{o.iou:.2f}",
                 str(o.anchors), f"{o.loss:.4f}", f"{o.share:.1%}")
                for n, o in enumerate(self.objects)
            ]  # fmt: skip
            rows.append(("", "background", *[""] * 6, f"{self.background:.4f}",
                         f"{self.background / max(self.loss, 1e-12):.1%}"))  # fmt: skip
            header = ("object", "class", "box", "status", "level", "best anchor", "IoU", "anchors", "loss", "share")
            lines += ["", aligned(header, rows, left=4)]
        if shown:
            rows = [
                (str(n), d.label, f"{d.score:.3f}", f"{d.logit:+.2f}", f"P{d.level}", _sides(d.anchor),
                 " ".join(f"{v:+.2f}" for v in d.deltas), _sides(d.decoded), _text(d.box),
                 "" if d.object is None else f"{d.object} ({d.iou:.2f})", str(len(d.suppressed)))
                for n, d in enumerate(shown)
            ]  # fmt: skip
            header = ("detection", "class", "score", "logit", "level", "anchor", "dx dy dw dh", "decoded", "box",
                      "object (IoU)", "suppressed")  # fmt: skip
            x, y = self.scale
            note = f"anchor, decoded: sides @ centre, in the network's input, the picture times {x:.3g}, {y:.3g}"
            lines += ["", aligned(header, rows, left=2), note]
        return "\n".join(lines)

    def to_json(self) -> dict:
        """Everything but the pixels."""
        kept = ("name", "scale", "loss", "background")
        rows = {name: [asdict(row) for row in getattr(self, name)] for name in ("objects", "detections")}
        return {name: getattr(self, name) for name in kept} | rows

    def save(self, folder: str | Path, threshold: float = 0.3) -> list[Path]:
        """Write NAME_explained.png and .json, named after the picture."""
        folder, stem = Path(folder), f"{Path(self.name).stem}_explained"
        drawn = self.draw(folder / f"{stem}.png", threshold)
        (folder / f"{stem}.json").write_text(json.dumps(self.to_json(), indent=1) + "\n")
        return [drawn, folder / f"{stem}.json"]

    def draw(self, path: str | Path, threshold: float = 0.3) -> Path:
        """Objects by status with their best anchors; detections with theirs; and the boxes that gave way to them."""
        shown = [found for found in self.detections if found.score > threshold]
        back = np.array([*self.scale, *self.scale])
        numbers = [(n, f"{n}") for n in range(len(shown))]
        numbers += [(n, "") for n, found in enumerate(shown) for _ in found.suppressed]
        everything = [found.box for found in shown] + [s.box for found in shown for s in found.suppressed]
        panels = [
            ("objects and their best anchors",
             [o.box for o in self.objects], [STATUSES[o.status] for o in self.objects],
             [f"{n} {o.iou:.2f} P{o.level}" for n, o in enumerate(self.objects)], [o.anchor for o in self.objects]),
            ("detections and their anchors",
             [found.box for found in shown], [self.classes.index(found.label) for found in shown],
             [f"{n} {f.label} {f.score:.2f} P{f.level}" for n, f in enumerate(shown)],
             [np.array(found.anchor) / back for found in shown]),
            ("boxes that gave way, in their colour",
             everything, [n for n, _ in numbers], [text for _, text in numbers], []),
        ]  # fmt: skip
        pictures = [
            draw_boxes(
                self.image, np.reshape(boxes, (-1, 4)), np.array(colours, int), None,
                [""] * (1 + max(colours, default=0)), truth=np.reshape(anchors, (-1, 4)), texts=texts, size=PANEL,
            )
            for _, boxes, colours, texts, anchors in panels
        ]  # fmt: skip
        caption = (
            f"{Path(self.name).name}.  Objects: green positive, orange low-quality, purple ignored, pink taken, "
            "red none.  Dashed: anchors.  Numbers are those of the table."
        )
        return contact_sheet(pictures, [panel[0] for panel in panels], path, columns=3, caption=caption)


def _text(box: Box) -> str:
    return " ".join(f"{value:.0f}" for value in box)


def _sides(box: Box) -> str:
    """Sides and centre."""
    x1, y1, x2, y2 = box
    return f"{x2 - x1:.0f}x{y2 - y1:.0f} @ {(x1 + x2) / 2:.0f},{(y1 + y2) / 2:.0f}"
