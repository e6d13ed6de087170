"""Whole ResNet-50 RetinaNets in files as they are published, converted without torch: the recorded detections."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from compare import load
from networks import KEYS, prepare, whole_model
from refgen import make_weights
from test_resnet50 import TOLERANCES, inference
from weight_files import in_every_container

import minidet as md
from minidet.models import presets
from minidet.training import read_checkpoint
from minidet.weights import BY_NUMBER, read_arrays

PREFIX = ("v1_published", "v2_infer", "d2_infer")
PUBLISHED = {
    "v1_frozen": ("retinanet_resnet50_fpn", "legacy", presets.torchvision_v1),
    "v2": ("retinanet_resnet50_fpn_v2", "current", presets.torchvision_v2),
    "d2": ("detectron2_retinanet_R_50_FPN", "keys", presets.detectron2),
}

pytestmark = pytest.mark.slow


def test_detections(vectors: Path, tmp_path):
    meta, a = load(vectors)
    config, wanted = whole_model(meta)
    name, table, preset = PUBLISHED["d2" if meta["kind"].startswith("detectron2") else meta["model"]]
    out = tmp_path / "converted.safetensors"
    for path in files(published(name, table, meta), tmp_path):
        done = md.convert(path, out)
        assert done.config == preset(BY_NUMBER[len(config.classes)]), path
        weights = read_checkpoint(out).weights
        for tensor, array in wanted.items():
            np.testing.assert_array_equal(weights[tensor], array, err_msg=f"{path}: {tensor}")
        path.unlink()
    model = md.load_model(out).eval()
    model.config = replace(model.config, preprocess=config.preprocess, postprocess=config.postprocess)
    inference(model, prepare(model, a, np.float32), meta, a, TOLERANCES[np.float32])
    theirs, back = tmp_path / "theirs.pth", tmp_path / "back.safetensors"
    md.export(out, theirs)
    md.convert(theirs, back, preset=preset.__name__, classes=model.config.classes)
    back = read_checkpoint(back).weights
    assert back.keys() == weights.keys() and all(np.array_equal(back[n], weights[n]) for n in weights)


def published(name: str, table: str, meta: dict) -> dict[str, np.ndarray]:
    """The weights under the names of the published file: values belong to the current names, whatever it says."""
    keys = json.loads((KEYS / f"keys_{name}.json").read_text())
    current = keys.get("current", keys.get("keys"))
    state = make_weights(current, meta["seed"], meta.get("gain"))
    if table != "legacy":
        return state
    return {legacy: state[now] for legacy, now in keys["legacy_to_current"].items()}


def files(state: dict[str, np.ndarray], folder: Path):
    """One file of each kind after the other: by hand, and by torch where it is installed."""
    for kind in in_every_container({"x": np.zeros(1, np.float32)}):
        (folder / kind).write_bytes(in_every_container(state)[kind])
        yield folder / kind
    try:
        import torch
    except ImportError:
        return
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    for zipped in (True, False):
        path = folder / f"torch_{zipped}.pth"
        torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
        assert read_arrays(path).keys() == state.keys()
        yield path
