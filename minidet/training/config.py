"""The recipe of a training: everything a user may choose, with the optimizer and schedule it stands for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from minidet.autograd import Tensor
from minidet.data.augment import Augment
from minidet.kernels.precision import PRECISIONS
from minidet.models import RetinaNet
from minidet.nn import BatchNorm2d, GroupNorm
from minidet.optim import SGD, AdamW, Optimizer, ParameterGroup, Schedule, linear_rule

WARMUP = 1_600  # images: 100 steps of 16; a short training warms up over its first tenth instead

FREE = ("accumulate", "recompute", "workers", "validations", "checkpoints", "samples")
"""Settings a resumed training may change: they alter its speed or its reports, not its result."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train; lengths are counted in images, so that they mean the same at every batch size.

    The defaults train the `small` preset from random weights.
    """

    images: int = 28_800
    """Images to see in all, over as many epochs as that takes."""
    batch_size: int = 16
    """Images per step of the optimizer."""
    accumulate: int = 1
    """Parts a batch is split into, one after the other, to save memory.  Anchors are matched and losses
    normalised over the whole batch first: but for batch norm's statistics the result is the same."""
    precision: str = "float32"
    """What activations and products are computed in: "bfloat16" halves their memory, and GPUs multiply it faster.
    Weights, gradients, statistics and losses are float32 in any case."""
    recompute: bool = False
    """Keep only the inputs of residual blocks and towers, and compute what is inside again in the backward pass:
    less memory, a third more time, the same result."""
    rule: AdamW | SGD = field(default_factory=AdamW)
    """How a gradient moves a weight."""
    lr: float = 4e-3
    """Peak learning rate for batches of 16; the linear rule scales it to `batch_size`."""
    weight_decay: float = 1e-4
    """Of all parameters.  Source: section 4.1 "Optimization"."""
    norm_weight_decay: float | None = None
    """Of the weights and biases of norms; None: the same."""
    backbone_lr_scale: float = 1.0
    """Factor on the rate of a backbone that is pretrained and should only drift."""
    warmup: int | None = None
    """Images until the rate has grown to its peak; None: 1,600, or a tenth of a shorter training."""
    warmup_start: float = 1 / 1000
    """Part of the peak that the first step has."""
    milestones: tuple[int, ...] = ()
    """Images seen at which the rate is divided by 10 (the paper: at 2/3 and 8/9 of the training)."""
    cosine: bool = False
    """Let the rate fall along half a cosine."""
    cooldown: float = 0.25
    """Last fraction of the training, over which the rate falls linearly to 0."""
    clip: float | None = 10.0
    """Longest gradient, all parameters together; None: as long as it comes."""
    augment: Augment = field(default_factory=Augment)
    """Random flips of the training images."""
    min_sizes: tuple[int, ...] = ()
    """Pixels of the shorter side, one drawn for every training image; none: always the model's
    preprocess.min_size, which validation keeps to in any case."""
    aspect_factor: int | None = None
    """Batches of images of like shape, which saves padding: 0 sorts into narrow and wide, k into 2 k + 2 groups
    (data/grouping.py).  None: as they come."""
    ema: int | None = None
    """Images over which weights are averaged, exponentially; the mean is what is validated and detects.  None:
    the weights of the last step."""
    seed: int = 0
    """Decides order and augmentation, at every position anew."""
    workers: int = 0
    """Threads that prepare batches ahead."""
    validations: int = 4
    """How often validation AP is measured, evenly spread, the last time at the end."""
    checkpoints: int = 10
    """How often the training is saved, evenly spread, besides at its end and when interrupted."""
    samples: int = 6
    """Validation images drawn with the detections of the final model."""

    def __post_init__(self):
        least = {"images": 1, "batch_size": 1, "accumulate": 1, "seed": 0, "workers": 0}
        for name in (*least, "validations", "checkpoints", "samples"):
            if getattr(self, name) < least.get(name, 0):
                raise ValueError(f"training: {name} must be at least {least.get(name, 0)}, got {getattr(self, name)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"training: precision is {self.precision!r}: choose one of {', '.join(PRECISIONS)}")
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"training: a batch of {self.batch_size} images cannot be split into {self.accumulate} parts"
            )
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"training: clip must be above 0, or None for no clipping, got {self.clip}")
        if not self.lr > 0:
            raise ValueError(f"training: lr must be above 0, got {self.lr}")
        for name in ("backbone_lr_scale", "weight_decay", "norm_weight_decay", "aspect_factor"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"training: {name} must not be negative, got {getattr(self, name)}")
        if (self.ema is not None and self.ema < 1) or min(self.min_sizes, default=1) < 1:
            raise ValueError(f"training: ema and min_sizes must be at least 1, got {self.ema} and {self.min_sizes}")
        if self.warmup is not None and self.warmup >= self.images:
            raise ValueError(
                f"training: a warm-up of {self.warmup} images does not fit into a training of {self.images}"
            )
        self.schedule()  # its own checks, now rather than at the first step

    def schedule(self) -> Schedule:
        """The learning rate as a function of the images seen."""
        return Schedule(
            linear_rule(self.lr, self.batch_size),
            self.images,
            warmup=min(WARMUP, self.images // 10) if self.warmup is None else self.warmup,
            warmup_start=self.warmup_start,
            milestones=self.milestones,
            cosine=self.cosine,
            cooldown=self.cooldown,
        )

    def optimizer(self, model: RetinaNet) -> Optimizer:
        """The rule, with every trainable parameter of `model`, the backbone's in a group of their own."""
        norms = [module for _, module in model.named_modules() if isinstance(module, BatchNorm2d | GroupNorm)]
        of_norms = {id(parameter) for norm in norms for parameter in norm.parameters()}
        groups: dict[tuple[float, float], dict[str, Tensor]] = {}
        in_backbone = 0
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale, decay = 1.0, self.weight_decay
                if name.startswith("backbone."):
                    scale, in_backbone = self.backbone_lr_scale, in_backbone + 1
                if id(parameter) in of_norms and self.norm_weight_decay is not None:
                    decay = self.norm_weight_decay
                groups.setdefault((scale, decay), {})[name] = parameter
        if self.backbone_lr_scale != 1 and not in_backbone:
            raise ValueError(
                "training: backbone_lr_scale is set, but no trainable parameter is called backbone.*"
            )
        return Optimizer(self.rule, [ParameterGroup(parameters, *how) for how, parameters in groups.items()])

    def stretched(self, images: int) -> TrainConfig:
        """The same training over more or fewer images: milestones move along, a warm-up stays if it is short."""
        if images == self.images:
            return self
        milestones = tuple(round(m * images / self.images) for m in self.milestones)
        warmup = None if self.warmup is None else min(self.warmup, images // 10)
        return replace(self, images=images, milestones=milestones, warmup=warmup)

    def summary(self, dataset_length: int) -> str:
        """What will happen, in two lines: the numbers behind the settings."""
        schedule = self.schedule()
        parts = f", each in {self.accumulate} parts" if self.accumulate > 1 else ""
        shape = [f"warm-up {schedule.warmup:,} images"]
        if self.milestones:
            shape.append(f"x {schedule.factor:g} at {', '.join(f'{m:,}' for m in self.milestones)} images")
        if self.cosine:
            shape.append("cosine to 0")
        if self.cooldown:
            shape.append(f"linear to 0 over the last {self.cooldown:.0%}")
        if self.min_sizes:
            shape.append(f"shorter sides of {', '.join(map(str, self.min_sizes))} px")
        if self.ema:
            shape.append(f"weights averaged over {self.ema:,} images")
        if self.backbone_lr_scale != 1:
            shape.append(f"backbone x {self.backbone_lr_scale:g}")
        return (
            f"{self.images:,} images = {self.images / dataset_length:.2f} epochs of {dataset_length:,}; "
            f"{-(-self.images // self.batch_size):,} steps of {self.batch_size}{parts}\n"
            f"{type(self.rule).__name__}, learning rate {schedule.peak:g} (= {self.lr:g} * "
            f"{self.batch_size} / 16, the linear rule), {', '.join(shape)}"
        )


ALL_SYMMETRIES = Augment(hflip=0.5, vflip=0.5, transpose=True)

SHAPES = TrainConfig(augment=ALL_SYMMETRIES, batch_size=24)
"""For textures and symbols that know no up and down: the built-in data set, from random weights.

Larger batches take less time, since a step costs something however few its images are; and they teach less: AP after
28,800 images is .692, .677 and .666 in batches of 16, 24 and 32 (`minidet train --data shapes --images 28800 --seed 0
--batch-size N`, 32 with `--set lr=0.003`).
"""

FINE_TUNE = TrainConfig(images=5_200, batch_size=4, lr=4e-3, backbone_lr_scale=0.25, cosine=True, cooldown=0.0)
"""For a pretrained backbone and some hundreds of photos.  What knows no up and down, such as microscope images,
gains from more symmetries: augment.vflip, augment.transpose."""

SCRATCH = TrainConfig(images=5_200, batch_size=4, lr=8e-3, cosine=True, cooldown=0.0)
"""The same photos, from random weights with a norm that allows twice the rate."""
