"""detectron2's names: RetinaNet on a ResNet with frozen batch norm, as in its model zoo, and Caffe2's ResNets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np

from minidet.weights.folding import EPS
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


def from_caffe2(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A ResNet in Caffe2's names, which the paper and detectron2 start from, under our names, filters OHWI.

    A norm that has become a factor and an offset gets the variance that leaves both as they are.  Left behind:
    the classifier, and a bias of the first filters, which detectron2 does not read either.
    """
    renamed = {}
    for name, array in state.items():
        if found := CAFFE2.fullmatch(name):
            stage, block, branch, norm, leaf = found.groups()
            path = f"backbone.bottom_up.{stage}.{block}.{CAFFE2_PARTS[branch]}" if stage else STEM
            renamed[f"{path}{'.norm' if norm else ''}.{CAFFE2_LEAVES[leaf]}"] = array
            if leaf == "s" and name.removesuffix("s") + "riv" not in state:
                renamed[f"{path}.norm.running_var"] = np.full_like(array, 1 - EPS)
        elif not name.startswith(("fc1000_", "pred_", "conv1_b")):
            renamed[name] = array
    return from_detectron2(renamed)


STEM = "backbone.bottom_up.stem.conv1"
CAFFE2 = re.compile(r"(?:(?:res_)?conv1|(res\d)_(\d+)_branch(1|2[abc]))(?:_(bn))?_((?<=bn_)(?:s|b|rm|riv)|w)")
CAFFE2_PARTS = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
CAFFE2_LEAVES = {"w": "weight", "s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}


def _paths() -> Iterator[tuple[str, str]]:
    """Every module of ours, and what detectron2 calls it."""
    yield "backbone.stem.conv", STEM
    yield "backbone.stem.norm", f"{STEM}.norm"
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
