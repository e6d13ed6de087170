"""detectron2's names: RetinaNet on a ResNet with frozen batch norm, as in its model zoo."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from minidet.weights.layout import BLOCKS, DEPTH, LEVELS, STAGES, TO_OHWI, translate

DERIVED = ("pixel_mean", "pixel_std", "anchor_generator.")
"""What older files also hold, and our configuration says."""


def from_detectron2(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state dict of detectron2's under our names, filters OHWI.

    Nothing is adapted: the `detectron2` preset has its channel order, strides and order of anchors.  Batch
    norms that were folded before they were saved have no statistics in the file: mean 0, variance 1.
    """
    kept = {name: array for name, array in state.items() if not name.startswith(DERIVED)}
    for name, array in state.items():
        if name.endswith(".norm.weight"):
            norm = name.removesuffix(".weight")
            kept.setdefault(f"{norm}.running_mean", np.zeros_like(array))
            kept.setdefault(f"{norm}.running_var", np.ones_like(array))
    return translate(kept, OURS, TO_OHWI)


def _paths() -> Iterator[tuple[str, str]]:
    """Every module of ours, and what detectron2 calls it."""
    yield "backbone.stem.conv", "backbone.bottom_up.stem.conv1"
    yield "backbone.stem.norm", "backbone.bottom_up.stem.conv1.norm"
    for stage in range(STAGES):
        for block in range(BLOCKS):
            ours, theirs = f"backbone.stages.{stage}.blocks.{block}", f"backbone.bottom_up.res{stage + 2}.{block}"
            for part in ("conv1", "conv2", "conv3", "shortcut"):
                yield f"{ours}.{part}.conv", f"{theirs}.{part}"
                yield f"{ours}.{part}.norm", f"{theirs}.{part}.norm"
    for i in range(LEVELS):
        yield f"pyramid.lateral.{i}", f"backbone.fpn_lateral{i + 3}"
        yield f"pyramid.output.{i}", f"backbone.fpn_output{i + 3}"
        yield f"pyramid.extra.{i}", f"backbone.top_block.p{i + 6}"
    for i in range(DEPTH):  # detectron2 counts the ReLUs too
        yield f"head.class_subnet.tower.{i}.conv", f"head.cls_subnet.{2 * i}"
        yield f"head.box_subnet.tower.{i}.conv", f"head.bbox_subnet.{2 * i}"
    yield "head.class_subnet.final", "head.cls_score"
    yield "head.box_subnet.final", "head.bbox_pred"


OURS = {theirs: ours for ours, theirs in _paths()}
