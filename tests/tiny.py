"""The smallest network the command can train, as its own flags; and a folder of pictures to train it on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from minidet.data import shapes, write_coco
from minidet.detection import AnchorConfig, octaves
from minidet.models import HeadConfig, PyramidConfig, ResNetConfig, RetinaNet, presets
from minidet.nn import Norm

SETTINGS = {
    "model.backbone.stem": "8",
    "model.backbone.widths": "[8, 8]",
    "model.backbone.blocks": "[1, 1]",
    "model.backbone.norm.groups": "2",
    "model.pyramid.channels": "8",
    "model.pyramid.levels": "2",
    "model.head.depth": "1",
    "model.head.norm.groups": "2",
    "model.anchors.sizes": "[[16, 20, 25], [32, 40, 50]]",
    "model.anchors.strides": "[8, 16]",
    "model.postprocess.score_threshold": "0",  # a network that has learned nothing yet shall find something
}
NETWORK = [argument for name, value in SETTINGS.items() for argument in ("--set", f"{name}={value}")]
"""Two stages of one block, two pyramid levels, eight channels everywhere."""


def model(norm: str = "group", normaliser: str = "batch", seed: int = 0, xp=None) -> RetinaNet:
    """The same in Python, with any norm in the backbone."""
    config = presets.small(shapes().classes)
    config = replace(
        config,
        backbone=ResNetConfig(stem=8, widths=(8, 8), blocks=(1, 1), bottleneck=False, norm=Norm(norm, groups=2)),
        pyramid=PyramidConfig(channels=8, levels=2),
        head=HeadConfig(depth=1, norm=Norm("group", groups=2), he_towers=True),
        anchors=AnchorConfig(octaves((16, 32)), strides=(8, 16)),
        loss=replace(config.loss, normaliser=normaliser),
    )
    return RetinaNet(config, seed=seed, xp=xp)


def coco_folder(folder: Path, *, train: int = 8, val: int = 3) -> Path:
    """Pictures of 64 x 64 pixels in COCO's layout, by the package's own writer."""
    write_coco(shapes("train", images=train, size=64), folder, "train")
    write_coco(shapes("val", images=val, size=64), folder, "val")
    return folder
