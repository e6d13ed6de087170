"""The trainings whose numbers people compare with: the paper's, detectron2's and torchvision's, on COCO.

A recipe is a model and a TrainConfig; tests/test_recipes.py holds every number to its source.  The rates are
those for a batch of 16, and lengths are images, so that a recipe means the same on any number of machines.

Not reproduced, in all of them: images without objects are trained on here, and left out there (1,021 of COCO's
118,287); the paper's first code has twice the rate and no decay on biases; torchvision v2 shares batch norm's
statistics among its GPUs, and lets those of frozen stages move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from minidet.detection import MiningConfig
from minidet.models import RESNET101, RESNEXT101_32X8D, RESNEXT101_64X4D, ResNetConfig, RetinaNetConfig, presets
from minidet.nn import Norm
from minidet.optim import SGD, AdamW
from minidet.training.config import TrainConfig

BATCH = 16  # images of a step in all of them: 8 GPUs with 2 each
TORCHVISION_EPOCH = 117_266  # of COCO train2017's 118,287 images those that have a box

Preset = Callable[[Sequence[str]], RetinaNetConfig]


@dataclass(frozen=True)
class Recipe:
    """A model, how it is trained, and what came out of it elsewhere."""

    model: Preset
    """The model's settings, given the names of the classes."""
    training: TrainConfig
    initial: str
    """The weights its authors start from."""
    published: float | None = None
    """Their AP, in percent."""
    images: str = "val2017"
    """Of which images that is."""


def _on(
    preset: Preset,
    backbone: ResNetConfig | None = None,
    sides: tuple[int, int] | None = None,
    frozen_stages: int | None = None,
    **loss,
) -> Preset:
    """`preset` with another backbone, other shorter and longer sides of images, frozen stages, or loss."""

    def model(classes: Sequence[str]) -> RetinaNetConfig:
        config = preset(classes)
        if backbone is not None:
            config = presets.with_backbone(config, backbone)
        if frozen_stages is not None:
            config = replace(config, backbone=replace(config.backbone, frozen_stages=frozen_stages))
        if sides is not None:
            config = replace(config, preprocess=replace(config.preprocess, min_size=sides[0], max_size=sides[1]))
        return replace(config, loss=replace(config.loss, **loss))

    return model


SCALES = tuple(range(640, 801, 32))

PAPER = TrainConfig(
    images=90_000 * BATCH, batch_size=BATCH, rule=SGD(momentum=0.9), lr=0.01, weight_decay=1e-4,
    warmup=500 * BATCH, warmup_start=1 / 3, milestones=(60_000 * BATCH, 80_000 * BATCH), cooldown=0.0, clip=None,
    aspect_factor=0,
)  # fmt: skip
"""Section 4.1 "Optimization"; warm-up and grouping, of which it says nothing, are those of its authors' code."""

PAPER_LONG = replace(PAPER.stretched(135_000 * BATCH), min_sizes=SCALES)
"""Table 2: 1.5 times as long, with scale jitter; the range is detectron2's, for the paper gives none."""

DETECTRON2_1X = replace(PAPER, warmup=1000 * BATCH, warmup_start=1 / 1000, norm_weight_decay=0.0, min_sizes=SCALES)
DETECTRON2_3X = replace(DETECTRON2_1X, images=270_000 * BATCH, milestones=(210_000 * BATCH, 250_000 * BATCH))

TORCHVISION_V1 = replace(
    PAPER, images=26 * TORCHVISION_EPOCH, milestones=(16 * TORCHVISION_EPOCH, 22 * TORCHVISION_EPOCH),
    warmup=1000 * BATCH, warmup_start=1 / 1000, aspect_factor=3,
)  # fmt: skip
TORCHVISION_V2 = replace(
    TORCHVISION_V1, rule=AdamW(), lr=1e-4, weight_decay=0.05, norm_weight_decay=0.0,
    min_sizes=tuple(range(480, 801, 32)),
)  # fmt: skip

_MSRA = "ImageNetPretrained/MSRA/R-{}.pkl of detectron2"
_R50, _R101 = _MSRA.format(50), _MSRA.format(101)
_X101 = "ImageNetPretrained/FAIR/X-101-32x8d.pkl of detectron2"
_X101_64 = "ImageNetPretrained/FBResNeXt/X-101-64x4d.pkl of Detectron"

_LARGE = (800, 1333)
_CROSS_ENTROPY = {"alpha": 0.75, "gamma": 0.0}
_OHEM = {"alpha": None, "gamma": 0.0, "mining": MiningConfig(128, 0.5)}
_OHEM_1_3 = _OHEM | {"mining": MiningConfig(128, 0.5, ratio=3)}

_d2 = presets.detectron2


def _paper(classes: Sequence[str]) -> RetinaNetConfig:
    """The paper's network fed as its authors' weights need it: BGR, of which only a mean was subtracted.

    Source: Detectron, lib/core/config.py, PIXEL_MEANS.
    """
    config, mean = presets.paper(classes), (102.9801, 115.9465, 122.7717)
    pixels = replace(config.preprocess, bgr=True, scale=1.0, mean=mean, std=(1.0, 1.0, 1.0))
    return replace(config, preprocess=pixels)


def _torchvision_v1(classes: Sequence[str]) -> RetinaNetConfig:
    """As torchvision trains it: only the published weights, made before frozen batch norm had an eps, need 0."""
    config = presets.torchvision_v1(classes)
    return replace(config, backbone=replace(config.backbone, norm=Norm("frozen", eps=1e-5)))


RECIPES: dict[str, Recipe] = {
    # Tables 1a, 1b and 1d: 600 px.  "minival" is what became val2017.
    "paper_r50_600": Recipe(_paper, PAPER, _R50, 34.0, "minival"),
    "paper_r50_600_ce": Recipe(_on(_paper, **_CROSS_ENTROPY), PAPER, _R50, 31.1, "minival"),
    "paper_r101_600": Recipe(_on(_paper, RESNET101), PAPER, _R101, 36.0, "minival"),
    "paper_r101_600_ohem": Recipe(_on(_paper, RESNET101, **_OHEM), PAPER, _R101, 32.8, "minival"),
    "paper_r101_600_ohem_1_3": Recipe(_on(_paper, RESNET101, **_OHEM_1_3), PAPER, _R101, 31.1, "minival"),
    # Tables 1e and 2, and the last from Detectron's model zoo.
    "paper_r50_800": Recipe(_on(_paper, sides=_LARGE), PAPER, _R50, 35.7, "test-dev"),
    "paper_r101_800": Recipe(_on(_paper, RESNET101, _LARGE), PAPER, _R101, 37.8, "test-dev"),
    "paper_r101_800_long": Recipe(_on(_paper, RESNET101, _LARGE), PAPER_LONG, _R101, 39.1, "test-dev"),
    "paper_x101_800_long": Recipe(_on(_paper, RESNEXT101_32X8D, _LARGE), PAPER_LONG, _X101, 40.8, "test-dev"),
    "detectron_x101_64x4d": Recipe(_on(_paper, RESNEXT101_64X4D, _LARGE), PAPER, _X101_64, 39.8, "minival"),
    # configs/COCO-Detection/retinanet_*.yaml; the last is the backbone of its faster_rcnn_X_101_32x8d_FPN_3x.yaml.
    "detectron2_r50_1x": Recipe(_d2, DETECTRON2_1X, _R50, 37.4),
    "detectron2_r50_3x": Recipe(_d2, DETECTRON2_3X, _R50, 38.7),
    "detectron2_r101_3x": Recipe(_on(_d2, RESNET101), DETECTRON2_3X, _R101, 40.4),
    "detectron2_x101_3x": Recipe(_on(_d2, RESNEXT101_32X8D), DETECTRON2_3X, _X101),
    # references/detection
    "torchvision_v1": Recipe(_torchvision_v1, TORCHVISION_V1, "torchvision's resnet50, IMAGENET1K_V1", 36.4),
    "torchvision_v2": Recipe(
        _on(presets.torchvision_v2, frozen_stages=2), TORCHVISION_V2, "torchvision's resnet50, IMAGENET1K_V2", 41.5
    ),
}
"""Every recipe by name, for the command line."""


def recipe_table() -> str:
    """A line for each recipe: the numbers it stands for."""
    lines = [f"{'recipe':<25}{'steps':>8}{'images':>11}{'lr':>8}  {'sides':<10}{'AP there':>9}"]
    for name, recipe in RECIPES.items():
        t, preprocess = recipe.training, recipe.model(("object",)).preprocess
        sides = f"{min(t.min_sizes)}-{max(t.min_sizes)}" if t.min_sizes else f"{preprocess.min_size}"
        published = "-" if recipe.published is None else f"{recipe.published}  {recipe.images}"
        lines.append(
            f"{name:<25}{-(-t.images // t.batch_size):>8,}{t.images:>11,}{t.lr:>8g}  {sides:<10}{published:>9}"
        )
    return "\n".join(lines)
