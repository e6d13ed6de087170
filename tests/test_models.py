"""Backbones, pyramid, heads and the whole network: sizes, order, gradients, conventions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from modules import assert_module_gradients_match, assert_slopes_match, randomized
from op_cases.windows import convolution

from minidet import backend, kernels
from minidet.autograd import Tensor, no_grad
from minidet.detection import AnchorConfig, LossConfig, build_targets, image_weights, loss, octaves
from minidet.models import (
    RESNET18,
    RESNET34,
    RESNET50,
    RESNET101,
    RESNEXT101_32X8D,
    RESNEXT101_64X4D,
    FeaturePyramid,
    HeadConfig,
    PyramidConfig,
    ResNet,
    ResNetConfig,
    RetinaNet,
    RetinaNetHead,
    Subnet,
    presets,
)
from minidet.models.resnet import BasicBlock, Bottleneck
from minidet.nn import Conv2d, Module, Norm
from minidet.ops import concat, relu, reshape, sum

numpy = backend.load("numpy")
strict = backend.load("array_api_strict")
each_library = pytest.mark.parametrize("xp", [numpy, strict], ids=backend.name_of)
NETWORKS = {
    "resnet18": RESNET18, "resnet34": RESNET34, "resnet50": RESNET50, "resnet101": RESNET101,
    "resnext101": RESNEXT101_32X8D, "stride-in-1x1": replace(RESNET50, stride_in_1x1=True),
    "three-stages": ResNetConfig(widths=(64, 128, 256), blocks=(1, 1, 1), bottleneck=False),
}  # fmt: skip
SIZES = [(64, 64), (65, 97), (33, 50), (96, 31), (1, 1)]


class Zeros:
    """Stands in for a generator: drawing the weights of a large network takes seconds."""

    def normal(self, *args):
        return np.zeros(args[-1], np.float32)

    uniform = normal


def images(rng, *shape: int) -> Tensor:
    return Tensor(rng.normal(size=(*shape, 3)))


def together(tensors: list[Tensor]) -> Tensor:
    """All elements in one row, so that one cotangent meets them all."""
    return concat([reshape(x, (-1,)) for x in tensors], axis=0)


# --- backbones --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("name", NETWORKS)
def test_resnet_maps(name, height, width, rng):
    """What `maps` foretells is what comes out; thin, since widths change no map."""
    widths = tuple(8 * 2**i for i in range(len(NETWORKS[name].widths)))
    net = ResNet(replace(NETWORKS[name], stem=4, widths=widths), rng=rng)
    with no_grad():
        levels = net(Tensor(np.zeros((1, height, width, 3), np.float32)))
    assert [x.shape[1:3] for x in levels] == net.maps(height, width)
    assert tuple(x.shape[3] for x in levels) == net.channels


def test_resnet_strides_are_8_16_32():
    assert ResNet(RESNET18, rng=Zeros()).maps(512, 256) == [(64, 32), (32, 16), (16, 8)]
    assert ResNet(NETWORKS["three-stages"], rng=Zeros()).maps(512, 256) == [(64, 32), (32, 16)]


@pytest.mark.parametrize(
    ("config", "count"),
    [  # torchvision's networks without their last layer
        (RESNET18, 11_689_512 - 513_000),
        (RESNET34, 21_797_672 - 513_000),
        (RESNET50, 25_557_032 - 2_049_000),
        (RESNET101, 44_549_160 - 2_049_000),
        (RESNEXT101_32X8D, 88_791_336 - 2_049_000),
        (RESNEXT101_64X4D, 83_455_272 - 2_049_000),
    ],
    ids=["18", "34", "50", "101", "next", "64x4d"],
)
def test_resnets_have_the_published_number_of_parameters(config, count):
    net = ResNet(replace(config, norm=Norm("batch")), rng=Zeros())
    assert np.sum([p.data.size for p in net.parameters()]) == count


def strides(block: Bottleneck) -> list[int]:
    return [block.conv1.conv.stride, block.conv2.conv.stride, block.conv3.conv.stride, block.shortcut.conv.stride]


def test_where_a_bottleneck_halves_the_map(rng):
    assert strides(Bottleneck(8, 2, 2, RESNET50, rng)) == [1, 2, 1, 2]
    assert strides(Bottleneck(8, 2, 2, NETWORKS["stride-in-1x1"], rng)) == [2, 1, 1, 2]


def test_frozen_stages(rng):
    config = replace(RESNET18, stem=4, widths=(4, 4), blocks=(2, 1), norm=Norm("none"))
    trained = {}
    for frozen in range(4):
        net = ResNet(replace(config, frozen_stages=frozen), rng=rng)
        trained[frozen] = {name.split(".blocks")[0] for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {
        0: {"stem.conv.weight", "stem.conv.bias", "stages.0", "stages.1"},
        1: {"stages.0", "stages.1"},
        2: {"stages.1"},
        3: set(),
    }


def test_nothing_moves_in_frozen_stages(rng):
    """The running statistics of batch norm neither."""
    config = replace(RESNET18, stem=4, widths=(4, 4), blocks=(1, 1), norm=Norm("batch"), frozen_stages=2)
    net = ResNet(config, rng=rng).train()
    before = net.state_dict()
    sum(net(images(rng, 1, 32, 32))[0]).backward()
    moved = {name.split(".blocks")[0] for name, array in net.state_dict().items() if (array != before[name]).any()}
    assert moved == {"stages.1"}
    assert all((p.grad is None) == name.startswith(("stem", "stages.0")) for name, p in net.named_parameters())


@pytest.mark.parametrize("frozen", [-1, 6, 99])
def test_there_are_only_so_many_stages_to_freeze(frozen):
    with pytest.raises(ValueError, match=rf"frozen_stages counts the stem and 4 stages: 0 to 5, got {frozen}"):
        replace(RESNET50, frozen_stages=frozen)


FROZEN = ResNetConfig(norm=Norm("frozen"))
GROUP = ResNetConfig(norm=Norm("group", groups=1, eps=0.1))
BLOCKS = {
    "basic": lambda rng: BasicBlock(2, 2, 1, FROZEN, rng),
    "basic-stride": lambda rng: BasicBlock(1, 2, 2, GROUP, rng),
    "bottleneck": lambda rng: Bottleneck(4, 1, 1, FROZEN, rng),
    "bottleneck-stride": lambda rng: Bottleneck(2, 1, 2, FROZEN, rng),
    "bottleneck-group": lambda rng: Bottleneck(2, 1, 1, GROUP, rng),
    "bottleneck-next": lambda rng: Bottleneck(2, 1, 2, ResNetConfig(groups=2, stride_in_1x1=True), rng),
}


@each_library
@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
def test_gradient_of_a_block(make, xp, rng):
    block = randomized(make(rng), rng)
    channels = block.conv1.conv.weight.shape[3]
    assert_module_gradients_match(block, rng.normal(size=(1, 3, 2, channels)), xp=xp, rng=rng)


@each_library
def test_gradient_of_a_resnet(xp, rng):
    config = ResNetConfig(stem=2, widths=(2, 3, 4), blocks=(1, 2, 1), bottleneck=False, norm=Norm("group", groups=1))
    net = randomized(ResNet(config, rng=rng), rng).to(xp)
    x = xp.asarray(rng.normal(size=(1, 33, 20, 3)))
    cotangent = xp.asarray(rng.normal(size=together(net(Tensor(x))).shape))
    assert_slopes_match(lambda: sum(together(net(Tensor(x))) * cotangent), net.parameters(), rng)


# --- the pyramid ------------------------------------------------------------------------------------

BACKBONE_MAPS = [(5, 7), (3, 4), (2, 2)]


def pyramid(rng, **settings) -> tuple[FeaturePyramid, list[np.ndarray]]:
    fpn = randomized(FeaturePyramid((2, 3, 4), PyramidConfig(channels=2, **settings), rng=rng), rng)
    return fpn, [rng.normal(size=(2, *map_, C)) for map_, C in zip(BACKBONE_MAPS, (2, 3, 4), strict=True)]


@pytest.mark.parametrize("from_backbone", [True, False], ids=["P6-from-C5", "P6-from-P5"])
def test_pyramid_is_what_its_papers_say(from_backbone, rng):
    """Odd sizes: (5, 7) does not halve to (2, 2), so upsampling must hit any size."""
    fpn, maps = pyramid(rng, extra_from_backbone=from_backbone)
    levels = fpn([Tensor(x) for x in maps])
    lateral, output, extra = (
        [(c.weight.data, c.bias.data) for c in part] for part in (fpn.lateral, fpn.output, fpn.extra)
    )

    inner = [convolution(x, *wb) for x, wb in zip(maps, lateral, strict=True)]
    for i in (1, 0):
        (h, w), (H, W) = inner[i + 1].shape[1:3], inner[i].shape[1:3]
        inner[i] = inner[i] + inner[i + 1][:, np.arange(H) * h // H][:, :, np.arange(W) * w // W]
    want = [convolution(x, *wb, padding=1) for x, wb in zip(inner, output, strict=True)]
    want.append(convolution(maps[-1] if from_backbone else want[-1], *extra[0], stride=2, padding=1))
    want.append(convolution(np.maximum(want[-1], 0), *extra[1], stride=2, padding=1))
    for level, expected in zip(levels, want, strict=True):
        np.testing.assert_allclose(level.data, expected, rtol=1e-10, atol=1e-10)
    assert fpn.maps(BACKBONE_MAPS) == [x.shape[1:3] for x in want]


@each_library
@pytest.mark.parametrize("from_backbone", [True, False], ids=["P6-from-C5", "P6-from-P5"])
def test_gradient_of_the_pyramid(from_backbone, xp, rng):
    fpn, maps = pyramid(rng, extra_from_backbone=from_backbone)
    inputs = [Tensor(xp.asarray(x), requires_grad=True) for x in maps]
    fpn.to(xp)
    cotangent = xp.asarray(rng.normal(size=together(fpn(inputs)).shape))
    assert_slopes_match(lambda: sum(together(fpn(inputs)) * cotangent), [*fpn.parameters(), *inputs], rng)


def test_a_pyramid_without_extra_levels(rng):
    fpn, maps = pyramid(rng, levels=3)
    assert len(fpn([Tensor(x) for x in maps])) == 3 and fpn.extra == []


# --- the heads --------------------------------------------------------------------------------------

MAPS = ((2, 3), (1, 2))


@each_library
@pytest.mark.parametrize("norm", [Norm("none"), Norm("group", groups=2, eps=0.1)], ids=["none", "group"])
def test_gradient_of_a_subnet(norm, xp, rng):
    subnet = randomized(Subnet(2, 2, 1, HeadConfig(depth=1, norm=norm, he_towers=True), rng=rng), rng)
    assert_module_gradients_match(subnet, rng.normal(size=(1, 3, 2)), ((2, 1), (1, 1)), xp=xp, rng=rng)


def test_subnets_share_no_parameters_and_levels_share_all(rng):
    head = RetinaNetHead(4, 3, 2, HeadConfig(depth=2), rng=rng)
    names = [name for name, _ in head.named_parameters()]
    assert len(names) == len(set(map(id, head.parameters()))) == 2 * 2 * 3
    logits, deltas = head(Tensor(rng.normal(size=(2, 8, 4))), MAPS)
    assert logits.shape == (2, 8 * 3, 2) and deltas.shape == (2, 8 * 3, 4)
    one, _ = head(Tensor(np.ones((1, 6, 4))), ((2, 3),))
    both, _ = head(Tensor(np.ones((1, 12, 4))), ((2, 3), (2, 3)))
    np.testing.assert_allclose(both.data, np.concatenate([one.data, one.data], axis=1), rtol=1e-12)


@pytest.mark.parametrize("prior", [0.01, 0.3])
def test_every_anchor_starts_with_the_prior(prior, rng):
    head = RetinaNetHead(4, 9, 3, HeadConfig(prior=prior), rng=rng)
    logits, deltas = head(Tensor(np.zeros((1, 8, 4))), MAPS)
    np.testing.assert_allclose(1 / (1 + np.exp(-logits.data)), prior, rtol=1e-6)
    assert (deltas.data == 0).all()


def test_outputs_stand_in_the_order_of_the_anchors(rng):
    """One bright cell in one level: the rows that answer are those whose anchors stand in that cell."""
    config = tiny(Norm("none"))
    model = RetinaNet(replace(config, head=HeadConfig(depth=0)), xp=numpy)
    height, width, level, row, column = 40, 56, 1, 2, 1
    maps, A, K = model.maps(height, width), config.anchors.per_cell, len(config.classes)
    final = model.head.class_subnet.final
    center = np.zeros((A * K, 3, 3, 8), np.float32)
    center[:, 1, 1, 0] = 1 + np.arange(A * K)  # a number for each anchor and class
    final.weight.data, final.bias.data = center, np.zeros(A * K, np.float32)

    levels = [np.zeros((1, *map_, 8), np.float32) for map_ in maps]
    levels[level][0, row, column, 0] = 1
    model.features = lambda images: [Tensor(x) for x in levels]
    logits, _ = model(Tensor(np.zeros((1, height, width, 3), np.float32)))
    rows = np.flatnonzero(logits.data[0].any(axis=1))
    np.testing.assert_array_equal(logits.data[0, rows].reshape(-1), 1 + np.arange(A * K))

    anchors = model.anchors(height, width)[rows]
    stride = config.anchors.strides[level]
    np.testing.assert_allclose((anchors[:, :2] + anchors[:, 2:]) / 2, A * [[column * stride, row * stride]], atol=1e-5)
    sizes = np.sqrt(np.prod(anchors[:, 2:] - anchors[:, :2], axis=1))
    np.testing.assert_allclose(np.unique(np.round(sizes, 3)), config.anchors.sizes[level], rtol=1e-3)
    before = np.sum(model.level_counts(height, width)[:level])
    assert before <= rows.min() and rows.max() < before + model.level_counts(height, width)[level]


# --- the whole network ------------------------------------------------------------------------------


def tiny(norm: Norm, **changes):
    """A RetinaNet of 7,000 parameters with everything that a large one has."""
    return replace(
        presets.small(("red", "green", "blue")),
        backbone=ResNetConfig(stem=4, widths=(4, 4, 8), blocks=(1, 1, 1), bottleneck=False, norm=norm),
        pyramid=PyramidConfig(channels=8, levels=4),
        head=HeadConfig(depth=1, norm=Norm("group", groups=2), he_towers=True, prior=0.1),
        anchors=AnchorConfig(octaves((16, 32, 64, 128), 1), strides=(8, 16, 32, 64)),
        **changes,
    )


VARIANTS = {
    "frozen-smooth_l1": tiny(Norm("frozen")),
    "batch-giou": tiny(Norm("batch"), loss=LossConfig(box="giou", normaliser="image")),
    "group-l1": tiny(Norm("group", groups=2), loss=LossConfig(box="l1", normaliser="moving", box_weight=2.0)),
    "none-cross-entropy": tiny(Norm("none"), loss=LossConfig(alpha=None, gamma=0.0, beta=1.0)),
}
BOXES = [np.asarray([[4, 4, 20, 18], [20, 10, 50, 34]], np.float64), np.zeros((0, 4))]
LABELS = [np.asarray([0, 2]), np.zeros(0, np.int64)]


def problem(config, xp, rng, dtype=np.float64):
    """A network, and the loss of its answer to two images as a function without arguments."""
    model = RetinaNet(config, seed=1)
    for p in model.parameters():
        p.data = p.data.astype(dtype)
    model.to(xp)
    batch = xp.asarray(rng.normal(size=(2, 40, 56, 3)).astype(dtype))
    targets = build_targets(model.anchors(40, 56), BOXES, LABELS, config.matcher)
    weights, _ = image_weights(config.loss, targets.positives)

    def run() -> Tensor:
        logits, deltas = model(Tensor(batch))
        return loss(logits, deltas, targets, weights, config.loss, config.coder).total

    assert targets.positives[0] > 0
    return model, run


def loss_and_gradients(model, run) -> tuple[float, dict[str, np.ndarray]]:
    model.zero_grad()
    total = run()
    total.backward()
    return float(total), {name: backend.to_numpy(p.grad) for name, p in model.named_parameters()}


def assert_equal(got, want, tolerance: float) -> None:
    (loss_got, gradients_got), (loss_want, gradients_want) = got, want
    np.testing.assert_allclose(loss_got, loss_want, rtol=tolerance)
    assert gradients_got.keys() == gradients_want.keys()
    for name, gradient in gradients_want.items():
        atol = tolerance * np.abs(gradient).max()
        np.testing.assert_allclose(gradients_got[name], gradient, rtol=tolerance, atol=atol, err_msg=name)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_gradient_from_the_loss_to_every_parameter(config, rng):
    model, run = problem(config, numpy, rng)
    assert_slopes_match(run, model.parameters(), rng)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_the_standard_alone_gives_the_same(config):
    """array-api-strict knows no fast kernel and nothing beyond the standard."""
    results = [loss_and_gradients(*problem(config, xp, np.random.default_rng(0))) for xp in (strict, numpy)]
    assert_equal(*results, tolerance=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-9), (np.float32, 1e-3)])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_textbook_kernels_give_the_same(config, dtype, tolerance, rng):
    model, run = problem(config, numpy, rng, dtype)
    fast = loss_and_gradients(model, run)
    with kernels.only("textbook"):
        textbook = loss_and_gradients(model, run)
    assert_equal(fast, textbook, tolerance)


def test_the_textbook_in_float64_is_what_float32_approximates():
    """Float32 with fast kernels stays as close to the truth as float32 can."""
    wide, narrow = (
        loss_and_gradients(*problem(VARIANTS["group-l1"], numpy, np.random.default_rng(0), dtype))
        for dtype in (np.float64, np.float32)
    )
    assert_equal(narrow, wide, tolerance=1e-3)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_one_row_per_anchor_for_any_size(height, width, rng):
    model = RetinaNet(VARIANTS["frozen-smooth_l1"], xp=numpy)
    logits, deltas = model(images(rng, 2, height, width))
    R = len(model.anchors(height, width))
    assert logits.shape == (2, R, 3) and deltas.shape == (2, R, 4)
    assert np.sum(model.level_counts(height, width)) == R
    assert [x.shape[1:3] for x in model.features(images(rng, 1, height, width))] == model.maps(height, width)


def test_images_do_not_see_each_other(rng):
    model, x = RetinaNet(VARIANTS["group-l1"], xp=numpy), images(rng, 3, 32, 32)
    logits, deltas = model(x)
    for n in range(3):
        alone = model(x[n : n + 1])
        np.testing.assert_allclose(alone[0].data[0], logits.data[n], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(alone[1].data[0], deltas.data[n], rtol=1e-9, atol=1e-12)


def test_one_seed_is_one_network_on_every_backend(monkeypatch):
    config = VARIANTS["group-l1"]
    monkeypatch.setenv("MINIDET_BACKEND", "array_api_strict")
    default = RetinaNet(config, seed=3)
    assert default.xp is strict
    state, other = RetinaNet(config, seed=3, xp=numpy).state_dict(), RetinaNet(config, seed=4, xp=numpy).state_dict()
    for name, array in default.state_dict().items():
        np.testing.assert_array_equal(array, state[name])
    assert any((state[name] != array).any() for name, array in other.items())


# --- presets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_build(name, undrawn):
    config = presets.PRESETS[name](["cat", "dog"])
    assert config.classes == ("cat", "dog")
    model = RetinaNet(config, xp=numpy)
    strides = [512 // H for H, _ in model.maps(512, 512)]
    assert strides == [8, 16, 32, 64, 128]
    assert config.anchors.strides in (None, tuple(strides))
    assert len(model.anchors(512, 512)) == 9 * (64**2 + 32**2 + 16**2 + 8**2 + 4**2)


def test_small_presets_answer(rng):
    for preset in (presets.small, presets.resnet18):
        model = RetinaNet(preset(["cell"]), xp=numpy)
        with no_grad():
            logits, deltas = model(Tensor(np.zeros((1, 64, 96, 3), np.float32)))
        assert logits.shape[1] == deltas.shape[1] == len(model.anchors(64, 96))


# --- a backbone of one's own ------------------------------------------------------------------------


class Stairs(Module):
    """A user's backbone: convolutions of stride 2, nothing else.  It follows `minidet.models.Backbone`."""

    def __init__(self, *, rng: np.random.Generator):
        self.channels = (6, 8)
        self.steps = [Conv2d(a, b, 3, stride=2, rng=rng) for a, b in ((3, 4), (4, 4), (4, 6), (6, 8))]

    def __call__(self, images: Tensor) -> list[Tensor]:
        maps = [images]
        for step in self.steps:
            maps.append(relu(step(maps[-1])))
        return maps[3:]  # strides 8 and 16

    def maps(self, height: int, width: int) -> list[tuple[int, int]]:
        return [(-(-height // stride), -(-width // stride)) for stride in (8, 16)]


def test_a_backbone_of_ones_own(rng):
    config = VARIANTS["frozen-smooth_l1"]
    model = RetinaNet(config, backbone=Stairs(rng=rng), xp=numpy)
    x = images(rng, 1, 50, 70)
    logits, deltas = model(x)
    assert logits.shape[1] == len(model.anchors(50, 70))
    assert "backbone.steps.3.weight" in model.state_dict()
    (sum(logits) + sum(deltas)).backward()
    assert all(p.grad is not None for p in model.parameters())


# --- errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNetConfig(widths=(8, 16)), r"2 to 4 stages, as many widths as blocks, got \(8, 16\)"),
        (lambda: ResNetConfig(widths=(8,), blocks=(1,)), "ResNetConfig: needs 2 to 4 stages"),
        (lambda: HeadConfig(prior=0.0), r"HeadConfig\.prior is a probability between 0 and 1, got 0"),
        (lambda: FeaturePyramid((1, 1, 1), PyramidConfig(levels=2), rng=Zeros()), r"levels is 2, the backbone has 3"),
        (lambda: presets.small([]), r"RetinaNetConfig\.classes is empty"),
        (lambda: presets.small(["a", "b", "a", "c", "c"]), r"classes has names more than once: a, c"),
        (
            lambda: replace(presets.small(["a"]), pyramid=PyramidConfig(levels=4)),
            "anchors for 5 levels, but a pyramid of 4",
        ),
    ],
)
def test_impossible_networks_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("shape", [(32, 32, 3), (1, 3, 32, 32), (1, 32, 32, 1)])
def test_images_of_another_layout_are_refused(shape):
    model = RetinaNet(VARIANTS["frozen-smooth_l1"], xp=numpy)
    with pytest.raises(ValueError, match=r"RetinaNet: images must be \(N, H, W, 3\), got \(.*\)"):
        model(Tensor(np.zeros(shape)))
