"""What an evaluation says: COCO's protocol as constants, and the numbers it leads to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""A detection finds an object if their IoU reaches the threshold; AP averages over all ten."""

RECALLS = np.linspace(0.0, 1.0, 101)
"""The recalls at which precision is read off; AP is the mean of these readings."""

AREAS = {
    "all": (0.0, 1e5**2),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e5**2),
}
"""Square pixels, both ends included: an object of exactly 32 x 32 is small and medium."""

MAX_DETECTIONS = (1, 10, 100)
"""Only so many detections count per image and class, best scores first."""

NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
UNDEFINED = -1.0
"""The value, as in pycocotools, of whatever has no object to be measured on."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """COCO's twelve numbers, AP per class, and the curves behind them."""

    numbers: dict[str, float]
    """The twelve, by the names in NUMBERS; UNDEFINED where no object qualifies."""
    per_class: dict[str, dict[str, float]]
    """AP and AP50 of every class, by name."""
    precision: np.ndarray
    """(10, 101, K), at each of IOU_THRESHOLDS and RECALLS, for all areas and 100 detections; UNDEFINED for
    classes without objects."""
    images: int
    """Evaluated, those without objects included."""
    objects: int
    """To be found: crowds are not counted."""
    detections: int
    """Judged."""
    seconds: float
    """Wall time."""
    top_score: float | None = None
    """The highest score, known if nothing exceeded the model's threshold."""
    reference: dict[str, float] | None = None
    """The twelve as pycocotools finds them, if it was asked."""

    def __getitem__(self, name: str) -> float:
        return self.numbers[name]

    def curves(self, threshold: float = 0.5) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Recall and precision, (101,) each, of every class that has objects, at one IoU threshold.

        Raises:
            ValueError: if the threshold is not one of IOU_THRESHOLDS.
        """
        at = np.flatnonzero(np.isclose(IOU_THRESHOLDS, threshold))
        if len(at) == 0:
            known = ", ".join(f"{t:.2f}" for t in IOU_THRESHOLDS)
            raise ValueError(f"no curve at IoU {threshold}: COCO evaluates at {known}")
        curves = zip(self.per_class, self.precision[at[0]].T, strict=True)
        return {name: (RECALLS, precision) for name, precision in curves if precision[0] != UNDEFINED}

    def table(self) -> str:
        """The twelve numbers and the classes as aligned text; "-" stands for undefined."""
        rows = [
            ("", "all", "small", "medium", "large"),
            ("AP   IoU .50:.95", *map(self._shown, ("AP", "APs", "APm", "APl"))),
            ("AP50 IoU .50", self._shown("AP50")),
            ("AP75 IoU .75", self._shown("AP75")),
            ("AR   1 detection", self._shown("AR1")),
            ("AR   10 detections", self._shown("AR10")),
            ("AR   100 detections", *map(self._shown, ("AR100", "ARs", "ARm", "ARl"))),
        ]
        classes = [("class", "AP", "AP50")]
        classes += [(name, _digits(c["AP"]), _digits(c["AP50"])) for name, c in self.per_class.items()]
        head = f"{self.images:,} images, {self.objects:,} objects, {self.detections:,} detections"
        remark = self.remark()
        return "\n".join([head, *([remark] if remark else []), "", *_aligned(rows), "", *_aligned(classes)])

    def comparison(self) -> str:
        """Our numbers, those of pycocotools, and how far they are apart, as aligned text."""
        both = [(name, self.numbers[name], theirs) for name, theirs in (self.reference or {}).items()]
        rows = [(name, f"{ours:.4f}", f"{theirs:.4f}", f"{ours - theirs:.0e}") for name, ours, theirs in both]
        return "\n".join(_aligned([("", "ours", "coco", "apart"), *rows]))

    def remark(self) -> str:
        """One sentence if the numbers need one: nothing to find, nothing found, nothing right; else ""."""
        if self.objects == 0:
            return "The ground truth holds no object, so there is nothing to measure: every number is -1."
        if self.detections == 0:
            known = "" if self.top_score is None else f": the highest score seen was {self.top_score:.4f}"
            return f"AP is 0 because the model detected nothing above its score threshold{known}."
        if self.numbers["AP50"] == 0:
            return (
                "AP is 0 because no detection overlaps an object of its class with IoU 0.5: if the pictures "
                "look right, check the category ids and that boxes are [x, y, width, height] in pixels of "
                "the original image."
            )
        return ""

    def timed(self, seconds: float) -> Evaluation:
        """The same, with another wall time: that of the detecting included."""
        return replace(self, seconds=seconds)

    def to_json(self) -> dict:
        """The twelve numbers, `per_class`, `images` and `seconds`: what `metrics.json` holds."""
        return {**self.numbers, "per_class": self.per_class, "images": self.images, "seconds": self.seconds}

    def _shown(self, name: str) -> str:
        return _digits(self.numbers[name])


def twelve_numbers(precision: np.ndarray, recall: np.ndarray) -> dict[str, float]:
    """COCO's summary: each number is the mean over what is defined.

    Shapes:
        precision: (10, 101, K, 4, 3)  IoU threshold, recall, class, AREAS, MAX_DETECTIONS
        recall: (10, K, 4, 3)
    """
    every, small, medium, large = range(4)
    at_50, at_75 = 0, 5
    return {
        "AP": _mean(precision[:, :, :, every, 2]),
        "AP50": _mean(precision[at_50, :, :, every, 2]),
        "AP75": _mean(precision[at_75, :, :, every, 2]),
        "APs": _mean(precision[:, :, :, small, 2]),
        "APm": _mean(precision[:, :, :, medium, 2]),
        "APl": _mean(precision[:, :, :, large, 2]),
        "AR1": _mean(recall[:, :, every, 0]),
        "AR10": _mean(recall[:, :, every, 1]),
        "AR100": _mean(recall[:, :, every, 2]),
        "ARs": _mean(recall[:, :, small, 2]),
        "ARm": _mean(recall[:, :, medium, 2]),
        "ARl": _mean(recall[:, :, large, 2]),
    }


def by_class(precision: np.ndarray, names: list[str]) -> dict[str, dict[str, float]]:
    """AP and AP50 of every class.

    Shapes:
        precision: (10, 101, K)
    """
    return {
        name: {"AP": _mean(precision[:, :, k]), "AP50": _mean(precision[0, :, k])}
        for k, name in enumerate(names)
    }


def _mean(values: np.ndarray) -> float:
    defined = values[values > UNDEFINED]
    return float(np.mean(defined)) if defined.size else UNDEFINED


def _digits(value: float) -> str:
    return "-" if value == UNDEFINED else f"{value:.3f}"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of cells as lines: the first column flush left, the others right under their heading."""
    first = max(len(row[0]) for row in rows)
    return [
        (row[0].ljust(first) + "".join(cell.rjust(8) for cell in row[1:])).rstrip() for row in rows
    ]
