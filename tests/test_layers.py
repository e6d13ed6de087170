"""The table of layers: sizes, receptive fields and costs, by hand and as published."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from minidet import backend
from minidet.autograd import Tensor, checkpoint
from minidet.inspection.layers import layer_table, measure_layers
from minidet.models import RESNET18, RESNET50, RESNET101, ResNet, RetinaNet, presets
from minidet.nn import BatchNorm2d, Conv2d, Module
from minidet.ops import concat, conv2d, conv2d_levels, matmul, max_pool2d, relu, reshape, upsample_nearest


class Model(Module):
    """A network of the ops in `run(self, images)`, with the parts given by name."""

    def __init__(self, run, **parts):
        self.run = run
        vars(self).update(parts)

    def __call__(self, images: Tensor) -> Tensor:
        return self.run(self, images)


def conv(rng, channels=3, filters=4, size=3, **settings) -> Conv2d:
    return Conv2d(channels, filters, size, rng=rng, **settings)


def test_a_table_by_hand(rng):
    def run(self, x):
        x = relu(self.norm(self.first(x)))
        return self.second(max_pool2d(x, 2))

    frozen = conv(rng, 4, 2, 1).freeze()
    model = Model(run, first=conv(rng, stride=2, bias=None), norm=BatchNorm2d(4), second=frozen)
    assert layer_table(model, (128, 64)).splitlines() == [
        "layer              op          output          stride  field  parameters  MFLOPs    KiB",
        "first              conv2d      (1, 64, 32, 4)       2      3         108     0.4   32.0",
        "norm               batch_norm  (1, 64, 32, 4)       2      3           8           32.0",
        "second             conv2d      (1, 32, 16, 2)       4      5          10     0.0    4.0",
        "everything else                                                                    40.0",
        "all, for 128 x 64                                                    126     0.5  108.0",
        "10 of the parameters are frozen",
    ]
    first, _, second, rest = measure_layers(model, (128, 64))
    assert first.flops == 2 * (64 * 32 * 4) * (3 * 3 * 3)  # every output sums a 3x3x3 window
    assert second.flops == 2 * (32 * 16 * 2) * 4
    assert rest.memory == 4 * (64 * 32 * 4 + 32 * 16 * 4)  # relu and pooling


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (RESNET18, 435),
        (RESNET50, 427),
        (replace(RESNET50, stride_in_1x1=True), 483),
        (replace(RESNET101, stride_in_1x1=True), 1027),
    ],
    ids=["18", "50", "50-stride-in-1x1", "101-stride-in-1x1"],
)
def test_receptive_fields_of_resnets(config, field, rng):
    """483 and 1027: Araujo et al., Computing Receptive Fields of Convolutional Neural Networks, Distill, 2019."""
    thin = ResNet(replace(config, stem=4, widths=(4, 4, 4, 4)), rng=rng)
    *_, last, _ = measure_layers(thin, (64, 64))
    assert last.sights[0].stride == (32, 32)
    assert last.sights[0].field == (field, field)


def seen_by_the_middle(f, size: int) -> tuple[int, int]:
    """Height and width of the input pixels that the middle output depends on: those that have a gradient."""
    x = Tensor(np.ones((1, size, size, 1)), requires_grad=True)
    y = f(x)
    cotangent = np.zeros(y.shape)
    cotangent[0, y.shape[1] // 2, y.shape[2] // 2] = 1
    y.backward(cotangent)
    rows, columns = np.nonzero(x.grad[0, :, :, 0])
    return tuple(int(axis.max() - axis.min()) + 1 for axis in (rows, columns))


def chain(self, x):
    """Convolutions of all kinds, with positive weights, so that no influence cancels."""
    x = conv2d(x, self.tall, stride=(2, 1), padding=(2, 0), dilation=(1, 2))
    return conv2d(conv2d(x, self.square, padding=1), self.square, stride=2, dilation=2)


def test_the_receptive_field_is_what_has_a_gradient():
    weights = {name: Tensor(np.ones((1, *size, 1)), requires_grad=True) for name, size in
               (("tall", (5, 2)), ("square", (3, 3)))}  # fmt: skip
    model = Model(chain, **weights)
    pictured = Model(lambda self, images: model(images[..., :1]), model=model)
    *_, last, _ = measure_layers(pictured, (41, 41))
    assert last.name == "model"  # whose own parameter it is
    assert last.sights[0].field == seen_by_the_middle(model, 41) == (17, 9)
    assert last.sights[0].stride == (4, 2)
    assert "  4x2   17x9  " in layer_table(pictured, (41, 41))


def test_branches_meet_and_levels_stand_in_a_row(rng):
    def run(self, x):
        fine, coarse = self.fine(x), self.coarse(x)  # 7x9, and 4x5 of stride 2
        fine = fine + upsample_nearest(self.lateral(coarse), fine.shape[1:3])
        maps = fine.shape[1:3], coarse.shape[1:3]
        x = concat([reshape(level, (1, -1, 4)) for level in (fine, coarse)], axis=1)
        return conv2d_levels(x, maps, self.shared)

    model = Model(
        run,
        fine=conv(rng, size=1),
        coarse=conv(rng, size=5, stride=2),
        lateral=conv(rng, 4, size=3),
        shared=Tensor(rng.normal(size=(4, 3, 3, 4)).astype(np.float32), requires_grad=True),
    )
    fine, coarse, lateral, shared, _ = measure_layers(model, (7, 9))
    assert [layer.sights[0].field for layer in (fine, coarse, lateral)] == [(1, 1), (5, 5), (9, 9)]
    assert [sight.stride for sight in shared.sights] == [(1, 1), (2, 2)]
    assert [sight.field for sight in shared.sights] == [(11, 11), (9, 9)]
    assert shared.flops == 2 * (7 * 9 + 4 * 5) * 4 * (9 * 4)
    assert "  1-2   9-11  " in layer_table(model, (7, 9))


def test_a_layer_that_runs_again_has_no_parameters_of_its_own(rng):
    model = Model(lambda self, x: self.again(self.again(x)), again=conv(rng, filters=3))
    first, second, _ = measure_layers(model, (8, 8))
    assert (first.parameters, second.parameters) == (84, 0)
    assert second.flops == first.flops > 0
    assert layer_table(model, (8, 8)).splitlines()[2].split()[-3:] == ["5", "0.0", "0.8"]


def test_matrix_products_and_ops_of_the_model_itself_count(rng):
    def run(self, x):
        pixels = reshape(x, (-1, 3))
        return checkpoint(lambda rows: matmul(rows, self.mix), pixels)

    mix = Tensor(np.zeros((3, 5), np.float32), requires_grad=True)
    layer, rest = measure_layers(Model(run, mix=mix), (4, 6))
    assert (layer.name, layer.op, layer.shape) == ("mix", "matmul", (24, 5))
    assert layer.flops == 2 * 24 * 5 * 3
    assert rest.memory == 0  # a reshape is another view of the same numbers


def test_what_does_not_come_from_the_image_sees_nothing_of_it():
    prior = Tensor(np.ones((1, 4, 4, 3), np.float32), requires_grad=True)
    layer, _ = measure_layers(Model(lambda self, x: x + relu(self.prior), prior=prior), (4, 4))
    assert (layer.name, layer.op, layer.sights, layer.parameters) == ("prior", "relu", (), 48)


def test_looking_changes_nothing(rng):
    model = RetinaNet(presets.small(["a"]), xp=np)
    model.backbone.stem.norm = BatchNorm2d(16)
    model.backbone.stages[1].blocks[0].conv1.norm = BatchNorm2d(32).eval()
    before = model.state_dict()
    table = layer_table(model, (64, 96))
    assert model.backbone.stem.norm.training
    assert not model.backbone.stages[1].blocks[0].conv1.norm.training
    assert all((before[name] == array).all() for name, array in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    count = np.sum([p.data.size for p in model.parameters()])
    assert f"{count:,}" in table.splitlines()[-1]


def test_it_looks_at_other_libraries_too():
    config = presets.small(["a"])
    tables = [layer_table(RetinaNet(config, xp=backend.load(name)), (32, 32)) for name in ("numpy", "array_api_strict")]
    assert tables[0] == tables[1]


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "count"), [(presets.torchvision_v1, 151.54), (presets.torchvision_v2, 152.238)])
def test_multiply_adds_of_torchvisions_networks(preset, count, undrawn):
    """As published with their weights; for 800 x 800 pixels."""
    model = RetinaNet(preset([str(k) for k in range(91)]), xp=np)
    flops = np.sum([layer.flops for layer in measure_layers(model, (800, 800))])
    assert round(flops / 2e9, 2) == round(count, 2)
