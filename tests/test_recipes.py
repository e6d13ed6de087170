"""The recipes, field by field: their settings in the words of the systems they come from, beside what those say."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from tiny import NETWORK, coco_folder
from tiny import model as tiny_model

from minidet.cli import main
from minidet.data import Augment, coco, shapes
from minidet.detection import MiningConfig
from minidet.models import RESNET18, RetinaNet, RetinaNetConfig, presets
from minidet.optim import SGD, AdamW
from minidet.training import RECIPES, TrainConfig, read_checkpoint, train
from minidet.training.recipes import BATCH, TORCHVISION_EPOCH, recipe_table
from minidet.training.settings import from_json, to_json

COCO = [f"class {n}" for n in range(80)]
DEPTHS = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101}
FLIPS = {Augment(hflip=0.5): "horizontal", Augment(hflip=0.0): "none"}


def settings(name: str) -> tuple[RetinaNetConfig, TrainConfig]:
    return RECIPES[name].model(COCO), RECIPES[name].training


# --- detectron2 -------------------------------------------------------------------------------------

BASE = {
    # configs/Base-RetinaNet.yaml
    "MODEL.ANCHOR_GENERATOR.SIZES": [[x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in [32, 64, 128, 256, 512]],
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.RETINANET.IOU_THRESHOLDS": [0.4, 0.5],
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": 0.0,
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.BASE_LR": 0.01,
    "SOLVER.STEPS": (60000, 80000),
    "SOLVER.MAX_ITER": 90000,
    "INPUT.MIN_SIZE_TRAIN": (640, 672, 704, 736, 768, 800),
    # detectron2/config/defaults.py
    "MODEL.PIXEL_MEAN": [103.530, 116.280, 123.675],
    "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": "choice",
    "INPUT.MAX_SIZE_TRAIN": 1333,
    "INPUT.MIN_SIZE_TEST": 800,
    "INPUT.MAX_SIZE_TEST": 1333,
    "INPUT.RANDOM_FLIP": "horizontal",
    "INPUT.FORMAT": "BGR",
    "DATALOADER.ASPECT_RATIO_GROUPING": True,
    "MODEL.BACKBONE.FREEZE_AT": 2,
    "MODEL.FPN.OUT_CHANNELS": 256,
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
    "MODEL.ANCHOR_GENERATOR.OFFSET": 0.0,
    "MODEL.RETINANET.NUM_CLASSES": 80,
    "MODEL.RETINANET.IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
    "MODEL.RETINANET.NUM_CONVS": 4,
    "MODEL.RETINANET.PRIOR_PROB": 0.01,
    "MODEL.RETINANET.SCORE_THRESH_TEST": 0.05,
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": 1000,
    "MODEL.RETINANET.NMS_THRESH_TEST": 0.5,
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0),
    "MODEL.RETINANET.FOCAL_LOSS_GAMMA": 2.0,
    "MODEL.RETINANET.FOCAL_LOSS_ALPHA": 0.25,
    "MODEL.RETINANET.NORM": "",
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.NUM_GROUPS": 1,
    "MODEL.RESNETS.NORM": "FrozenBN",
    "MODEL.RESNETS.WIDTH_PER_GROUP": 64,
    "MODEL.RESNETS.STRIDE_IN_1X1": True,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 64,
    "SOLVER.MOMENTUM": 0.9,
    "SOLVER.NESTEROV": False,
    "SOLVER.WEIGHT_DECAY": 0.0001,
    "SOLVER.WEIGHT_DECAY_NORM": 0.0,
    "SOLVER.GAMMA": 0.1,
    "SOLVER.WARMUP_FACTOR": 1.0 / 1000,
    "SOLVER.WARMUP_ITERS": 1000,
    "SOLVER.CLIP_GRADIENTS.ENABLED": False,
    "TEST.DETECTIONS_PER_IMAGE": 100,
}
LONG = {"SOLVER.STEPS": (210000, 250000), "SOLVER.MAX_ITER": 270000}  # retinanet_R_50_FPN_3x.yaml, _R_101_
DETECTRON2 = {
    "detectron2_r50_1x": BASE,
    "detectron2_r50_3x": BASE | LONG,
    "detectron2_r101_3x": BASE | LONG | {"MODEL.RESNETS.DEPTH": 101},
    "detectron2_x101_3x": BASE | LONG | {  # configs/COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml
        "MODEL.PIXEL_STD": [57.375, 57.120, 58.395],
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.RESNETS.NUM_GROUPS": 32,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
        "MODEL.RESNETS.DEPTH": 101,
    },
}  # fmt: skip


def in_detectron2s_words(model: RetinaNetConfig, t: TrainConfig) -> dict:
    b, a, p, post, rule = model.backbone, model.anchors, model.preprocess, model.postprocess, t.rule
    steps = t.schedule()
    assert (model.loss.box, model.loss.normaliser, p.method, p.scale) == ("l1", "moving", "pil", 1.0)
    assert (model.matcher.low_quality, post.clip, post.drop_empty) == (True, "after_nms", True)
    assert isinstance(rule, SGD) and not t.cosine and t.cooldown == 0 and model.pyramid.extra_from_backbone
    return {
        "MODEL.ANCHOR_GENERATOR.SIZES": [list(sizes) for sizes in a.sizes],
        "MODEL.FPN.IN_FEATURES": [f"res{n}" for n in range(3, 2 + len(b.widths))],
        "MODEL.RETINANET.IOU_THRESHOLDS": [model.matcher.low, model.matcher.high],
        "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": 0.0 if model.loss.box == "l1" else model.loss.beta,
        "SOLVER.IMS_PER_BATCH": t.batch_size,
        "SOLVER.BASE_LR": steps.peak,
        "SOLVER.STEPS": tuple(m / t.batch_size for m in t.milestones),
        "SOLVER.MAX_ITER": t.images / t.batch_size,
        "INPUT.MIN_SIZE_TRAIN": t.min_sizes,
        "MODEL.PIXEL_MEAN": list(p.mean),
        "MODEL.PIXEL_STD": list(p.std),
        "INPUT.MIN_SIZE_TRAIN_SAMPLING": "choice",  # tests/test_grouping.py
        "INPUT.MAX_SIZE_TRAIN": p.max_size,
        "INPUT.MIN_SIZE_TEST": p.min_size,
        "INPUT.MAX_SIZE_TEST": p.max_size,
        "INPUT.RANDOM_FLIP": FLIPS[t.augment],
        "INPUT.FORMAT": "BGR" if p.bgr else "RGB",
        "DATALOADER.ASPECT_RATIO_GROUPING": t.aspect_factor == 0,
        "MODEL.BACKBONE.FREEZE_AT": b.frozen_stages,
        "MODEL.FPN.OUT_CHANNELS": model.pyramid.channels,
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [list(a.ratios)],
        "MODEL.ANCHOR_GENERATOR.OFFSET": a.offset,
        "MODEL.RETINANET.NUM_CLASSES": len(model.classes),
        "MODEL.RETINANET.IN_FEATURES": [f"p{n}" for n in range(3, 3 + model.pyramid.levels)],
        "MODEL.RETINANET.NUM_CONVS": model.head.depth,
        "MODEL.RETINANET.PRIOR_PROB": model.head.prior,
        "MODEL.RETINANET.SCORE_THRESH_TEST": post.score_threshold,
        "MODEL.RETINANET.TOPK_CANDIDATES_TEST": post.top_k,
        "MODEL.RETINANET.NMS_THRESH_TEST": post.nms_threshold,
        "MODEL.RETINANET.BBOX_REG_WEIGHTS": model.coder.weights,
        "MODEL.RETINANET.FOCAL_LOSS_GAMMA": model.loss.gamma,
        "MODEL.RETINANET.FOCAL_LOSS_ALPHA": model.loss.alpha,
        "MODEL.RETINANET.NORM": {"none": "", "group": "GN"}[model.head.norm.name],
        "MODEL.RESNETS.DEPTH": DEPTHS[b.blocks],
        "MODEL.RESNETS.NUM_GROUPS": b.groups,
        "MODEL.RESNETS.NORM": {"frozen": "FrozenBN", "batch": "BN"}[b.norm.name],
        "MODEL.RESNETS.WIDTH_PER_GROUP": b.group_width,
        "MODEL.RESNETS.STRIDE_IN_1X1": b.stride_in_1x1,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 4 * b.widths[0],
        "MODEL.RESNETS.STEM_OUT_CHANNELS": b.stem,
        "SOLVER.MOMENTUM": rule.momentum,
        "SOLVER.NESTEROV": rule.nesterov,
        "SOLVER.WEIGHT_DECAY": t.weight_decay,
        "SOLVER.WEIGHT_DECAY_NORM": t.norm_weight_decay,
        "SOLVER.GAMMA": steps.factor,
        "SOLVER.WARMUP_FACTOR": steps.warmup_start,
        "SOLVER.WARMUP_ITERS": steps.warmup / t.batch_size,
        "SOLVER.CLIP_GRADIENTS.ENABLED": t.clip is not None,
        "TEST.DETECTIONS_PER_IMAGE": post.max_detections,
    }


@pytest.mark.parametrize("name", DETECTRON2)
def test_detectron2(name):
    assert in_detectron2s_words(*settings(name)) == DETECTRON2[name]


@pytest.mark.parametrize("name", DETECTRON2)
def test_the_rate_is_detectron2s_at_every_iteration(name):
    """detectron2/solver/lr_scheduler.py: a linear warm-up, times gamma for every step passed."""
    d2, schedule = DETECTRON2[name], RECIPES[name].training.schedule()
    steps, last, n = d2["SOLVER.STEPS"], d2["SOLVER.MAX_ITER"] - 1, d2["SOLVER.WARMUP_ITERS"]
    for i in (0, 1, 500, n - 1, n, steps[0] - 1, steps[0], steps[1] - 1, steps[1], last):
        alpha = min(i / n, 1)
        warm = d2["SOLVER.WARMUP_FACTOR"] * (1 - alpha) + alpha
        rate = d2["SOLVER.BASE_LR"] * warm * d2["SOLVER.GAMMA"] ** sum(i >= step for step in steps)
        assert schedule.lr(i * d2["SOLVER.IMS_PER_BATCH"]) == pytest.approx(rate, rel=1e-12)


# --- torchvision ------------------------------------------------------------------------------------

V1 = {
    # references/detection/README.md, "RetinaNet": 8 GPUs
    "--epochs": 26,
    "--lr-steps": [16, 22],
    "--aspect-ratio-group-factor": 3,
    "--lr": 0.01,
    # references/detection/train.py: defaults
    "--batch-size": 2 * 8,
    "--opt": "sgd",
    "--momentum": 0.9,
    "--weight-decay": 1e-4,
    "--norm-weight-decay": None,
    "--lr-gamma": 0.1,
    "--data-augmentation": "hflip",
    "warmup_factor": 1.0 / 1000,
    "warmup_iters": 1000,
    # torchvision/models/detection/retinanet.py: RetinaNet.__init__, retinanet_resnet50_fpn
    "min_size": 800,
    "max_size": 1333,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "score_thresh": 0.05,
    "nms_thresh": 0.5,
    "detections_per_img": 300,
    "fg_iou_thresh": 0.5,
    "bg_iou_thresh": 0.4,
    "allow_low_quality_matches": True,
    "topk_candidates": 1000,
    "anchor_sizes": ((32, 40, 50), (64, 80, 101), (128, 161, 203), (256, 322, 406), (512, 645, 812)),
    "aspect_ratios": (0.5, 1.0, 2.0),
    "trainable_backbone_layers": 3,
    "norm_layer": "FrozenBatchNorm2d",
    "norm_layer.eps": 1e-5,  # torchvision/ops/misc.py; overwrite_eps is for published weights only
    "LastLevelP6P7": (256, 256),
    "box_coder.weights": (1.0, 1.0, 1.0, 1.0),
    "head.num_convs": 4,
    "head.norm_layer": None,
    "head.prior_probability": 0.01,
    "sigmoid_focal_loss": (0.25, 2),
    "regression_head._loss_type": "l1",
}
V2 = V1 | {
    # github.com/pytorch/vision/pull/5756
    "--opt": "adamw",
    "--lr": 0.0001,
    "--weight-decay": 0.05,
    "--norm-weight-decay": 0.0,
    "--data-augmentation": "multiscale",
    # torch.optim.AdamW
    "--momentum": (0.9, 0.999, 1e-8),
    # retinanet_resnet50_fpn_v2
    "norm_layer": "BatchNorm2d",
    "LastLevelP6P7": (2048, 256),
    "head.norm_layer": "GroupNorm(32)",
    "regression_head._loss_type": "giou",
}
MULTISCALE = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)  # references/detection/presets.py


def in_torchvisions_words(model: RetinaNetConfig, t: TrainConfig) -> dict:
    b, p, post, rule, schedule = model.backbone, model.preprocess, model.postprocess, t.rule, t.schedule()
    adamw = isinstance(rule, AdamW)
    assert model.loss.normaliser == "image" and model.anchors.rounded and p.method == "float" and not p.bgr
    assert FLIPS[t.augment] == "horizontal" and t.clip is None and not t.cosine and t.cooldown == 0
    return {
        "--epochs": t.images / TORCHVISION_EPOCH,
        "--lr-steps": [m / TORCHVISION_EPOCH for m in t.milestones],
        "--aspect-ratio-group-factor": t.aspect_factor,
        "--lr": schedule.peak,
        "--batch-size": t.batch_size,
        "--opt": "adamw" if adamw else "sgd",
        "--momentum": (rule.beta1, rule.beta2, rule.eps) if adamw else rule.momentum,
        "--weight-decay": t.weight_decay,
        "--norm-weight-decay": t.norm_weight_decay,
        "--lr-gamma": schedule.factor,
        "--data-augmentation": {(): "hflip", MULTISCALE: "multiscale"}[t.min_sizes],
        "warmup_factor": schedule.warmup_start,
        "warmup_iters": schedule.warmup / t.batch_size,
        "min_size": p.min_size,
        "max_size": p.max_size,
        "image_mean": list(p.mean),
        "image_std": list(p.std),
        "score_thresh": post.score_threshold,
        "nms_thresh": post.nms_threshold,
        "detections_per_img": post.max_detections,
        "fg_iou_thresh": model.matcher.high,
        "bg_iou_thresh": model.matcher.low,
        "allow_low_quality_matches": model.matcher.low_quality,
        "topk_candidates": post.top_k,
        "anchor_sizes": model.anchors.sizes,
        "aspect_ratios": model.anchors.ratios,
        "trainable_backbone_layers": 1 + len(b.widths) - b.frozen_stages,
        "norm_layer": {"frozen": "FrozenBatchNorm2d", "batch": "BatchNorm2d"}[b.norm.name],
        "norm_layer.eps": b.norm.eps,
        "LastLevelP6P7": (4 * b.widths[-1] if model.pyramid.extra_from_backbone else 256, model.pyramid.channels),
        "box_coder.weights": model.coder.weights,
        "head.num_convs": model.head.depth,
        "head.norm_layer": {"none": None, "group": f"GroupNorm({model.head.norm.groups})"}[model.head.norm.name],
        "head.prior_probability": model.head.prior,
        "sigmoid_focal_loss": (model.loss.alpha, model.loss.gamma),
        "regression_head._loss_type": model.loss.box,
    }


@pytest.mark.parametrize(("name", "expected"), [("torchvision_v1", V1), ("torchvision_v2", V2)])
def test_torchvision(name, expected):
    assert in_torchvisions_words(*settings(name)) == expected


# --- the paper --------------------------------------------------------------------------------------

PAPER = {  # arXiv:1708.02002, section 4.1 "Optimization" and "Inference", section 4 "Anchors", table 1's caption
    "iterations": 90_000, "images a batch": 16, "lr": 0.01, "divided by 10 at": (60_000, 80_000), "momentum": 0.9,
    "weight decay": 0.0001, "flip": "horizontal", "px": 600, "depth": 50, "groups x width": (1, 64), "gamma": 2.0,
    "alpha": 0.25, "prior": 0.01, "anchors": (9, 32, 813), "IoU": (0.4, 0.5), "score": 0.05, "top": 1000, "NMS": 0.5,
    "mining": None, "jitter": (),
}  # fmt: skip
LARGE, R101 = {"px": 800}, {"depth": 101}
JITTER = {"iterations": 135_000, "divided by 10 at": (90_000, 120_000), "jitter": (640, 800)}  # table 2: 1.5 times
X101, X101_64 = {"groups x width": (32, 8)}, {"groups x width": (64, 4)}
ROWS = {
    "paper_r50_600": {},
    "paper_r50_600_ce": {"alpha": 0.75, "gamma": 0.0},  # the best of table 1a
    "paper_r101_600": R101,
    "paper_r101_600_ohem": R101 | {"alpha": None, "gamma": 0.0, "mining": (128, 0.5, None)},  # of table 1d
    "paper_r101_600_ohem_1_3": R101 | {"alpha": None, "gamma": 0.0, "mining": (128, 0.5, 3)},
    "paper_r50_800": LARGE,
    "paper_r101_800": LARGE | R101,
    "paper_r101_800_long": LARGE | R101 | JITTER,
    "paper_x101_800_long": LARGE | R101 | JITTER | X101,
    "detectron_x101_64x4d": LARGE | R101 | X101_64,  # Detectron, retinanet_X-101-64x4d-FPN_1x.yaml
}


@pytest.mark.parametrize("name", ROWS)
def test_the_paper(name):
    model, t = settings(name)
    b, m, sizes = model.backbone, model.loss.mining, [x for level in model.anchors.sizes for x in level]
    schedule = t.schedule()
    assert PAPER | ROWS[name] == {
        "iterations": t.images / t.batch_size, "images a batch": t.batch_size, "lr": schedule.peak,
        "divided by 10 at": tuple(m / t.batch_size for m in t.milestones), "momentum": t.rule.momentum,
        "weight decay": t.weight_decay, "flip": FLIPS[t.augment], "px": model.preprocess.min_size,
        "depth": DEPTHS[b.blocks], "groups x width": (b.groups, b.group_width), "gamma": model.loss.gamma,
        "alpha": model.loss.alpha, "prior": model.head.prior, "anchors": (9, min(sizes), int(np.round(max(sizes)))),
        "IoU": (model.matcher.low, model.matcher.high), "score": model.postprocess.score_threshold,
        "top": model.postprocess.top_k, "NMS": model.postprocess.nms_threshold,
        "mining": m and (m.batch, m.nms, m.ratio), "jitter": t.min_sizes and (min(t.min_sizes), max(t.min_sizes)),
    }  # fmt: skip
    assert model.anchors.per_cell == 9 and schedule.factor == 0.1 and t.clip is None and t.cooldown == 0
    assert b.stride_in_1x1 == (b.groups == 1) and b.frozen_stages == 2  # Detectron: FREEZE_AT 2, STRIDE_1X1
    assert model.preprocess.mean == (102.9801, 115.9465, 122.7717)  # Detectron: PIXEL_MEANS
    assert (schedule.warmup / t.batch_size, schedule.warmup_start) == (500, 1 / 3)  # Detectron: lib/core/config.py


# --- all of them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_stored_and_has_been_compared(name):
    model, training = settings(name)
    assert from_json(RetinaNetConfig, json.loads(json.dumps(to_json(model)))) == model
    assert from_json(TrainConfig, json.loads(json.dumps(to_json(training)))) == training
    assert name in DETECTRON2 or name in ROWS or name.startswith("torchvision_v")
    assert training.batch_size == BATCH
    # The named weights can be used: MSRA's and FAIR's expect bytes in BGR, and MSRA's the stride in the 1x1.
    caffe, pixels, backbone = "torchvision" not in RECIPES[name].initial, model.preprocess, model.backbone
    assert (pixels.bgr, pixels.scale == 1) == (caffe, caffe)
    assert backbone.stride_in_1x1 == ("MSRA" in RECIPES[name].initial)
    assert (pixels.std == (1.0, 1.0, 1.0)) == ("MSRA" in RECIPES[name].initial)


@pytest.mark.parametrize("name", RECIPES)
def test_what_the_systems_do_without_a_setting(name):
    """What their files do not name as an option, or the tables above leave to the code."""
    model, t = settings(name)
    paper, giou = name in ROWS, name == "torchvision_v2"
    # torchvision/models/detection/_utils.py and detectron2/modeling/box_regression.py; Detectron: BBOX_XFORM_CLIP
    assert model.coder.clip == math.log(1000 / 16) and model.coder.weights == (1.0, 1.0, 1.0, 1.0)
    # GeneralizedRCNNTransform(size_divisible=32); detectron2: FPN's size_divisibility; Detectron: FPN.COARSEST_STRIDE
    assert model.preprocess.pad_multiple == 32 and model.anchors.ratios == (0.5, 1.0, 2.0)
    # detectron2 computes anchors from strides, torchvision from the sizes of batch and maps
    assert model.anchors.strides == (None if name.startswith("torchvision") else (8, 16, 32, 64, 128))
    # torchvision/ops/misc.py, detectron2/layers/batch_norm.py, Detectron's affine channels of pretrained weights
    assert model.backbone.norm.eps == 1e-5 and model.backbone.norm.momentum == 0.1
    # loss = classification + regression, without weights; Detectron: RETINANET.BBOX_REG_WEIGHT 1.0, BBOX_REG_BETA 0.11
    assert model.loss.box_weight == 1.0 and model.loss.beta == pytest.approx(0.11, abs=2e-3)
    assert model.loss.box == ("smooth_l1" if paper else "giou" if giou else "l1")
    # det_utils.Matcher and detectron2's take a best anchor of IoU 0 too; the paper has no low-quality matches
    assert (model.matcher.low_quality, model.matcher.zero_iou) == ((False, False) if paper else (True, True))
    # Detectron: TRAIN.SCALES (600,), MAX_SIZE 1000; retinanet_*.yaml: 800, 1333
    assert model.preprocess.max_size == (1000 if model.preprocess.min_size == 600 else 1333)
    assert model.postprocess.max_detections == (300 if name.startswith("torchvision") else 100)
    assert model.pyramid.extra_from_backbone == (name != "torchvision_v1")
    assert model.head.norm.name == ("group" if giou else "none") and not model.head.he_towers
    # One rate for all parameters (detectron2: BIAS_LR_FACTOR 1.0), whole batches, float32 (AMP.ENABLED False), no EMA
    assert (t.backbone_lr_scale, t.accumulate, t.precision, t.ema) == (1.0, 1, "float32", None)
    # WEIGHT_DECAY_NORM 0.0; Detectron and torchvision's v1 decay what is not frozen, where no norm is left
    assert t.norm_weight_decay == (None if paper or name == "torchvision_v1" else 0.0)
    assert t.augment == Augment(hflip=0.5, vflip=0.0, transpose=False)


def test_the_table_has_a_line_for_each():
    lines = recipe_table().splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(RECIPES)
    assert lines[1].split() == ["paper_r50_600", "90,000", "1,440,000", "0.01", "600", "34.0", "minival"]
    assert "190,558  3,048,916  0.0001  480-800" in lines[-1]


def test_a_backbone_is_exchanged_and_conventions_stay():
    config = presets.with_backbone(presets.torchvision_v2(COCO), replace(RESNET18, frozen_stages=1))
    assert config.backbone == replace(RESNET18, norm=presets.torchvision_v2(COCO).backbone.norm)
    assert config.preprocess == presets.torchvision_v2(COCO).preprocess


def test_a_recipe_trains_from_the_command_line(tmp_path, capsys):
    """Stretched to four images, on the smallest network; and goes on with the same name."""
    folder, out = coco_folder(tmp_path / "data", train=4, val=1), tmp_path / "run"
    arguments = ["train", "--data", str(folder), "--recipe", "detectron2_r50_1x", "--out", str(out), "--quiet"]
    small = ["--set", "min_sizes=[32, 64]", "--set", "batch_size=2", "--set", "model.preprocess.min_size=64"]
    command = [*arguments, *NETWORK, *small, "--images", "4"]
    assert main(command) == 0
    told = capsys.readouterr()
    assert "starts from ImageNetPretrained/MSRA/R-50.pkl of detectron2 (--init FILE), this training from" in told.err
    saved = read_checkpoint(out).training["config"]
    assert (saved["milestones"], saved["warmup"], saved["min_sizes"]) == ([3, 4], 0, [32, 64])
    assert (saved["rule"]["class"], saved["aspect_factor"]) == ("SGD", 0)
    assert main([*command, "--resume"]) == 0
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--preset", "small"])
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize("mining", [None, MiningConfig(16, 0.5), MiningConfig(16, 0.5, ratio=3)])
def test_every_loss_of_the_paper_trains(mining, tmp_path):
    """Cross-entropy, OHEM and OHEM 1:3, each a few steps on the smallest network: the loss falls."""
    config = tiny_model().config
    model = RetinaNet(replace(config, loss=replace(config.loss, alpha=None, gamma=0.0, mining=mining)))
    data = coco(coco_folder(tmp_path, train=4, val=1), "train")
    recipe = TrainConfig(images=80, batch_size=4, lr=4e-2, warmup=0, validations=0, checkpoints=0, samples=0)
    losses = train(model, data, config=recipe, quiet=True).history["classification"]
    assert np.mean(losses[-4:]) < 0.85 * np.mean(losses[:2])


def test_fewer_images_shrink_the_schedule():
    """`train(..., images=N)` too: the warm-up alone would be longer than this training."""
    recipe = replace(RECIPES["detectron2_r50_1x"].training, batch_size=2, min_sizes=(), samples=0)
    done = train(tiny_model(), shapes("train", images=4, size=64), images=6, config=recipe, quiet=True)
    assert done.history["lr"] == pytest.approx([0.00125, 0.00125, 0.000125])
