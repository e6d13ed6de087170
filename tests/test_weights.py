"""Foreign weights: names there and back, values that mean the same, and what is said when they do not fit."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from minidet.autograd import Tensor, no_grad
from minidet.models import RESNET18, RetinaNet, RetinaNetConfig, presets
from minidet.nn import Norm
from minidet.training.checkpoint import Checkpoint, write_checkpoint
from minidet.weights import WeightsError, from_detectron2, from_torchvision, load_initial, to_torchvision
from minidet.weights.folding import adapt_pixels

KEYS = Path(__file__).parent / "reference" / "vectors"
THIN = {"stem": 4, "widths": (2, 2, 4, 4)}


def keys(name: str) -> dict:
    return json.loads((KEYS / f"keys_{name}.json").read_text())


def zeros(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Arrays of these shapes that take no memory."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def small(norm: str, **backbone) -> RetinaNetConfig:
    """A network with thin stages, as a quick stand-in for the large ones."""
    config = presets.small(["cat", "dog"])
    return replace(config, backbone=replace(RESNET18, blocks=(1, 1, 1, 1), norm=Norm(norm), **THIN, **backbone))


def resnet(model: RetinaNet, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random weights for the backbone of `model` as torchvision saves a classifier's, batch norm and all."""
    state = {n: a for n, a in model.state_dict().items() if n.startswith("backbone.")}
    state = {name: rng.uniform(0.5, 1.5, array.shape).astype(np.float32) for name, array in state.items()}
    theirs = {name.removeprefix("backbone.body."): array for name, array in to_torchvision(state).items()}
    return theirs | {"fc.weight": np.zeros((10, 4), np.float32), "bn1.num_batches_tracked": np.array(3)}


def maps(model: RetinaNet) -> list[np.ndarray]:
    images = np.random.default_rng(7).normal(size=(1, 64, 64, 3)).astype(np.float32)
    with no_grad():
        return [level.data for level in model.backbone(Tensor(images))]


@pytest.mark.parametrize(
    ("preset", "classes", "translate", "names", "tables"),
    [
        ("torchvision_v1", 91, from_torchvision, "retinanet_resnet50_fpn", ("current", "legacy")),
        ("torchvision_v2", 91, from_torchvision, "retinanet_resnet50_fpn_v2", ("current",)),
        ("detectron2", 80, from_detectron2, "detectron2_retinanet_R_50_FPN", ("keys",)),
    ],
)
def test_every_tensor_of_the_published_models_has_its_place(preset, classes, translate, names, tables, undrawn):
    model = RetinaNet(getattr(presets, preset)([str(i) for i in range(classes)]), xp=np)
    needed = {name: array.shape for name, array in model.state_dict().items()}
    for table in tables:
        assert {name: array.shape for name, array in translate(zeros(keys(names)[table])).items()} == needed


def test_legacy_names_mean_what_the_table_says():
    pairs = keys("retinanet_resnet50_fpn")["legacy_to_current"]
    for legacy, current in pairs.items():
        value = np.zeros(1)
        assert list(from_torchvision({legacy: value})) == list(from_torchvision({current: value})), legacy


def test_detectron2_and_torchvision_agree_on_what_is_what():
    for name, torchvision in keys("detectron2_retinanet_R_50_FPN")["to_torchvision"].items():
        value = np.zeros(1)
        ours = from_torchvision({torchvision: value})
        assert ours.keys() <= from_detectron2({name: value}).keys(), name


def test_a_model_survives_the_way_there_and_back():
    model = RetinaNet(small("batch"), xp=np)
    state = model.state_dict()
    back = from_torchvision(to_torchvision(state))
    assert back.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].flags.c_contiguous, name


def test_filters_are_transposed_and_nothing_else():
    weight = np.arange(2 * 3 * 7 * 5, dtype=np.float32).reshape(2, 3, 7, 5)
    ours = from_torchvision({"conv1.weight": weight, "bn1.bias": weight[:, 0, 0, 0]})
    assert ours["backbone.stem.conv.weight"][1, 4, 2, 0] == weight[1, 0, 4, 2]
    np.testing.assert_array_equal(ours["backbone.stem.norm.bias"], weight[:, 0, 0, 0])


def test_counts_of_batches_and_a_classifier_are_left_behind():
    given = {"conv1.weight": np.zeros((1, 3, 7, 7)), "bn1.num_batches_tracked": np.array(1), "fc.bias": np.zeros(2)}
    assert list(from_torchvision(given)) == ["backbone.stem.conv.weight"]


def test_an_unknown_name_is_kept_for_the_model_to_refuse():
    state = from_torchvision({"backbone.body.conv9.weight": np.zeros(1)})
    with pytest.raises(ValueError, match=r"backbone\.body\.conv9\.weight: unexpected"):
        RetinaNet(small("frozen"), xp=np).load_state_dict(state)


def test_old_detectron2_files():
    """Constants that configurations hold are dropped; a norm without statistics has mean 0 and variance 1."""
    norm = "backbone.bottom_up.stem.conv1.norm"
    derived = {"pixel_mean": np.zeros(3), "anchor_generator.cell_anchors.0": np.zeros(4)}
    state = from_detectron2({f"{norm}.weight": np.full(2, 3.0)} | derived)
    assert sorted(state) == [f"backbone.stem.norm.{leaf}" for leaf in ("running_mean", "running_var", "weight")]
    np.testing.assert_array_equal(state["backbone.stem.norm.running_mean"], [0, 0])
    np.testing.assert_array_equal(state["backbone.stem.norm.running_var"], [1, 1])


# Starting from a file.


def test_imagenet_weights_give_torchs_feature_maps(data_folder):
    folder = data_folder("weights")
    model = RetinaNet(presets.resnet18(["cell"]), xp=np)
    done = load_initial(model, folder / "resnet18_imagenet_to_layer3.npz")
    assert (len(done.loaded), done.skipped, done.layout) == (30, {}, "torchvision ResNet")
    assert all(name.startswith(("pyramid.", "head.")) for name in done.untouched)
    with np.load(folder / "resnet18_reference.npz") as reference:
        rule = replace(model.config.preprocess, min_size=0)
        with no_grad():
            found = model.backbone(Tensor(rule.prepare(reference["image_uint8_hwc"])[None]))
        for level, name in zip(found, ("C3", "C4"), strict=True):
            np.testing.assert_allclose(np.moveaxis(level.data, -1, 1), reference[name], atol=1e-4)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_backbone_alone_from_either_kind_of_file(suffix, tmp_path, rng):
    source, model = (RetinaNet(small("frozen"), seed=seed, xp=np) for seed in (1, 2))
    state = resnet(source, rng)
    path = tmp_path / f"resnet{suffix}"
    np.savez(path, **state) if suffix == ".npz" else save_file(state, path)
    done = load_initial(model, path)
    assert set(done.loaded) == {name for name in model.state_dict() if name.startswith("backbone.")}
    table = done.table()
    assert f"resnet{suffix} (torchvision ResNet): {len(done.loaded)} tensors loaded" in table
    assert "head          0 of" in table and "starts anew" in table


def test_batch_norm_is_folded_where_the_model_has_none(tmp_path, rng):
    with_norm, without = RetinaNet(small("frozen"), xp=np), RetinaNet(small("none"), xp=np)
    np.savez(tmp_path / "resnet.npz", **resnet(with_norm, rng))
    load_initial(with_norm, tmp_path / "resnet.npz")
    done = load_initial(without, tmp_path / "resnet.npz")
    assert not done.skipped
    for one, other in zip(maps(with_norm), maps(without), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(one).max())


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_folded_weights_are_unfolded_where_the_model_has_frozen_norms(eps, tmp_path):
    source = RetinaNet(small("none"), xp=np)
    for parameter in source.parameters():
        if parameter.ndim == 1:
            parameter.data = np.linspace(-1, 1, len(parameter), dtype=np.float32)
    theirs = to_torchvision({n: a for n, a in source.state_dict().items() if n.startswith("backbone.")})
    np.savez(tmp_path / "folded.npz", **{n.removeprefix("backbone.body."): a for n, a in theirs.items()})
    config = small("frozen")
    config = replace(config, backbone=replace(config.backbone, norm=Norm("frozen", eps=eps)))
    model = RetinaNet(config, seed=5, xp=np)
    assert not load_initial(model, tmp_path / "folded.npz").skipped
    for one, other in zip(maps(source), maps(model), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(one).max())


def test_our_own_weights_and_checkpoints(tmp_path):
    """Another number of classes: everything but the last layer of the class subnet carries over."""
    source = RetinaNet(presets.small(["cat", "dog", "owl"]), seed=1, xp=np)
    np.savez(tmp_path / "state.npz", **source.state_dict())
    write_checkpoint(
        tmp_path / "last.safetensors",
        Checkpoint({}, ("cat", "dog", "owl"), (1, 2, 3), source.state_dict(), {"step.x": np.array(1)}),
    )
    shapes, others = "has shape (27,), the model needs (9,)", "its 3 classes are others than the model's 1"
    for name, layout, reason in (
        ("state.npz", "minidet", shapes), ("last.safetensors", "minidet checkpoint", others)
    ):  # fmt: skip
        model = RetinaNet(presets.small(["cell"]), seed=2, xp=np)
        done = load_initial(model, tmp_path / name)
        assert done.layout == layout
        assert done.untouched == ("head.class_subnet.final.weight", "head.class_subnet.final.bias")
        assert done.skipped["head.class_subnet.final.bias"] == reason
        assert f"skipped head.class_subnet.final.bias: {reason}" in done.table()
        np.testing.assert_array_equal(
            model.pyramid.lateral[0].weight.data, source.pyramid.lateral[0].weight.data
        )


def test_loading_changes_the_output_at_once(tmp_path, rng):
    """What was derived from the old weights is forgotten."""
    source, model = (RetinaNet(small("none"), seed=seed, xp=np) for seed in (1, 2))
    before = maps(model)[0]
    np.savez(tmp_path / "state.npz", **source.state_dict())
    load_initial(model, tmp_path / "state.npz")
    assert not np.array_equal(maps(model)[0], before)
    np.testing.assert_array_equal(maps(model)[0], maps(source)[0])


def test_the_table_stays_short(tmp_path):
    model = RetinaNet(small("none"), xp=np)
    extra = {f"unknown.{i}": np.zeros(1, np.float32) for i in range(50)}
    np.savez(tmp_path / "state.npz", **(model.state_dict() | extra))
    table = load_initial(model, tmp_path / "state.npz").table()
    assert "  skipped unknown.0: the model has no such tensor" in table
    assert table.endswith("... and 30 more skipped")


def test_integers_are_no_weights(tmp_path):
    model = RetinaNet(small("none"), xp=np)
    state = model.state_dict()
    state["pyramid.lateral.0.bias"] = np.zeros(state["pyramid.lateral.0.bias"].shape, np.int64)
    np.savez(tmp_path / "state.npz", **state)
    assert "has type int64" in load_initial(model, tmp_path / "state.npz").skipped["pyramid.lateral.0.bias"]


def test_first_filters_follow_the_pixels():
    """BGR bytes of a model zoo's, RGB in 0..1 of torchvision's: other filters, the same sums."""
    image = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    rules = [replace(preset(["cat"]).preprocess, min_size=0) for preset in (presets.detectron2, presets.torchvision_v1)]
    filters = np.random.default_rng(1).normal(size=(2, 9, 9, 3)).astype(np.float32)
    for theirs, ours in (rules, rules[::-1]):
        adapted = adapt_pixels(filters, theirs, ours)
        want, found = (np.sum(f * rule.prepare(image), (1, 2, 3)) for f, rule in ((filters, theirs), (adapted, ours)))
        np.testing.assert_allclose(found, want, rtol=1e-4)
        assert adapt_pixels(filters, theirs, theirs) is filters
    with pytest.raises(ValueError, match=r"pixels that become zero are \[123\.675 .* there and \[127\.5 127\.5"):
        adapt_pixels(filters, rules[0], replace(rules[1], mean=(0.5, 0.5, 0.5)))


CONV = np.zeros((3, 3, 7, 7), np.float32)


class Anything:
    """Something that only a pickle can hold."""


def archive(**arrays) -> bytes:
    """An .npz file of these arrays."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def one_byte_wrong() -> bytes:
    content = bytearray(archive(**{"conv1.weight": CONV}))
    content[400] ^= 0xFF
    return bytes(content)


REFUSED = {
    "text.npz": (b"not an archive", r"text\.npz: no \.pth, .* or a damaged one: it begins with b'not an archive'"),
    "cut.npz": (archive(**{"conv1.weight": CONV})[:300], r"cut\.npz: a truncated zip archive"),
    "wrong.npz": (one_byte_wrong(), r"wrong\.npz: damaged: "),
    "pickle.npz": (
        archive(**{"conv1.weight": np.array([Anything()], dtype=object)}),
        r"pickle\.npz: holds pickled objects, which can run any program; save plain arrays with numpy\.savez",
    ),
    "broken.safetensors": (b"\x10" + bytes(7) + b"{not json at all", r"broken\.safetensors: damaged or truncated: "),
    "model.pth": (b"PK", r"model\.pth: no \.pth, .* it begins with b'PK'"),
    "empty.npz": (archive(), r"empty\.npz: names of no known system \(first: none\)"),
    "vgg.npz": (
        archive(**{"features.0.weight": CONV}),
        r"names of no known system \(first: features\.0\.weight\); known are detectron2 RetinaNet, torchvision",
    ),
    "wide.npz": (
        archive(**{"conv1.weight": CONV}),
        r"none of its 1 tensors fits this model; choose the preset it was made for\n"
        r"  backbone\.stem\.conv\.weight: has shape \(3, 7, 7, 3\), the model needs \(4, 7, 7, 3\)",
    ),
    "nan.npz": (
        archive(**{"conv1.weight": np.full((4, 3, 7, 7), np.nan, np.float32)}),
        r"nan\.npz: backbone\.stem\.conv\.weight holds numbers that are not finite",
    ),
}
"""Files that cannot be used, and what is said about each."""


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_used_says_why(name, tmp_path):
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    model = RetinaNet(small("none"), xp=np)
    before = model.state_dict()
    with pytest.raises(WeightsError, match=message):
        load_initial(model, tmp_path / name)
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def test_a_file_that_is_not_there_is_named(tmp_path):
    model = RetinaNet(small("none"), xp=np)
    with pytest.raises(WeightsError, match=r"absent\.npz: no such file"):
        load_initial(model, tmp_path / "absent.npz")
    with pytest.raises(WeightsError, match=f"{tmp_path.name}: no such file"):
        load_initial(model, tmp_path)
