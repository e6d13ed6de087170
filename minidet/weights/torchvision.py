"""torchvision's names: RetinaNet v1 and v2, files from before names changed in 2021, and a ResNet alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from minidet.weights.layout import BLOCKS, DEPTH, LEVELS, STAGES, TO_OHWI, TO_OIHW, translate


def from_torchvision(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state dict of torchvision's under our names, filters OHWI.

    Takes whole detectors and backbones alone ("conv1.weight").  Left behind: the counts of batches and a
    backbone's classifier, which nothing here reads.
    """
    if not any(name.startswith(("backbone.", "head.")) for name in state):
        state = {f"backbone.body.{name}": array for name, array in state.items()}
    kept = {
        name: array
        for name, array in state.items()
        if not name.endswith(".num_batches_tracked") and not name.startswith("backbone.body.fc.")
    }
    return translate(kept, OURS, TO_OHWI)


def to_torchvision(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state dict of ours under torchvision's current names, filters OIHW."""
    return translate(state, THEIRS, TO_OIHW)


def _paths() -> Iterator[tuple[str, str]]:
    """Every module of ours, and what torchvision calls it."""
    yield "backbone.stem.conv", "backbone.body.conv1"
    yield "backbone.stem.norm", "backbone.body.bn1"
    for stage in range(STAGES):
        for block in range(BLOCKS):
            ours, theirs = f"backbone.stages.{stage}.blocks.{block}", f"backbone.body.layer{stage + 1}.{block}"
            for i in (1, 2, 3):
                yield f"{ours}.conv{i}.conv", f"{theirs}.conv{i}"
                yield f"{ours}.conv{i}.norm", f"{theirs}.bn{i}"
            yield f"{ours}.shortcut.conv", f"{theirs}.downsample.0"
            yield f"{ours}.shortcut.norm", f"{theirs}.downsample.1"
    for i in range(LEVELS):
        yield f"pyramid.lateral.{i}", f"backbone.fpn.inner_blocks.{i}.0"
        yield f"pyramid.output.{i}", f"backbone.fpn.layer_blocks.{i}.0"
        yield f"pyramid.extra.{i}", f"backbone.fpn.extra_blocks.p{i + 6}"
    for ours, theirs in SUBNETS:
        for i in range(DEPTH):
            yield f"{ours}.tower.{i}.conv", f"{theirs}.conv.{i}.0"
            yield f"{ours}.tower.{i}.norm", f"{theirs}.conv.{i}.1"
    yield "head.class_subnet.final", "head.classification_head.cls_logits"
    yield "head.box_subnet.final", "head.regression_head.bbox_reg"


def _legacy_paths() -> Iterator[tuple[str, str]]:
    """Where the names differed before: no inner ".0", and the ReLUs of a tower were counted too."""
    for i in range(LEVELS):
        yield f"pyramid.lateral.{i}", f"backbone.fpn.inner_blocks.{i}"
        yield f"pyramid.output.{i}", f"backbone.fpn.layer_blocks.{i}"
    for ours, theirs in SUBNETS:
        for i in range(DEPTH):
            yield f"{ours}.tower.{i}.conv", f"{theirs}.conv.{2 * i}"


SUBNETS = (
    ("head.class_subnet", "head.classification_head"),
    ("head.box_subnet", "head.regression_head"),
)
THEIRS = dict(_paths())
OURS = {theirs: ours for ours, theirs in (*_legacy_paths(), *_paths())}
