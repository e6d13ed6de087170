"""RetinaNet: a backbone, a pyramid, two subnets, and every convention that says what their numbers mean."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minidet import backend
from minidet.autograd import Tensor
from minidet.backend import Array
from minidet.detection import AnchorConfig, CoderConfig, LossConfig, MatcherConfig, PostprocessConfig, anchors_for
from minidet.images import Preprocess
from minidet.kernels.precision import PRECISIONS, bfloat16
from minidet.models.fpn import FeaturePyramid, PyramidConfig
from minidet.models.heads import HeadConfig, RetinaNetHead
from minidet.models.resnet import Backbone, Map, ResNet, ResNetConfig
from minidet.nn import Module
from minidet.ops import astype, concat, reshape


@dataclass(frozen=True)
class RetinaNetConfig:
    """Everything that two RetinaNets can differ in; `minidet.presets` has the well-known ones."""

    classes: tuple[str, ...]
    """Names of the classes; the label k of a box means classes[k]."""
    backbone: ResNetConfig
    pyramid: PyramidConfig
    head: HeadConfig
    anchors: AnchorConfig
    matcher: MatcherConfig
    coder: CoderConfig
    loss: LossConfig
    postprocess: PostprocessConfig
    preprocess: Preprocess

    def __post_init__(self) -> None:
        if not self.classes:
            raise ValueError("RetinaNetConfig.classes is empty: a detector needs at least one class name")
        if len(set(self.classes)) < len(self.classes):
            twice = sorted({name for name in self.classes if self.classes.count(name) > 1})
            raise ValueError(f"RetinaNetConfig.classes has names more than once: {', '.join(twice)}")
        if len(self.anchors.sizes) != self.pyramid.levels:
            raise ValueError(
                f"RetinaNetConfig: anchors for {len(self.anchors.sizes)} levels, but a pyramid of {self.pyramid.levels}"
            )


class RetinaNet(Module):
    """The whole network: images to a class logit per anchor and class, and four deltas per anchor.

    Parameters are drawn on the host from `seed`, so that one seed gives one network on every backend, and
    live on `xp`, else on `backend.default()`.  Another backbone than config.backbone can be passed in: any
    Module that follows `minidet.models.Backbone`.

    With `precision` "bfloat16" it computes in that: parameters and their gradients stay float32, and so do the
    outputs, sums and statistics.  With `recompute` residual blocks and the towers of the head keep nothing for the
    backward pass but their input, and are run again in it.

    Shapes:
        images: (N, H, W, 3)
        returns: logits (N, R, K) and deltas (N, R, 4), R as in `anchors(H, W)`
    Source: RetinaNet, arXiv:1708.02002, section 4.
    """

    def __init__(self, config: RetinaNetConfig, *, seed: int = 0, backbone: Backbone | None = None, xp=None):
        xp = backend.default() if xp is None else xp
        rng = np.random.default_rng(seed)
        self.config = config
        self.backbone = ResNet(config.backbone, rng=rng) if backbone is None else backbone
        self.pyramid = FeaturePyramid(self.backbone.channels, config.pyramid, rng=rng)
        self.head = RetinaNetHead(
            config.pyramid.channels, config.anchors.per_cell, len(config.classes), config.head, rng=rng
        )
        self.to(xp)
        self.compute()

    def compute(self, *, precision: str = "float32", recompute: bool = False) -> None:
        """How to compute from now on; weights do not change.

        Raises:
            ValueError: if there is no such precision.
            RuntimeError: if the array library lacks it.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}: choose one of {', '.join(PRECISIONS)}")
        if precision == "bfloat16":
            bfloat16(self.xp)
        self.precision, self.recompute = precision, recompute
        for _, module in self.named_modules():
            if hasattr(module, "recompute"):
                module.recompute = recompute

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, H, W, 3) -> logits (N, R, K), deltas (N, R, 4)."""
        if images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"RetinaNet: images must be (N, H, W, 3), got {images.shape}")
        levels = self.features(images)
        maps = tuple(level.shape[1:3] for level in levels)
        N, _, _, C = levels[0].shape
        x = concat([reshape(level, (N, -1, C)) for level in levels], axis=1)    # (N, S, C)
        logits, deltas = self.head(x, maps)
        return astype(logits, images.dtype), astype(deltas, images.dtype)

    def features(self, images: Tensor) -> list[Tensor]:
        """The pyramid's levels (N, H_l, W_l, C), P3 first."""
        dtype = bfloat16(images.xp) if self.precision == "bfloat16" else images.dtype
        return self.pyramid(self.backbone(astype(images, dtype)))

    def maps(self, height: int, width: int) -> list[Map]:
        """The (H_l, W_l) of every level for input of this size, without running anything."""
        return self.pyramid.maps(self.backbone.maps(height, width))

    def anchors(self, height: int, width: int, xp=np) -> Array:
        """The anchors (R, 4) that the outputs for input of this size are relative to, as an array of `xp`."""
        return anchors_for(self.config.anchors, (height, width), self.maps(height, width), xp)

    def level_counts(self, height: int, width: int) -> list[int]:
        """How many of those anchors belong to each level."""
        return [H * W * self.config.anchors.per_cell for H, W in self.maps(height, width)]
