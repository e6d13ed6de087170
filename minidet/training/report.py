"""What a finished training leaves for people and for programs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from minidet.data.sample import Dataset
from minidet.detect import detect
from minidet.evaluation import Evaluation
from minidet.models import RetinaNet
from minidet.plots import contact_sheet, draw_boxes, loss_curves
from minidet.training.state import TrainingState

SHOWN = 0.3  # score from which a detection is drawn
DRAWN = 480  # pixels of a drawing's longer side


def write_report(
    out: Path, history: dict[str, list], evaluation: Evaluation | None, state: TrainingState
) -> None:
    """metrics.json (the validation's numbers, and the training's) and curves.png, in the folder `out`."""
    numbers = {} if evaluation is None else evaluation.to_json()
    numbers["training"] = {
        "images": state.position,
        "steps": state.steps,
        "seconds": state.seconds,
        "best_AP": state.best_ap if state.best_ap >= 0 else None,
        "best_at_images": state.best_position,
    }
    (out / "metrics.json").write_text(json.dumps(numbers, indent=2) + "\n")
    loss_curves(history, out / "curves.png")


def draw_samples(model: RetinaNet, dataset: Dataset, images: int, path: Path) -> None:
    """A sheet of pictures, evenly spread over the data set, with what the model sees and, dashed, what is there."""
    rows = np.unique(np.linspace(0, len(dataset) - 1, images).astype(int))
    samples = [dataset[int(row)] for row in rows]
    pictures = []
    for sample, found in zip(samples, detect(model, [sample.image for sample in samples]), strict=True):
        sure = found.scores >= SHOWN
        pictures.append(
            draw_boxes(
                sample.image, found.boxes[sure], found.labels[sure], found.scores[sure], found.classes,
                truth=sample.boxes, size=DRAWN,
            )
        )  # fmt: skip
    if pictures:
        caption = f"Solid: found, with scores from {SHOWN:g}.  Dashed: what is there."
        contact_sheet(pictures, [sample.name for sample in samples], path, columns=3, caption=caption)
