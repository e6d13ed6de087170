# %% [markdown]
# # 4 · Training a small RetinaNet
#
# The tape can differentiate (chapter 1), convolutions see (chapter 2), and the focal loss knows what to
# do with three thousand anchors of which almost all are background (chapter 3).  Is that enough to
# **find and name objects in pictures never seen before**, on two CPU cores, in three minutes?
#
# **You will see** a detector learn from random weights: the loss fall, boxes tighten, average precision
# rise, and at the end pictures with its detections drawn on them.
#
# | | |
# |---|---|
# | Needs | chapters 1 to 3 |
# | Reads | `minidet/models/retinanet.py`, `minidet/detection/criterion.py`, `minidet/training/loop.py` |
# | Source | Lin et al., *Focal Loss for Dense Object Detection*, arXiv:1708.02002, section 4 |
# | Time | under 3 minutes on two cores, the first time compiling included |

# %%
import os
import shutil
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np

import minidet as md
from minidet.detection import build_targets
from minidet.optim import AdamW
from minidet.plots import contact_sheet, draw_boxes
from minidet.training import SHAPES

started = perf_counter()
out = Path(os.environ.get("MINIDET_CHAPTER_OUT", "runs/chapters")) / "04"
out.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## The data
#
# Eight kinds of shapes, 12 to 64 pixels, at any angle, in any color that differs from what is behind it,
# on textured and noisy backgrounds.  Image number *i* of a split is a function of *i* and the seed:
# nothing is stored, and no validation image is ever trained on.

# %%
train, val = md.shapes("train", images=28_800), md.shapes("val", images=250)
samples = [train[i] for i in range(12)]
truth = [draw_boxes(s.image, s.boxes, s.labels, None, train.classes) for s in samples]
contact_sheet(truth, [s.name for s in samples], out / "data.png", columns=4)
objects = sum(len(val[i].boxes) for i in range(len(val)))
print(f"{len(train):,} training images, {len(val)} for validation with {objects:,} objects")
print(f"classes: {', '.join(train.classes)}")

# %% [markdown]
# ## The network
#
# `small` is RetinaNet with everything narrower: a residual backbone of 16 to 128 channels, a pyramid of
# 64, towers of two convolutions.  On an image of 128 x 128 it has an opinion on 3,069 anchors.

# %%
config = md.presets.small(train.classes)
config = replace(config, loss=replace(config.loss, gamma=1.0))  # why, see "Learning"
model = md.RetinaNet(config, seed=0)
parameters = sum(p.data.size for p in model.parameters())
anchors = model.anchors(128, 128)
print(f"\n{parameters:,} parameters, {len(anchors):,} anchors on the levels {model.maps(128, 128)}")
assert len(anchors) == 9 * (16 * 16 + 8 * 8 + 4 * 4 + 2 * 2 + 1) == 3069

# %% [markdown]
# An anchor is responsible for an object it overlaps with IoU 0.5 or more.  How many are?  Few: this is
# the imbalance that the focal loss is made for.

# %%
targets = build_targets(
    anchors, [s.boxes for s in samples], [s.labels for s in samples], model.config.matcher
)
share = targets.positives.sum() / (len(samples) * len(anchors))
print(f"positive anchors in each of 12 images: {targets.positives.tolist()}, {share:.2%} of all")
assert 0 < share < 0.02

# %% [markdown]
# ## Learning
#
# AdamW, a learning rate that warms up, stays, and falls to zero over the last quarter.  Every image is new.
# Three things differ from the recipe, which is made for trainings five times as long:
#
# - Eight images a step, not twenty-four: so short a training gains more from more steps than it loses to noisier
#   gradients (AP50 .48 against .39 with sixteen, after 8,000 images: `minidet train --data shapes --images 8000`, with
#   `--batch-size 8 --set lr=5.6e-3` and with `--batch-size 16`).
# - A shorter memory for the size of gradients, and a shorter warm-up: a hundred steps are much, here.
# - gamma 1, not 2.  Focusing on hard examples pays once there are easy ones; a network that is still unsure about
#   everything learns faster if it may also become sure.
#
# AP50 after 6,000 images, seed 0: .361 with `minidet train --data shapes --images 6000 --batch-size 8 --set
# lr=5.6e-3`, and .442 with `--set rule.beta2=0.99 --set warmup=300 --set model.loss.gamma=1` added.
#
# How many images?  As many as three minutes allow on this machine: a few steps are timed, after the one that compiles.

# %%
BUDGET = 162  # seconds from the start to the end of the training; evaluation and pictures come on top
recipe = replace(SHAPES, batch_size=8, lr=5.6e-3, rule=AdamW(beta2=0.99), warmup=300, validations=1)


def affordable_images() -> int:
    """How many images fit into what is left of the budget, at the speed of this machine."""
    short, trial, clock = replace(recipe, warmup=None), md.RetinaNet(config, seed=0), perf_counter()
    md.train(trial, train, config=replace(short, images=16), quiet=True)
    print(f"two steps, with whatever had to be compiled: {perf_counter() - clock:.0f} s")
    clock = perf_counter()
    md.train(trial, train, config=replace(short, images=160), quiet=True)
    per_image = (perf_counter() - clock) / 160
    left = BUDGET - (perf_counter() - started)
    return int(min(len(train), max(1600, left / per_image)) // 160 * 160)


shutil.rmtree(out / "run", ignore_errors=True)  # of an earlier run of this chapter
images = int(os.environ.get("MINIDET_CHAPTER_IMAGES", 0)) or affordable_images()
training = md.train(model, train, validate=val, out=out / "run", config=recipe, images=images)

loss = np.array(training.history["loss"])
print(f"\nloss: {loss[:10].mean():.3f} over the first ten steps, {loss[-10:].mean():.3f} over the last")
assert loss[-10:].mean() < loss[:10].mean()

# %% [markdown]
# ## How good is it?
#
# Average precision, as COCO computes it: a detection counts if it has the right class and overlaps the
# object enough, AP50 with IoU 0.5, AP averaged over ten thresholds up to 0.95.

# %%
evaluation = training.evaluation
print()
print(evaluation.table())
if images >= 5_500:
    assert evaluation["AP50"] >= 0.40

# %% [markdown]
# And by eye: what the network says, and dashed in white what is there.

# %%
shown = [val[i] for i in range(12)]
found = md.detect(model, [s.image for s in shown])
drawn = []
for sample, f in zip(shown, found, strict=True):
    sure = f.scores > 0.35  # lower, an undecided network draws one box for each class it considers
    drawn.append(
        draw_boxes(sample.image, f.boxes[sure], f.labels[sure], f.scores[sure], f.classes, truth=sample.boxes)
    )
contact_sheet(drawn, [s.name for s in shown], out / "detections.png", columns=4)
print(f"\n{images:,} images, {perf_counter() - started:.0f} s in all")
print(f"look at {out / 'data.png'}, {out / 'run' / 'curves.png'} and {out / 'detections.png'}")

# %% [markdown]
# ## Three things to remember
#
# 1. A one-stage detector is a convolutional network whose every output cell answers the same questions:
#    which of K classes, and how far to move each of its anchors.
# 2. Almost all answers are "nothing".  The focal loss, divided by the few positive anchors, and the prior
#    in the last bias are what keeps those answers from drowning the rest.
# 3. Nothing here was pretrained.  Eight classes, seen a few thousand times each, are enough for a network of
#    a million parameters to tell them apart.
#
# **Next**: the same code on photographs, with weights that were trained before.
