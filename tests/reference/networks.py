"""The reference systems' networks and what they did, as ours: configurations, weights, one pass, one loss."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from compare import here, there
from layers import in_float64, nchw
from refgen import make_weights

from minidet.autograd import Tensor
from minidet.detection import (
    Detections,
    LossConfig,
    Losses,
    Targets,
    build_targets,
    image_weights,
    loss,
    postprocess,
)
from minidet.images import pad_batch
from minidet.models import RetinaNet, RetinaNetConfig, presets
from minidet.nn import Norm
from minidet.weights import from_detectron2, from_torchvision

KEYS = Path(__file__).parent / "vectors"
TINY_GROUPS = 4  # of the group norm in tiny heads, which no shape tells


def tiny_config(meta: dict, shapes: Mapping[str, tuple[int, ...]]) -> RetinaNetConfig:
    """The small RetinaNet whose torchvision state dict has these shapes; everything in it trains."""
    model = meta["model"].partition(":")[2]
    preset = presets.torchvision_v2 if model.startswith("v2") else presets.torchvision_v1
    config = preset([str(i) for i in range(meta["num_classes"])])
    body = {n.removeprefix("backbone.body."): s for n, s in shapes.items() if n.startswith("backbone.body.")}
    stages = sorted({n.partition(".")[0] for n in body if n.startswith("layer")})
    towers = {n.split(".")[3] for n in shapes if n.startswith("head.classification_head.conv.")}
    backbone = replace(
        config.backbone,
        stem=body["conv1.weight"][0],
        widths=tuple(body[f"{stage}.0.conv1.weight"][0] for stage in stages),
        blocks=tuple(len({n.split(".")[1] for n in body if n.startswith(f"{stage}.")}) for stage in stages),
        norm=Norm("frozen" if model == "v1" else "batch"),
        frozen_stages=0,
    )
    head = replace(config.head, depth=len(towers), norm=replace(config.head.norm, groups=TINY_GROUPS))
    channels = shapes["backbone.fpn.layer_blocks.0.0.weight"][0]
    config = replace(config, backbone=backbone, head=head, pyramid=replace(config.pyramid, channels=channels))
    return with_settings(config, meta)


def whole_model(meta: dict) -> tuple[RetinaNetConfig, dict[str, np.ndarray]]:
    """The configuration of a ResNet-50 model, and its weights under our names."""
    if meta["kind"].startswith("detectron2"):
        config = presets.detectron2([str(i) for i in range(80)])
        # The vectors' images keep their size, and boxes are clipped by the test, at the size asked for.
        config = replace(
            config,
            preprocess=replace(config.preprocess, min_size=0, max_size=0),
            postprocess=replace(config.postprocess, clip="never", drop_empty=False),
        )
        shapes = _keys("detectron2_retinanet_R_50_FPN")["keys"]
        return config, from_detectron2(make_weights(shapes, meta["seed"], meta.get("gain")))
    name = "retinanet_resnet50_fpn" + ("_v2" if meta["model"] == "v2" else "")
    keys = _keys(name)
    shapes = dict(keys["current"])
    config = getattr(presets, f"torchvision_{meta['model'][:2]}")([str(i) for i in range(meta["num_classes"])])
    norm = config.backbone.norm
    if meta["model"] == "v1_frozen":
        norm = Norm("frozen", eps=meta["eps"])
    elif meta["model"] == "v1_batchnorm":
        norm = Norm("batch")
        shapes |= dict.fromkeys(keys["extra_keys_with_batchnorm2d"], ())
    elif meta["model"] != "v2":
        raise NotImplementedError(f"no configuration for {meta['model']!r}")
    config = replace(config, backbone=replace(config.backbone, norm=norm, frozen_stages=0))
    return with_settings(config, meta), from_torchvision(make_weights(shapes, meta["seed"], meta.get("gain")))


def with_settings(config: RetinaNetConfig, meta: dict) -> RetinaNetConfig:
    """Sizes and thresholds that a file gives; the preset has the system's defaults."""

    def given(**names: str) -> dict:
        return {field: meta[name] for field, name in names.items() if name in meta}

    postprocess = given(
        score_threshold="score_thresh",
        top_k="topk_candidates",
        nms_threshold="nms_thresh",
        max_detections="detections_per_img",
    )
    return replace(
        config,
        preprocess=replace(config.preprocess, **given(min_size="min_size", max_size="max_size")),
        postprocess=replace(config.postprocess, **postprocess),
    )


def _keys(name: str) -> dict:
    return json.loads((KEYS / f"keys_{name}.json").read_text())


def build(config: RetinaNetConfig, state: Mapping[str, np.ndarray], dtype) -> RetinaNet:
    """A network with these weights, in this precision throughout."""
    model = RetinaNet(config)
    model.load_state_dict(state)
    if dtype == np.float64:
        in_float64(model)
    return model


@dataclass(frozen=True)
class Inputs:
    """A file's images, prepared and padded, and its objects."""

    images: np.ndarray
    sizes: np.ndarray
    originals: list[tuple[int, int]]
    boxes: list[np.ndarray]
    labels: list[np.ndarray]


def prepare(model: RetinaNet, a: Mapping[str, np.ndarray], dtype) -> Inputs:
    rule = model.config.preprocess
    raw = [a[f"image{i}"] for i in range(len([n for n in a if n.startswith("image") and n[5:].isdigit()]))]
    images, sizes = pad_batch([rule.prepare(image, dtype) for image in raw], rule.pad_multiple)
    originals = [image.shape[:2] for image in raw]
    boxes = [
        rule.boxes(a[f"gt_boxes{i}"].astype(dtype), originals[i], tuple(sizes[i])) for i in range(len(raw))
    ]
    return Inputs(images, sizes, originals, boxes, [a[f"gt_labels{i}"] for i in range(len(raw))])


def forward(model: RetinaNet, images: np.ndarray) -> dict[str, np.ndarray]:
    """Every map of one pass and both outputs, channels second, under torchvision's names."""
    x = Tensor(there(images))
    backbone = model.backbone(x)
    pyramid = model.pyramid(backbone)
    logits, deltas = model(x)
    maps = {f"c{i}": level.data for i, level in enumerate(backbone, 3)}
    maps |= {f"p{i}": level.data for i, level in enumerate(pyramid, 3)}
    maps = {name: nchw(array) for name, array in ({"batch": images} | maps).items()}
    return maps | {
        "cls_logits": here(logits.data),
        "bbox_regression": here(deltas.data),
        "anchors": model.anchors(*images.shape[1:3]),
    }


def detect(model: RetinaNet, inputs: Inputs, maps: Mapping[str, np.ndarray]) -> list[Detections]:
    """What the outputs of `forward` mean, in pixels of the network's input."""
    config, (H, W) = model.config, inputs.images.shape[1:3]
    dtype = inputs.images.dtype
    return postprocess(
        there(maps["cls_logits"]),
        there(maps["bbox_regression"]),
        there(maps["anchors"].astype(dtype)),
        model.level_counts(H, W),
        [tuple(size) for size in inputs.sizes.tolist()],
        config.postprocess,
        config.coder,
    )


def detect_in_originals(model: RetinaNet, inputs: Inputs, maps: Mapping[str, np.ndarray]) -> list[tuple]:
    """(boxes, scores, labels) of each image in its own pixels."""
    found = detect(model, inputs, maps)
    back = model.config.preprocess.boxes_back
    return [
        (back(one.boxes, tuple(size), original), one.scores, one.labels)
        for one, size, original in zip(found, inputs.sizes, inputs.originals, strict=True)
    ]


def targets_of(model: RetinaNet, inputs: Inputs) -> Targets:
    """The matching, decided in the precision of the images, as the reference does."""
    anchors = model.anchors(*inputs.images.shape[1:3]).astype(inputs.images.dtype)
    return build_targets(there(anchors), inputs.boxes, inputs.labels, model.config.matcher)


def losses_of(
    model: RetinaNet, logits: Tensor, deltas: Tensor, targets: Targets, moving: float | None = None
) -> tuple[Losses, float]:
    """Both losses, and the moving average of the positives after them."""
    config: LossConfig = model.config.loss
    start = {} if moving is None else {"moving": moving}
    weights, moving = image_weights(config, targets.positives, **start)
    return loss(logits, deltas, targets, weights, config, model.config.coder), moving
