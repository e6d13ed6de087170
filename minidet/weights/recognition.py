"""Whose weights these are: told by their names, and how large the network is by their shapes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import safe_open

from minidet.models import RetinaNetConfig, presets
from minidet.nn import Norm
from minidet.weights.coco_names import BY_NUMBER
from minidet.weights.detectron2 import from_caffe2, from_detectron2
from minidet.weights.files import State, read_arrays
from minidet.weights.tensors import WeightsError
from minidet.weights.torchvision import from_torchvision

CHECKPOINT_PREFIX = "weights."  # what the arrays of a model are called in a checkpoint of a training
CLASS_OUTPUT = "head.class_subnet.final."
BOX_BIAS = "head.box_subnet.final.bias"
COUNT = ".num_batches_tracked"
STAND_IN = ("object",)  # the one class of a detector that has only a backbone yet


@dataclass(frozen=True)
class Layout:
    """Whose state dict it is.

    Attributes:
        name: of the system.
        markers: names that begin so are found in its files, and in none of the systems listed later.
        preset: the network it is of, in its smallest published form, with the pixels that the first filters expect.
        stride_in_1x1: which convolution of a bottleneck halves the map, as no shape tells; in ResNeXt the 3x3.
        translate: gives our names and the order of our axes.
    """

    name: str
    markers: tuple[str, ...]
    preset: Callable[[Sequence[str]], RetinaNetConfig]
    stride_in_1x1: bool
    translate: Callable[[Mapping[str, np.ndarray]], State]


LAYOUTS = (
    Layout(
        "detectron2 RetinaNet",
        ("backbone.bottom_up.", "backbone.fpn_", "head.cls_subnet."),
        presets.detectron2,
        True,
        from_detectron2,
    ),
    Layout(
        "torchvision RetinaNet", ("backbone.body.", "backbone.fpn."), presets.torchvision_v1, False, from_torchvision
    ),
    Layout("torchvision ResNet", ("conv1.weight", "layer1."), presets.torchvision_v1, False, from_torchvision),
    Layout("Caffe2 ResNet", ("res2_0_branch",), presets.detectron2, True, from_caffe2),
)
OURS = Layout("minidet", (), presets.small, False, dict)
_CHECKPOINT = replace(OURS, name="minidet checkpoint")


@dataclass(frozen=True)
class Found:
    """The weights of a file, recognised.

    Attributes:
        path: the file.
        layout: whose names it uses.
        state: its arrays under our names, filters OHWI.
        classes: what its class output stands for, where that is known.
        trains: whether its batch norms count batches, as torch's do unless they are frozen.
    """

    path: Path
    layout: Layout
    state: State
    classes: tuple[str, ...] | None
    trains: bool = False

    @property
    def foreign(self) -> bool:
        """Whether another system wrote it, so that its conventions are that system's."""
        return self.layout in LAYOUTS

    @property
    def detector(self) -> bool:
        """Whether there is more than a backbone."""
        return any(name.startswith("head.") for name in self.state)


def find_weights(path: str | Path) -> Found:
    """Read a file of weights and recognise whose they are.

    Raises:
        WeightsError: if it cannot be read, or its names are of no known system.
    """
    path = Path(path)
    given = read_arrays(path)
    for layout in LAYOUTS:
        if any(name.startswith(layout.markers) for name in given):
            state, trains = layout.translate(given), any(name.endswith(COUNT) for name in given)
            number = _classes(state) if {f"{CLASS_OUTPUT}bias", BOX_BIAS} <= state.keys() else 0
            return Found(path, layout, state, BY_NUMBER.get(number), trains)
    if any(name.startswith(CHECKPOINT_PREFIX) for name in given):
        state = {n.removeprefix(CHECKPOINT_PREFIX): a for n, a in given.items() if n.startswith(CHECKPOINT_PREFIX)}
        with safe_open(path, framework="np") as file:
            header = json.loads((file.metadata() or {}).get("header", "{}"))
        return Found(path, _CHECKPOINT, state, tuple(header["classes"]) if "classes" in header else None)
    if any(name.startswith("head.class_subnet.") or name.startswith("backbone.stem.") for name in given):
        return Found(path, OURS, given, None)
    known = ", ".join(layout.name for layout in LAYOUTS)
    first = ", ".join(list(given)[:3]) or "none"
    raise WeightsError(f"{path}: names of no known system (first: {first}); known are {known} and minidet's own")


def config_for(found: Found, classes: Sequence[str] | None = None) -> RetinaNetConfig:
    """The network that foreign weights are of: the system's preset, in the size that the shapes tell.

    Class names are `classes`, else COCO's where their number is COCO's, else numbers.  torchvision's detectors without
    running averages that train are taken to be of the published kind, whose batch norm has eps 0.

    Raises:
        WeightsError: if the names are minidet's own, which say nothing of conventions, or the shapes are of
            no RetinaNet or ResNet that can be built here.
    """
    if not found.foreign:
        raise WeightsError(f"{found.path}: minidet's own names, which say nothing of anchors: choose a preset")
    try:
        return _of_detector(found, classes) if found.detector else _of_backbone(found, tuple(classes or STAND_IN))
    except (LookupError, ZeroDivisionError, ValueError) as error:
        why = f"there is no {error}" if isinstance(error, LookupError) else str(error)
        raise WeightsError(
            f"{found.path}: {found.layout.name}, but not of a kind that is known: {why}; choose a preset that it fits"
        ) from error


def _of_backbone(found: Found, classes: tuple[str, ...]) -> RetinaNetConfig:
    base = found.layout.preset(classes)
    body = _measured(base.backbone, found.state)
    if base.preprocess.bgr:
        return presets.with_backbone(base, body)
    if not body.bottleneck and body.blocks[:3] == (2, 2, 2):
        return presets.resnet18(classes)  # which ends at stride 16
    norm = replace(body.norm, eps=1e-5)  # with which torchvision and timm train on ImageNet
    return replace(base, backbone=replace(body, norm=norm))


def _of_detector(found: Found, classes: Sequence[str] | None) -> RetinaNetConfig:
    state = found.state
    anchors, number = _anchors(state), _classes(state)
    names = tuple(classes or found.classes or map(str, range(number)))
    if len(names) != number:
        raise ValueError(f"it has {number} classes, but {len(names)} names were given")
    group = "head.class_subnet.tower.0.norm.weight" in state
    base = (presets.torchvision_v2 if group else found.layout.preset)(names)
    if anchors != base.anchors.per_cell:
        raise ValueError(f"it has {anchors} anchors a cell, not {base.anchors.per_cell}")
    channels = state["pyramid.output.0.weight"].shape[0]
    depth = _count(state, "head.class_subnet.tower.{}.conv.weight")
    levels = _count(state, "pyramid.lateral.{}.weight") + _count(state, "pyramid.extra.{}.weight")
    body = _measured(base.backbone, state)
    base = presets.with_backbone(base, body) if base.preprocess.bgr else replace(base, backbone=body)
    if found.trains and body.norm.name == "frozen":
        base = replace(base, backbone=replace(base.backbone, norm=Norm("batch")))
    from_backbone = state["pyramid.extra.0.weight"].shape[3] == state["pyramid.lateral.2.weight"].shape[3]
    return replace(
        base,
        pyramid=replace(base.pyramid, channels=channels, levels=levels, extra_from_backbone=from_backbone),
        head=replace(base.head, depth=depth),
    )


def _measured(base, state: State):
    """The ResNetConfig whose parameters have these shapes, with the conventions of `base`."""
    first = "backbone.stages.{}.blocks.0.{}.conv.weight"
    stages = range(_count(state, first.format("{}", "conv1")))
    blocks = tuple(_count(state, f"backbone.stages.{i}.blocks.{{}}.conv1.conv.weight") for i in stages)
    bottleneck = first.format(0, "conv3") in state
    outputs = [state[first.format(i, "conv3" if bottleneck else "conv2")].shape[0] for i in stages]
    widths = tuple(F // 4 for F in outputs) if bottleneck else tuple(outputs)
    filters, _, _, channels = state[first.format(0, "conv2")].shape
    groups = filters // channels
    width = filters * 64 // (widths[0] * groups)
    norm = base.norm
    if "backbone.stem.conv.bias" in state:
        norm = Norm("none")
    elif "backbone.stem.norm.running_var" not in state:
        raise ValueError("its backbone is not normalized by batch norm, and no file says in which groups")
    return replace(
        base,
        stem=state["backbone.stem.conv.weight"].shape[0],
        widths=widths,
        blocks=blocks,
        bottleneck=bottleneck,
        groups=groups,
        group_width=width if bottleneck else base.group_width,
        norm=norm,
    )


def _anchors(state: State) -> int:
    return state[BOX_BIAS].size // 4


def _classes(state: State) -> int:
    return state[f"{CLASS_OUTPUT}bias"].size // max(1, _anchors(state))


def _count(state: State, pattern: str) -> int:
    """How many of pattern.format(0), pattern.format(1) and so on there are."""
    number = 0
    while pattern.format(number) in state:
        number += 1
    return number
