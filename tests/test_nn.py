"""Layers and modules: their gradients, their names, and what they carry from place to place."""

from __future__ import annotations

import numpy as np
import pytest
from modules import assert_module_gradients_match, randomized
from op_cases.norms import standardized

from minidet import backend, ops
from minidet.autograd import Tensor, checkpoint
from minidet.nn import (
    BatchNorm2d,
    Conv2d,
    ConvNorm,
    FrozenBatchNorm2d,
    GroupNorm,
    Module,
    Norm,
    kaiming_normal_fan_out,
    kaiming_uniform_fan_in,
    normal,
)
from minidet.ops import concat, conv2d, relu, reshape

numpy = backend.load("numpy")
each_library = pytest.mark.parametrize("xp", [numpy, backend.load("array_api_strict")], ids=backend.name_of)
MAPS = ((2, 3), (2, 1), (1, 1))


def conv(rng, **settings) -> Conv2d:
    return Conv2d(2, 4, 3, rng=rng, **settings)


LAYERS = {
    "Conv2d": lambda rng: conv(rng),
    "Conv2d-no-bias": lambda rng: conv(rng, bias=None),
    "Conv2d-stride-groups": lambda rng: conv(rng, stride=2, groups=2),
    "Conv2d-dilation-padding": lambda rng: conv(rng, dilation=2, padding=3),
    "BatchNorm2d": lambda rng: BatchNorm2d(2),
    "BatchNorm2d-eval": lambda rng: BatchNorm2d(2).eval(),
    "FrozenBatchNorm2d": lambda rng: FrozenBatchNorm2d(2),
    "FrozenBatchNorm2d-eps-0": lambda rng: FrozenBatchNorm2d(2, eps=0.0),
    "GroupNorm": lambda rng: GroupNorm(1, 2, eps=0.1),
    "ConvNorm-none": lambda rng: ConvNorm(2, 4, 1, Norm("none"), relu=False, rng=rng),
    "ConvNorm-frozen": lambda rng: ConvNorm(2, 4, 1, Norm("frozen"), relu=False, rng=rng),
    "ConvNorm-frozen-stride": lambda rng: ConvNorm(2, 4, 3, Norm("frozen"), relu=False, stride=2, rng=rng),
    "ConvNorm-batch": lambda rng: ConvNorm(2, 4, 1, Norm("batch", eps=0.1), relu=False, rng=rng),
    "ConvNorm-group": lambda rng: ConvNorm(2, 4, 1, Norm("group", groups=2, eps=0.1), relu=False, rng=rng),
}


@each_library
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_gradient(make, xp, rng):
    assert_module_gradients_match(randomized(make(rng), rng), rng.normal(size=(2, 3, 3, 2)), xp=xp, rng=rng)


@pytest.mark.parametrize("name", [name for name in LAYERS if "-stride" not in name and "-dilation" not in name])
def test_gradient_on_a_pyramid(name, rng):
    x = rng.normal(size=(2, sum(h * w for h, w in MAPS), 2))
    assert_module_gradients_match(randomized(LAYERS[name](rng), rng), x, MAPS, xp=numpy, rng=rng)


@pytest.mark.parametrize("name", ["none", "frozen", "batch", "group"])
def test_gradient_with_the_rectifier(name, rng):
    """Away from the kink: retried until no number that is rectified is close to 0."""
    while True:
        layer = randomized(ConvNorm(2, 4, 1, Norm(name, groups=2), rng=rng), rng)
        x = rng.normal(size=(1, 3, 2, 2))
        layer.relu = False
        smallest = np.abs(layer(Tensor(x)).data).min()
        layer.relu = True
        if smallest > 0.05:
            break
    assert_module_gradients_match(layer, x, xp=numpy, rng=rng)


# --- what the layers compute ------------------------------------------------------------------------


def test_conv_keeps_the_size_unless_told_otherwise(rng):
    x = Tensor(rng.normal(size=(1, 5, 6, 2)))
    assert conv(rng)(x).shape == (1, 5, 6, 4)
    assert conv(rng, stride=2)(x).shape == (1, 3, 3, 4)
    assert conv(rng, padding=0)(x).shape == (1, 3, 4, 4)
    assert (conv(rng, bias=-4.5).bias.data == -4.5).all()


def test_conv_on_levels_is_split_convolve_join(rng):
    layer = randomized(conv(rng), rng)
    x = Tensor(rng.normal(size=(2, 9, 2)))
    parts, start = [], 0
    for H, W in MAPS:
        level = reshape(x[:, start : start + H * W], (2, H, W, 2))
        parts.append(reshape(conv2d(level, layer.weight, layer.bias, padding=1), (2, H * W, 4)))
        start += H * W
    np.testing.assert_allclose(layer(x, MAPS).data, concat(parts, axis=1).data, rtol=1e-12, atol=1e-12)


def test_batch_norm_normalizes_with_the_batch_and_remembers(rng):
    layer = BatchNorm2d(3, momentum=0.1)
    mean, variance = np.zeros(3), np.ones(3)
    for _ in range(3):
        x = rng.normal(2, 3, size=(2, 4, 5, 3))
        np.testing.assert_allclose(layer(Tensor(x)).data, standardized(x, (0, 1, 2), 1e-5), rtol=1e-10, atol=1e-10)
        mean = 0.9 * mean + 0.1 * x.mean(axis=(0, 1, 2))
        variance = 0.9 * variance + 0.1 * x.var(axis=(0, 1, 2), ddof=1)
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-6)
    np.testing.assert_allclose(layer.running_var, variance, rtol=1e-6)
    assert layer.running_mean.dtype == layer.running_var.dtype == np.float32


def test_batch_norm_uses_what_it_remembers_when_not_training(rng):
    layer = randomized(BatchNorm2d(3, eps=0.1), rng).eval()
    before, x = layer.state_dict(), rng.normal(size=(1, 2, 2, 3))
    want = layer.weight.data * (x - layer.running_mean) / np.sqrt(layer.running_var + 0.1) + layer.bias.data
    np.testing.assert_allclose(layer(Tensor(x)).data, want, rtol=1e-12)
    assert all((before[name] == array).all() for name, array in layer.state_dict().items())


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.1])
def test_frozen_batch_norm_is_batch_norm_with_constants(eps, rng):
    frozen, batch = FrozenBatchNorm2d(3, eps=eps), BatchNorm2d(3, eps=eps).eval()
    state = randomized(batch, rng).state_dict()
    randomized(frozen, rng).load_state_dict(state)
    x = Tensor(rng.normal(size=(2, 2, 2, 3)))
    np.testing.assert_allclose(frozen(x).data, batch(x).data, rtol=1e-12)
    assert frozen.parameters() == [] and frozen.state_dict().keys() == state.keys()


def test_batch_norm_under_checkpoint_moves_its_statistics_once(rng):
    """`checkpoint` runs everything twice: under no_grad, and again for the backward pass."""
    once, twice = BatchNorm2d(3), BatchNorm2d(3)
    x = rng.normal(2, 3, size=(2, 4, 5, 3))
    ops.sum(once(Tensor(x, requires_grad=True))).backward()
    loss = ops.sum(checkpoint(twice, Tensor(x, requires_grad=True)))
    assert (twice.running_mean == 0).all()
    loss.backward()
    assert (once.running_mean != 0).all()
    for name, array in once.state_dict().items():
        np.testing.assert_array_equal(twice.state_dict()[name], array)


def test_a_batch_norm_that_is_frozen_stands_still(rng):
    layer = randomized(BatchNorm2d(3), rng)
    x = Tensor(rng.normal(2, 3, size=(1, 2, 2, 3)))
    before, want = layer.state_dict(), layer.eval()(x).data
    assert layer.train().freeze() is layer
    np.testing.assert_array_equal(layer(x).data, want)
    assert all((before[name] == array).all() for name, array in layer.state_dict().items())


def test_frozen_batch_norm_of_float64_activations_is_computed_in_float64(rng):
    layer = FrozenBatchNorm2d(3)
    layer.running_var = rng.uniform(0.5, 2, 3).astype(np.float32)
    x = rng.normal(size=(1, 1, 1, 3))
    want = x / np.sqrt(layer.running_var.astype(np.float64) + 1e-5)
    np.testing.assert_allclose(layer(Tensor(x)).data, want, rtol=1e-14)


def test_group_norm_has_no_memory(rng):
    layer = GroupNorm(2, 4, eps=0.0)
    y = layer(Tensor(5 + 3 * rng.normal(size=(2, 3, 3, 4)))).data.reshape(2, 9, 2, 2)
    np.testing.assert_allclose(y.mean(axis=(1, 3)), 0, atol=1e-12)
    np.testing.assert_allclose(y.var(axis=(1, 3)), 1, rtol=1e-12)
    assert list(layer.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("rectified", [True, False])
@pytest.mark.parametrize("name", ["none", "frozen", "batch", "group"])
@pytest.mark.parametrize("maps", [None, MAPS], ids=["map", "pyramid"])
def test_fused_equals_unfused(name, rectified, maps, rng):
    layer = randomized(ConvNorm(2, 4, 3, Norm(name, groups=2), relu=rectified, rng=rng), rng)
    x = Tensor(rng.normal(size=(2, 3, 3, 2) if maps is None else (2, 9, 2)))
    y = layer.conv(x, maps)
    y = y if layer.norm is None else layer.norm(y, maps)
    shortcut = Tensor(rng.normal(size=y.shape))
    for more in (None, shortcut):
        want = y if more is None else y + more
        want = relu(want) if rectified else want
        np.testing.assert_allclose(layer(x, maps, shortcut=more).data, want.data, rtol=1e-12, atol=1e-12)


def test_a_norm_makes_a_bias_needless(rng):
    layers = {name: ConvNorm(2, 4, 1, Norm(name, groups=2), rng=rng) for name in ("none", "frozen", "batch", "group")}
    assert {name: layer.conv.bias is not None for name, layer in layers.items()} == {
        "none": True, "frozen": False, "batch": False, "group": False
    }  # fmt: skip


def test_norm_passes_its_settings_on():
    batch = Norm("batch", eps=0.25, momentum=0.5).layer(4)
    assert (batch.eps, batch.momentum) == (0.25, 0.5)
    group = Norm("group", groups=2, eps=0.25).layer(4)
    assert (group.groups, group.eps) == (2, 0.25)
    assert Norm("frozen", eps=0.0).layer(4).eps == 0.0
    assert Norm("none").layer(4) is None


# --- first weights ----------------------------------------------------------------------------------


def test_initializers_have_the_variance_they_promise(rng):
    shape = (64, 3, 3, 32)
    for draw, variance in (
        (normal(0.01), 0.01**2),
        (kaiming_normal_fan_out, 2 / (64 * 9)),
        (kaiming_uniform_fan_in, 1 / (9 * 32)),
    ):
        values = draw(rng, shape)
        assert values.shape == shape and values.dtype == np.float32
        np.testing.assert_allclose(values.var(dtype=np.float64), variance, rtol=0.03)
        assert abs(values.mean(dtype=np.float64)) < 4 * np.sqrt(variance / values.size)
    bound = np.sqrt(3 / (9 * 32))
    assert 0.99 * bound < np.abs(kaiming_uniform_fan_in(rng, shape)).max() <= bound * (1 + 1e-6)


# --- the module -------------------------------------------------------------------------------------


class Leaf(Module):
    def __init__(self, size: int):
        self.weight = Tensor(np.ones(size, np.float32), requires_grad=True)
        self.seen = np.zeros(size, np.float32)
        self.training = True


class Tree(Module):
    """Parameters, buffers and modules in every place where a module may keep them."""

    def __init__(self):
        self.scale = Tensor(np.full(1, 2, np.float32), requires_grad=True)
        self.fixed = Tensor(np.zeros(2, np.float32))
        self.first = Leaf(1)
        self.many = [Leaf(2), Leaf(3)]
        self.pair = (Leaf(4), "a word")
        self.name, self.nothing, self.numbers = "tree", None, [1, 2]


NAMES = [
    "scale", "fixed", "first.weight", "many.0.weight", "many.1.weight", "pair.0.weight",
    "first.seen", "many.0.seen", "many.1.seen", "pair.0.seen",
]  # fmt: skip


def test_the_path_of_attributes_is_the_name():
    tree = Tree()
    assert [name for name, _ in tree.named_parameters()] == NAMES[:6]
    assert [name for name, _ in tree.named_buffers()] == NAMES[6:]
    assert [name for name, _ in tree.named_modules()] == ["", "first", "many.0", "many.1", "pair.0"]
    assert list(tree.state_dict()) == NAMES
    assert tree.parameters()[2] is tree.first.weight


def test_dicts_and_nested_lists_are_walked():
    tree = Module()
    tree.levels = {"p3": [Leaf(1), {"deep": Leaf(2)}], "p4": Tensor(np.zeros(3, np.float32))}
    tree.moments = [np.zeros(4, np.float32)]
    names = ["levels.p3.0.weight", "levels.p3.1.deep.weight", "levels.p4"]
    assert sorted(name for name, _ in tree.named_parameters()) == names
    state = {name: np.full_like(array, 7) for name, array in tree.state_dict().items()}
    assert set(state) - set(names) == {"moments.0", "levels.p3.0.seen", "levels.p3.1.deep.seen"}
    tree.load_state_dict(state)
    assert all((array == 7).all() for array in tree.state_dict().values())
    assert tree.moments[0].tolist() == [7] * 4 and tree.levels["p3"][1]["deep"].weight.data.tolist() == [7] * 2


def test_what_cannot_be_walked_is_refused():
    tree = Module()
    tree.parts = {Leaf(1), Leaf(2)}
    with pytest.raises(TypeError, match=r"Module: parts is a set of modules or tensors, .* use a list or a dict"):
        tree.parameters()
    tree.parts = [(np.zeros(2),)]
    with pytest.raises(TypeError, match=r"Module: parts\.0\.0 is an array in a tuple, .* use a list"):
        tree.state_dict()


def test_a_shared_parameter_comes_once_under_its_first_name():
    tree = Tree()
    tree.pair[0].weight = tree.first.weight
    assert [name for name, _ in tree.named_parameters()] == [name for name in NAMES[:6] if name != "pair.0.weight"]
    assert tree.load_state_dict(tree.state_dict()) == []


def test_freeze_and_zero_grad():
    tree = Tree()
    assert tree.first.freeze() is tree.first
    assert [p.requires_grad for p in tree.parameters()] == [True, False, False, True, True, True]
    tree.scale.grad = np.ones(1)
    tree.zero_grad()
    assert all(p.grad is None for p in tree.parameters())


def test_train_and_eval_reach_every_module():
    tree = Tree()
    leaves = [tree.first, *tree.many, tree.pair[0]]
    assert tree.eval() is tree
    assert not any(leaf.training for leaf in leaves)
    assert tree.train() is tree
    assert all(leaf.training for leaf in leaves)
    assert not hasattr(tree, "training")  # only where it makes a difference


@each_library
def test_to_moves_everything(xp):
    tree = Tree()
    tree.scale.grad = np.ones(1, np.float32)
    tree.scale.memo["packed"] = 1
    assert tree.to(xp) is tree
    assert tree.xp is xp
    arrays = [p.data for p in tree.parameters()] + [b for _, b in tree.named_buffers()]
    assert {backend.library(array) for array in arrays} == {backend.name_of(xp)}
    assert {str(backend.to_numpy(array).dtype) for array in arrays} == {"float32"}
    assert tree.scale.grad is None and tree.scale.memo == {}
    assert list(tree.state_dict()) == NAMES


def test_state_dict_round_trip(rng):
    one, other = randomized(Tree(), rng), Tree()
    state = one.state_dict()
    assert other.load_state_dict(state) == []
    for name, array in other.state_dict().items():
        np.testing.assert_array_equal(array, state[name].astype(np.float32))  # in the dtype it already had
        assert array.dtype == np.float32


def test_state_dict_is_a_copy(rng):
    tree = Tree()
    state = tree.state_dict()
    state["scale"][:] = 99
    assert tree.scale.data.tolist() == [2]
    tree.load_state_dict(state)
    state["scale"][:] = 5
    assert tree.scale.data.tolist() == [99]


@each_library
def test_load_forgets_what_was_derived_from_the_old_values(xp):
    tree = Tree().to(xp)
    tree.scale.memo["packed"] = 1
    parameter = tree.scale
    tree.load_state_dict(Tree().state_dict())
    assert tree.scale is parameter and parameter.memo == {}
    assert backend.library(parameter.data) == backend.name_of(xp)
    assert backend.library(tree.first.seen) == backend.name_of(xp)


def spoiled_state() -> dict[str, np.ndarray]:
    state = Tree().state_dict()
    state["many.0.weights"] = state.pop("many.0.weight")
    state["scale"] = np.zeros((1, 1))
    return state


def test_a_state_dict_that_does_not_fit_is_refused_name_by_name():
    tree = Tree()
    with pytest.raises(ValueError, match="the state dict does not fit: 3 of 11 names differ") as error:
        tree.load_state_dict(spoiled_state())
    assert str(error.value).splitlines()[1:] == [
        "  many.0.weight: missing (did the file call it many.0.weights?)",
        "  many.0.weights: unexpected, shape (2,)",
        "  scale: has shape (1, 1), the model needs (1,)",
    ]
    assert tree.scale.data.tolist() == [2]  # nothing was loaded


def test_a_long_difference_is_cut():
    with pytest.raises(ValueError, match=r"30 of 30 names differ(\n.*){20}\n  \.\.\. and 10 more"):
        Tree().load_state_dict({f"other.{i}": np.zeros(1) for i in range(20)})


def test_what_fits_is_loaded_where_that_is_wanted():
    tree, state = Tree(), spoiled_state()
    state["first.weight"] = np.full(1, 7)
    assert tree.load_state_dict(state, strict=False) == ["many.0.weight", "many.0.weights", "scale"]
    assert tree.first.weight.data.tolist() == [7]
    assert tree.scale.data.tolist() == [2]


# --- errors -----------------------------------------------------------------------------------------


def test_groups_must_divide(rng):
    with pytest.raises(ValueError, match="Conv2d: 2 groups do not divide 3 channels and 4 filters"):
        Conv2d(3, 4, 3, groups=2, rng=rng)
    with pytest.raises(ValueError, match="GroupNorm: 3 groups do not divide 4 channels"):
        GroupNorm(3, 4)


@pytest.mark.parametrize("setting", ["stride=2", "padding=0", "dilation=2", "groups=2"])
def test_a_convolution_that_changes_the_size_is_not_for_pyramids(setting, rng):
    name, _, value = setting.partition("=")
    layer = conv(rng, **{name: int(value)})
    with pytest.raises(ValueError, match=f"Conv2d: on a pyramid it keeps every level's size, .*{setting}"):
        layer(Tensor(np.zeros((1, 9, 2))), MAPS)


def test_an_unknown_norm_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"Norm\.name is 'layer': choose \"none\", \"frozen\", \"batch\" or \"group\""):
        Norm("layer")


def test_a_single_value_has_no_variance():
    with pytest.raises(ValueError, match="batch_norm: needs more than one value per channel in training"):
        BatchNorm2d(2)(Tensor(np.zeros((1, 1, 1, 2))))
