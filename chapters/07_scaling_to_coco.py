# %% [markdown]
# # 7 · Scaling to COCO
#
# Chapter 4 learned from pictures of 128 pixels in three minutes.  COCO has 118,287 photos of every shape, and the
# paper shows its network 1.44 million of them.  **What has to be right before the first of ninety thousand
# steps, and what will they cost?**
#
# **You will see** what a recipe says and that it means the same on any number of machines; how much of a batch is
# padding, and how to avoid it without opening an image; one photo at many scales; weights that are averaged; and
# the bill, on one CPU, one GPU and eight.
#
# | | |
# |---|---|
# | Needs | chapters 3 and 4; for the real thing COCO in a folder (`minidet download coco`), and `--data FOLDER` |
# | Reads | `minidet/training/recipes.py`, `minidet/data/grouping.py`, `minidet/training/average.py` |
# | Source | Lin et al., arXiv:1708.02002, section 4.1; Goyal et al., arXiv:1706.02677, section 2 |
# | Time | about 60 s on two cores |

# %%
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np

import minidet as md
from minidet import Tensor
from minidet.data import Augment, Loader, coco, write_coco
from minidet.data.grouping import aspect_groups, grouped_order
from minidet.nn import Module
from minidet.optim import SGD, AdamW, Optimizer, ParameterGroup
from minidet.plots import lines
from minidet.training import RECIPES, read_checkpoint
from minidet.training.average import WeightAverage
from minidet.training.recipes import TORCHVISION_EPOCH, recipe_table
from minidet.training.step import batch_gradient

rng = np.random.default_rng(7)
out = Path(os.environ.get("MINIDET_CHAPTER_OUT", "runs/chapters")) / "07"
out.mkdir(parents=True, exist_ok=True)
folder = sys.argv[2] if sys.argv[1:2] == ["--data"] else None   # of COCO; else a small one is made

# %% [markdown]
# ## Recipes
#
# A recipe is a network and a training whose result somebody has published.  A test holds each of its numbers to
# the file it comes from (`tests/test_recipes.py`).

# %%
print(recipe_table())
recipe = RECIPES["detectron2_r50_1x"].training
epochs = recipe.images / TORCHVISION_EPOCH  # of the photos that have an object
print(f"\n1x: {recipe.images // 16:,} steps of 16 = {recipe.images:,} images = {epochs:.2f} epochs")
assert recipe.images == 90_000 * 16 and 12 < epochs < 12.5

# %% [markdown]
# Lengths are *images*, not steps.  With two images a step instead of sixteen there are eight times as many
# steps, each of an eighth of the rate (the linear rule): after as many images, the weights have gone as far.
# The rate rises first, because that argument fails while the network changes fast, and falls by ten at two
# thirds and at eight ninths of the way.

# %%
alone = replace(recipe, batch_size=2)
for position in (0, 16_000, 500_000, 960_000, 1_280_000):
    rate, rate_alone = recipe.schedule().lr(position), alone.schedule().lr(position)
    print(f"after {position:9,} images: {rate:.3g}, with batches of 2 {rate_alone:.3g}")
    assert np.isclose(rate_alone * 8, rate)
rates = [recipe.schedule().lr(position) for position in (0, 16_000, 960_000, 1_280_000)]
assert np.allclose(rates, [1e-5, 1e-2, 1e-3, 1e-4]) and alone.images / alone.batch_size == 720_000

curves = {}
for name in ("detectron2_r50_1x", "detectron2_r50_3x", "torchvision_v1", "torchvision_v2"):
    positions = range(0, RECIPES[name].training.images, 16 * 50)
    curves[name] = positions, [RECIPES[name].training.schedule().lr(p) for p in positions]
lines(curves, out / "schedules.png", x="images seen", y="learning rate", title="Four recipes", log="y")

# %% [markdown]
# ## Photos have shapes
#
# Shorter side to 800, longer side at most 1,333: a landscape and a portrait still differ, and a batch is one array
# as large as the largest in each direction.  The rest is padding, which costs as much as photo.

# %%
class Photos:
    """Landscapes, portraits and a few panoramas: the built-in images, with rows or columns left out."""

    SHAPES = ((96, 128), (96, 128), (128, 96), (85, 128), (96, 128), (128, 85), (48, 128))

    def __init__(self, split, images):
        self.inner = md.shapes(split, images=images)
        self.classes, self.category_ids = self.inner.classes, self.inner.category_ids

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        sample, (h, w) = self.inner[index], self.SHAPES[index % 7]
        image = sample.image[np.arange(h) * 128 // h][:, np.arange(w) * 128 // w]
        return replace(sample, image=image, boxes=sample.boxes * np.float32([w, h, w, h]) / 128)

    def ground_truth(self):
        truth = self.inner.ground_truth()
        for n, entry in enumerate(truth["images"]):
            entry["height"], entry["width"] = self.SHAPES[n % 7]
        size = {entry["id"]: (entry["width"] / 128, entry["height"] / 128) for entry in truth["images"]}
        for a in truth["annotations"]:
            a["bbox"] = (np.array(a["bbox"]) * np.tile(size[a["image_id"]], 2)).tolist()
            a["area"] = a["bbox"][2] * a["bbox"][3]
        return truth


if generated := folder is None:
    folder = out / "data"
    shutil.rmtree(folder, ignore_errors=True)
    for split, images in (("train", 420), ("val", 39)):
        write_coco(Photos(split, images), folder, split)
train, val = coco(folder, "train"), coco(folder, "val")
print(f"\n{train.summary()}")

# %% [markdown]
# How much?  The sizes stand in the json, so nothing has to be opened: an epoch's batches in random order, and
# with each of one group of shapes, torchvision's groups.

# %%
preprocess = RECIPES["detectron2_r50_1x"].model(train.classes).preprocess
resized = np.array([preprocess.size(*train.size(n)) for n in range(len(train))])


def padding(order):
    batches = [resized[order[i : i + 16]] for i in range(0, len(order), 16)]
    return np.array([1 - b.prod(axis=1).sum() / (len(b) * b.max(axis=0).prod()) for b in batches])


order = rng.permutation(len(train))
grouped = grouped_order(order, aspect_groups(train, factor=3), 16, 0, rng)
before, after = padding(order), padding(grouped)                # parts of each batch
print(f"padding: {before.mean():.1%} of a batch in random order, {after.mean():.1%} in groups")
assert sorted(grouped) == list(range(len(train)))               # still every photo once
assert after.mean() < 0.6 * before.mean() if generated else after.mean() <= before.mean()
share = np.linspace(0, 1, len(before))
lines({"random": (share, np.sort(before)), "grouped": (share, np.sort(after))}, out / "padding.png",
      x="batches, the best first", y="part that is padding", title="What is computed for nothing")

# %% [markdown]
# ## One photo, many scales
#
# A network that saw every photo at 640 to 800 pixels knows objects at more sizes.  Scale, flip and order are
# functions of the seed and the *position* in the training, so that a training that was killed goes on with
# exactly the batch it would have seen.

# %%
scales = (64, 80, 96) if generated else (192, 224, 256)
config = md.presets.small(train.classes)
config = replace(config, preprocess=replace(config.preprocess, min_size=scales[-1], max_size=2 * scales[-1]))
how = {"batch_size": 8, "min_sizes": scales, "aspect_factor": 3, "augment": Augment(), "images": 3 * len(train)}
batches = dict(zip((0, 8, 16), Loader(train, config.preprocess, **how), strict=False))
shorter = {int(min(size)) for batch in batches.values() for size in batch.sizes}
print(f"\nshorter sides of {3 * 8} photos: {sorted(shorter)}")
assert shorter <= set(scales) and len(shorter) > 1
again = next(iter(Loader(train, config.preprocess, start=16, **how)))
assert np.array_equal(again.images, batches[16].images) and again.image_ids == batches[16].image_ids

# %% [markdown]
# ## The mean of the last weights
#
# With a constant rate the weights never arrive: every batch pushes them elsewhere.  The smallest case is a bowl,
# $L = |w|^2 / 2$, whose slope we only get with noise.

# %%
class Point(Module):
    def __init__(self):
        self.w = Tensor(np.full(2, 8.0), requires_grad=True)


point, track = Point(), []
optimizer, average = Optimizer(SGD(), [ParameterGroup({"w": point.w})]), WeightAverage(point, images=100)
for step in range(1000):
    point.w.grad = point.w.data + rng.normal(size=2)
    optimizer.step(lr=0.02)
    average.update(point, step, 1)
    track.append((np.linalg.norm(point.w.data), np.linalg.norm(average.mean["w"])))
weights, mean = np.array(track).T
lines({"the weights": (range(1000), weights), "their mean": (range(1000), mean)}, out / "average.png",
      x="steps", y="distance from the bottom", title="A noisy bowl", log="y")
print(f"\ndistance from the bottom, last 500 steps: {weights[500:].mean():.3f}, of the mean {mean[500:].mean():.3f}")
assert mean[500:].mean() < 0.6 * weights[500:].mean()

# %% [markdown]
# ## All of it at once
#
# detectron2's schedule, shrunk to what we have patience for, with chapter 4's network and rule, which start from
# random weights.  A checkpoint holds the mean, which detects, and beside it the weights that the next step moves.

# %%
shutil.rmtree(out / "run", ignore_errors=True)
images = int(os.environ.get("MINIDET_CHAPTER_IMAGES", 1600))
settings = replace(recipe.stretched(images), batch_size=8, rule=AdamW(), lr=8e-3, clip=10.0, min_sizes=scales,
                   aspect_factor=3, ema=images // 10, validations=1)  # fmt: skip
model = md.RetinaNet(config, seed=0)
training = md.train(model, train, validate=val, out=out / "run", config=settings)
loss = np.array(training.history["loss"])
print(training.evaluation.table())
assert loss[-10:].mean() < 0.8 * loss[:10].mean() or not generated

last = read_checkpoint(out / "run" / "last.safetensors")
name = "head.class_subnet.final.weight"
assert np.array_equal(last.weights[name], dict(model.named_parameters())[name].data)
assert not np.array_equal(last.weights[name], last.optimizer[f"own.{name}"])

# %% [markdown]
# ## The bill
#
# Convolutions cost in proportion to pixels (chapter 6), so a small image tells what a large one costs.  On eight
# V100s a step took 0.205 s; one GPU needs at most eight times as long, for it has nobody to wait for.

# %%
large = md.RetinaNet(RECIPES["detectron2_r50_1x"].model(val.classes), seed=0)
loader = Loader(val, replace(preprocess, min_size=192, max_size=256), batch_size=1, pad_to=(256, 256))
batch, clocks = next(iter(loader)), [perf_counter()]
for _ in range(3):
    batch_gradient(large, batch, parts=1, moving=100.0)
    clocks.append(perf_counter())
fastest = min(np.diff(clocks))
sides = rng.choice(recipe.min_sizes, len(train)).tolist()
sizes = np.array([replace(preprocess, min_size=side).size(*train.size(n)) for n, side in enumerate(sides)])
blocks = [sizes[grouped[i : i + 16]].max(axis=0) for i in range(0, len(train), 16)]
pixels = np.mean([-(-h // 32) * 32 * -(-w // 32) * 32 for h, w in blocks])
per_image = fastest * pixels / batch.images[..., 0].size
ZOO = 0.205  # s a step: detectron2, MODEL_ZOO.md, retinanet_R_50_FPN_1x
steps = recipe.images / 16
bill = {"this CPU": per_image * recipe.images, "1 GPU": 8 * ZOO * steps, "8 GPUs": ZOO * steps}
print(f"\nthis machine: {fastest:.2f} s for 256 x 256 pixels, so {per_image:.0f} s for {pixels:,.0f}")
for where, seconds in bill.items():
    print(f"{where:>9}: {seconds / 3600:8,.0f} hours = {seconds / 86400:7.1f} days for {recipe.images:,} images")
assert 5 < bill["8 GPUs"] / 3600 < 5.2 and bill["this CPU"] > bill["1 GPU"]
print(f"\nlook at schedules.png, padding.png, average.png and run/samples.png in {out}")

# %% [markdown]
# ## Three things to remember
#
# 1. Count images, not steps: then a recipe survives a change of batch or of machines, and rates follow one rule.
# 2. Everything random is a function of the position: order, groups, scales, flips.  That is what makes a restart
#    exact, and several processes agree without a word.
# 3. Work out the bill first.  `minidet doctor` does it for your own data, and `minidet train --recipe NAME` trains.
#
# **Next**: chapter 8 takes the same program to a GPU.
