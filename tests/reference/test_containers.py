"""Small RetinaNets of torchvision's through a file of every kind: what comes out detects what was recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from compare import load, unmatched
from networks import detect_in_originals, forward, prepare, tiny_config
from weight_files import in_every_container

import minidet as md

PREFIX = ("tiny_",)


@pytest.mark.parametrize("kind", in_every_container({"x": np.zeros(1, np.float32)}))
def test_detections(vectors: Path, kind, tmp_path):
    meta, a = load(vectors)
    state = {name.removeprefix("param:"): array for name, array in a.items() if name.startswith("param:")}
    (tmp_path / kind).write_bytes(in_every_container(state)[kind])
    config = tiny_config(meta, {name: array.shape for name, array in state.items()})
    settings = {f"preprocess.{side}": meta[side] for side in ("min_size", "max_size")} | {
        "backbone.norm.eps": config.backbone.norm.eps,
        "backbone.frozen_stages": 0,
        "head.norm.groups": config.head.norm.groups,
    }
    settings = [f"model.{name}={value}" for name, value in settings.items()]
    out = tmp_path / "converted.safetensors"
    done = md.convert(tmp_path / kind, out, classes=config.classes, settings=settings)
    assert done.config == config
    model = md.load_model(out).eval()
    inputs = prepare(model, a, np.float32)
    for n, got in enumerate(detect_in_originals(model, inputs, forward(model, inputs.images))):
        want = [a[f"det_{n}.{part}"] for part in ("boxes", "scores", "labels")]
        assert len(got[1]) == len(want[1]) > 0
        assert not unmatched(got, want, boxes=1e-3, scores=1e-5)
