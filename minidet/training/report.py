"""What a finished training leaves for people and for programs."""

from __future__ import annotations

import json
from pathlib import Path

from minidet.plots import loss_curves


def write_report(out: Path, training) -> None:
    """metrics.json (the validation's numbers, and the training's) and curves.png, in the folder `out`."""
    state = training.state
    numbers = {} if training.evaluation is None else training.evaluation.to_json()
    numbers["training"] = {
        "images": state.position,
        "steps": state.steps,
        "seconds": state.seconds,
        "best_AP": state.best_ap if state.best_ap >= 0 else None,
        "best_at_images": state.best_position,
    }
    (out / "metrics.json").write_text(json.dumps(numbers, indent=2) + "\n")
    loss_curves(training.history, out / "curves.png")
