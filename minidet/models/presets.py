"""The well-known RetinaNets, each with every convention in which it differs from the others.

The conventions matter as soon as two systems are compared or weights are carried over: anchors that are
rounded or not, a P6 from C5 or P5, what the loss is divided by.  A preset is a function of the class names;
`dataclasses.replace` varies it.

| | paper | torchvision_v1 | torchvision_v2 | detectron2 | small | resnet18 |
|---|---|---|---|---|---|---|
| backbone | R50 | R50 | R50, batch norm | R50, stride in the 1x1 | 2 basic blocks a stage | R18 to stride 16 |
| P6 from | C5 | P5 | C5 | C5 | C5 | C4 makes P5 |
| towers | 4 x 256 | 4 x 256 | 4 x 256, group norm | 4 x 256 | 2 x 64, group norm | 2 x 64, group norm |
| anchors | exact | rounded | rounded | exact, scale-major | exact, from 16 px | exact, from 16 px |
| low-quality matches | no | yes, IoU 0 too | yes, IoU 0 too | yes, IoU 0 too | yes | yes |
| box loss | smooth L1 | L1 | GIoU | L1 | smooth L1 | smooth L1 |
| normaliser | batch | image | image | moving | batch | batch |
| detections | 100 | 300 | 300 | 100 | 100 | 100 |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from minidet.detection import AnchorConfig, CoderConfig, LossConfig, MatcherConfig, PostprocessConfig, octaves
from minidet.images import Preprocess
from minidet.models.fpn import PyramidConfig
from minidet.models.heads import HeadConfig
from minidet.models.resnet import RESNET18, RESNET50, ResNetConfig
from minidet.models.retinanet import RetinaNetConfig
from minidet.nn import Norm

STRIDES = (8, 16, 32, 64, 128)
TORCHVISION_SIZES = tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (32, 64, 128, 256, 512))


def paper(classes: Sequence[str]) -> RetinaNetConfig:
    """What the paper says, and where it is silent what its authors' first code did.

    Source: RetinaNet, arXiv:1708.02002, section 4, images of 600 px as in table 1; smooth L1's beta 1/9, at
        most 1000 px along the longer side at that size, 100 detections and NMS per class: Detectron.
    """
    return RetinaNetConfig(
        classes=tuple(classes),
        backbone=replace(RESNET50, stride_in_1x1=True, frozen_stages=2),
        pyramid=PyramidConfig(),
        head=HeadConfig(),
        anchors=AnchorConfig(octaves((32, 64, 128, 256, 512)), strides=STRIDES),
        matcher=MatcherConfig(),
        coder=CoderConfig(),
        loss=LossConfig(box="smooth_l1", beta=1 / 9, normaliser="batch"),
        postprocess=PostprocessConfig(max_detections=100),
        preprocess=Preprocess(min_size=600, max_size=1000),
    )


def torchvision_v1(classes: Sequence[str]) -> RetinaNetConfig:
    """torchvision's retinanet_resnet50_fpn, as its published weights need it.

    Batch norm has eps 0, which torchvision sets when it loads them; P6 is made from P5; its 91 classes are
    the raw COCO ids, most of which exist.
    """
    return RetinaNetConfig(
        classes=tuple(classes),
        backbone=replace(RESNET50, norm=Norm("frozen", eps=0.0), frozen_stages=2),
        pyramid=PyramidConfig(extra_from_backbone=False),
        head=HeadConfig(),
        anchors=AnchorConfig(TORCHVISION_SIZES, rounded=True),
        matcher=MatcherConfig(low_quality=True, zero_iou=True),
        coder=CoderConfig(),
        loss=LossConfig(box="l1", normaliser="image"),
        postprocess=PostprocessConfig(max_detections=300),
        preprocess=Preprocess(min_size=800, max_size=1333, method="float"),
    )


def torchvision_v2(classes: Sequence[str]) -> RetinaNetConfig:
    """torchvision's retinanet_resnet50_fpn_v2: batch norm that trains, GroupNorm heads, GIoU, P6 from C5."""
    v1 = torchvision_v1(classes)
    return replace(
        v1,
        backbone=replace(RESNET50, norm=Norm("batch")),
        pyramid=PyramidConfig(),
        head=HeadConfig(norm=Norm("group", groups=32)),
        loss=LossConfig(box="giou", normaliser="image"),
    )


def detectron2(classes: Sequence[str]) -> RetinaNetConfig:
    """detectron2's COCO-Detection/retinanet_R_50_FPN: BGR bytes, exact anchors, a moving normaliser."""
    return RetinaNetConfig(
        classes=tuple(classes),
        backbone=replace(RESNET50, stride_in_1x1=True, frozen_stages=2),
        pyramid=PyramidConfig(),
        head=HeadConfig(),
        anchors=AnchorConfig(octaves((32, 64, 128, 256, 512)), scale_major=True, strides=STRIDES),
        matcher=MatcherConfig(low_quality=True, zero_iou=True),
        coder=CoderConfig(),
        loss=LossConfig(box="l1", normaliser="moving"),
        postprocess=PostprocessConfig(max_detections=100, clip="after_nms", drop_empty=True),
        preprocess=Preprocess(
            min_size=800,
            max_size=1333,
            method="pil",
            mean=(103.530, 116.280, 123.675),
            std=(1.0, 1.0, 1.0),
            scale=1.0,
            bgr=True,
        ),
    )


def small(classes: Sequence[str]) -> RetinaNetConfig:
    """A RetinaNet of about a million parameters that learns from scratch on a CPU.

    Group norm in the towers and the rate it allows are what makes it learn fast.  Images keep their size up to
    1,024 px; anchors start at twice the stride, 16 px.
    """
    return RetinaNetConfig(
        classes=tuple(classes),
        backbone=ResNetConfig(
            stem=16,
            widths=(16, 32, 64, 128),
            blocks=(2, 2, 2, 2),
            bottleneck=False,
            norm=Norm("group", groups=8),
        ),
        pyramid=PyramidConfig(channels=64),
        head=HeadConfig(depth=2, norm=Norm("group", groups=8), he_towers=True),
        anchors=AnchorConfig(octaves((16, 32, 64, 128, 256)), strides=STRIDES),
        matcher=MatcherConfig(low_quality=True),
        coder=CoderConfig(),
        loss=LossConfig(box="smooth_l1", beta=1 / 9, normaliser="batch"),
        postprocess=PostprocessConfig(score_threshold=0.02, top_k=600, max_detections=100),
        preprocess=Preprocess(min_size=0, max_size=1024, method="pil", pad_multiple=32),
    )


def resnet18(classes: Sequence[str]) -> RetinaNetConfig:
    """ResNet-18 up to stride 16 under the small pyramid: for photos, from ImageNet weights.

    Its convolutions have biases and no norm, the form that weights with folded batch norm come in; the stem
    and the first stage stay as they were pretrained.
    """
    return replace(
        small(classes),
        backbone=replace(
            RESNET18, widths=(64, 128, 256), blocks=(2, 2, 2), norm=Norm("none"), frozen_stages=2
        ),
        preprocess=Preprocess(min_size=240, max_size=320, method="pil", pad_multiple=32),
    )


def with_backbone(config: RetinaNetConfig, backbone: ResNetConfig) -> RetinaNetConfig:
    """The same RetinaNet on another residual network, which takes over norm and frozen stages.

    A ResNeXt halves its maps in the 3x3 everywhere, and its published weights expect unit variance: where the
    pixels were bytes of any variance, they are divided.

    Source: detectron2, configs/COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml.
    """
    old, preprocess = config.backbone, config.preprocess
    in_1x1 = old.stride_in_1x1 and backbone.groups == 1
    if backbone.groups > 1 and preprocess.scale == 1 and preprocess.std == (1.0, 1.0, 1.0):
        preprocess = replace(preprocess, std=(57.375, 57.120, 58.395))
    backbone = replace(backbone, norm=old.norm, frozen_stages=old.frozen_stages, stride_in_1x1=in_1x1)
    return replace(config, backbone=backbone, preprocess=preprocess)


PRESETS: dict[str, Callable[[Sequence[str]], RetinaNetConfig]] = {
    preset.__name__: preset for preset in (paper, torchvision_v1, torchvision_v2, detectron2, small, resnet18)
}
"""Every preset by name, for the command line."""
