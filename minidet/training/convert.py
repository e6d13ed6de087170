"""Foreign weights to a checkpoint that everything here takes, and what was trained here to torchvision's names."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from minidet.models import RetinaNet, RetinaNetConfig
from minidet.models.presets import PRESETS, torchvision_v1, torchvision_v2
from minidet.nn import BatchNorm2d, Norm
from minidet.training.checkpoint import Checkpoint, find_checkpoint, is_checkpoint, write_checkpoint
from minidet.training.load import load_model
from minidet.training.settings import assign, differences, from_json, to_json
from minidet.weights import (
    CATEGORY_IDS,
    Found,
    WeightsError,
    config_for,
    find_weights,
    from_torchvision,
    load_initial,
    to_torchvision,
)
from minidet.weights.recognition import COUNT, OURS, STAND_IN
from minidet.weights.torch_file import write_torch

SUFFIXES = (".pth", ".pt", ".safetensors", ".npz")
IN_TORCH = ("backbone", "pyramid", "head", "anchors", "coder", "postprocess", "preprocess")
"""Settings that say what a model's numbers mean; the others matter in training only."""


@dataclass(frozen=True)
class Conversion:
    """What was written, in words.

    Attributes:
        path: the new file.
        config: the network.
        table: what was recognised, loaded and left out; or how to load the file in PyTorch.
    """

    path: Path
    config: RetinaNetConfig
    table: str


def convert(
    source: str | Path,
    out: str | Path,
    *,
    preset: str | None = None,
    classes: Sequence[str] | None = None,
    settings: Sequence[str] = (),
) -> Conversion:
    """Write a checkpoint (.safetensors) of the weights in a file of torchvision's, timm's or detectron2's.

    The network is recognised, unless `preset` names it and its conventions.  `classes` are its classes; those
    of published detectors are known.  `settings` are changes to it, as "model.backbone.norm.eps=1e-5".  A
    backbone alone is put under a detector that starts anew, for `train` to begin with.

    Raises:
        WeightsError: if the file cannot be read or used as a whole.
        ValueError: if there is no such preset or setting, or `out` is no .safetensors file, or is the source.
    """
    out = _place(out, source, (".safetensors",))
    found = find_weights(source)
    config = _config(found, preset, classes)
    tree = {"model": to_json(config)}
    for setting in settings:
        try:
            assign(tree, setting)
        except ValueError as error:
            raise ValueError(f"--set {setting}: {error}") from error
    config = from_json(RetinaNetConfig, tree["model"], "model")
    model = RetinaNet(config, xp=np)
    if preset and found.layout.translate is from_torchvision:  # what `export` wrote can have any conventions
        found = replace(found, layout=replace(OURS, name=found.layout.name))
    done = load_initial(model, replace(found, classes=None))
    missing = [name for name in done.untouched if found.detector or name.startswith("backbone.")]
    beyond = tuple(f"backbone.stages.{i}." for i in range(len(config.backbone.blocks), 4))
    strange = [name for name in done.skipped if found.detector or not name.startswith(beyond)]
    if missing or strange:
        name = (strange or missing)[0]
        raise WeightsError(
            f"{found.path}: {found.layout.name}, but not the network of this preset: {len(strange)} of its tensors do "
            f"not fit and {len(missing)} are missing, first {name}: {done.skipped.get(name, 'missing')}"
        )
    ids = CATEGORY_IDS.get(config.classes, tuple(range(1, len(config.classes) + 1)))
    write_checkpoint(out, Checkpoint(to_json(config), config.classes, ids, model.state_dict()))
    return Conversion(out, config, "\n".join([done.table(), *_remarks(found, config)]))


def _config(found: Found, preset: str | None, classes: Sequence[str] | None) -> RetinaNetConfig:
    classes = tuple(classes or found.classes or ())
    if found.detector and not classes:
        raise WeightsError(f"{found.path}: a detector whose classes are not known: name them (--classes)")
    if preset is None:
        return config_for(found, classes)
    if preset not in PRESETS:
        raise ValueError(f"there is no preset {preset!r}; known are {', '.join(PRESETS)}")
    return PRESETS[preset](classes or STAND_IN)


def _remarks(found: Found, config: RetinaNetConfig) -> list[str]:
    """Which preset it is, or nearly is, and what no file says."""
    near = {name: differences(to_json(make(config.classes)), to_json(config)) for name, make in PRESETS.items()}
    name = min(near, key=lambda preset: len(near[preset]))
    lines = [f"preset {name}, {len(config.classes)} classes"] + [f"  but {line}" for line in near[name]]
    if not found.detector:
        lines.append("a backbone alone: pyramid and head start anew, train from it with --init")
    if found.foreign and found.detector and config.backbone.norm.eps == 0:
        lines.append(
            "batch norm has eps 0, as torchvision's published weights need it; was it trained from ImageNet weights, "
            "then --set model.backbone.norm.eps=1e-5"
        )
    return lines


def export(run: str | Path, out: str | Path) -> Conversion:
    """Write a model's weights under torchvision's names, filters OIHW, as .pth, .safetensors or .npz.

    Every value is kept to the bit.  What torchvision's own RetinaNet would do otherwise is said in the table.

    Raises:
        CheckpointError: if there is no model at `run`.
        ValueError: if `out` has another suffix, or is a checkpoint.
    """
    out = _place(out, find_checkpoint(run), SUFFIXES)
    if out.is_file() and is_checkpoint(out):  # the run's other one, perhaps
        raise ValueError(f"{out}: would overwrite a checkpoint of a training: choose another name")
    model = load_model(run, xp=np)
    state = to_torchvision(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, BatchNorm2d):  # torch counts batches, and reads nothing else in the count
            state |= to_torchvision({f"{name}{COUNT}": np.array(0, np.int64)})
    _write(out, state)
    return Conversion(out, model.config, _in_torch(out, model.config))


def _write(out: Path, state: Mapping[str, np.ndarray]) -> None:
    """All of the file or none of it: written beside its place, then moved there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.stem}.{os.getpid()}{out.suffix}")
    try:
        if out.suffix == ".npz":
            np.savez(part, **state)
        elif out.suffix == ".safetensors":
            save_file(dict(state), part, {"format": "pt"})
        else:
            write_torch(part, state)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


def _in_torch(out: Path, config: RetinaNetConfig) -> str:
    """How to load the file in PyTorch, and which settings torchvision's builder does not have by itself."""
    version, base = ("", torchvision_v1) if config.head.norm.name == "none" else ("_v2", torchvision_v2)
    theirs = base(config.classes)
    theirs = replace(theirs, backbone=replace(theirs.backbone, norm=Norm("batch")))  # which loads frozen ones too
    ours, theirs = ({name: to_json(getattr(c, name)) for name in IN_TORCH} for c in (config, theirs))
    for tree in (ours, theirs):  # what trains, and how it began, does not change what is detected
        del tree["backbone"]["frozen_stages"], tree["head"]["prior"], tree["head"]["he_towers"]
        if tree["backbone"]["norm"]["name"] == "frozen":
            tree["backbone"]["norm"]["name"] = "batch"
    load = f"torch.load({out.name!r})" if out.suffix != ".safetensors" else f"load_file({out.name!r})"
    if out.suffix == ".npz":
        load = f"{{name: torch.from_numpy(array) for name, array in numpy.load({out.name!r}).items()}}"
    lines = [
        f"model = torchvision.models.detection.retinanet_resnet50_fpn{version}(",
        f"    weights=None, weights_backbone=None, num_classes={len(config.classes)})",
        f"model.load_state_dict({load})",
    ]
    if other := differences(theirs, ours):
        lines += ["torchvision's builder does otherwise, so build these yourself:", *(f"  {line}" for line in other)]
    return "\n".join([*lines, f"label k is {json.dumps(list(config.classes), ensure_ascii=False)}[k]"])


def _place(out: str | Path, source: str | Path, suffixes: Sequence[str]) -> Path:
    out, source = Path(out), Path(source)
    if out.suffix not in suffixes:
        raise ValueError(f"{out}: the result is a file ending in {', '.join(suffixes)}")
    if out.exists() and source.exists() and out.samefile(source):
        raise ValueError(f"{out}: would overwrite the file that is converted: choose another name")
    return out
