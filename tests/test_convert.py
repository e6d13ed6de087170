"""From foreign files to checkpoints and back: what is recognised, what survives to the bit, what is said."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

import minidet as md
from minidet import cli
from minidet.cli.convert import names_in
from minidet.data import shapes
from minidet.evaluation.evaluate import detections_of
from minidet.models import (
    RESNET18,
    RESNET34,
    RESNET50,
    RESNET101,
    RESNEXT101_32X8D,
    RetinaNet,
    RetinaNetConfig,
    presets,
)
from minidet.models.presets import PRESETS
from minidet.nn import Norm
from minidet.training import Checkpoint, load_model, read_checkpoint, write_checkpoint
from minidet.training.settings import to_json
from minidet.weights import (
    BY_NUMBER,
    CATEGORY_IDS,
    WeightsError,
    config_for,
    find_weights,
    load_initial,
    read_arrays,
    to_torchvision,
)
from minidet.weights.torch_file import write_torch

VECTORS = Path(__file__).parent / "reference" / "vectors"
SAMPLES = Path(__file__).parent / "samples"
COCO_91, COCO_80 = BY_NUMBER[91], BY_NUMBER[80]
FIVE = list("abcde")


def keys(name: str) -> dict:
    return json.loads((VECTORS / f"keys_{name}.json").read_text())


@pytest.fixture
def recognised(monkeypatch):
    """`recognised(shapes)` is the network that a file with tensors of these shapes is taken for."""

    def config(tensors: dict, **how) -> RetinaNetConfig:
        state = {name: np.broadcast_to(np.float32(0), shape) for name, shape in tensors.items()}
        monkeypatch.setattr("minidet.weights.recognition.read_arrays", lambda path: state)
        return config_for(find_weights("file.pth"), **how)

    return config


def thin(config, **changes):
    return replace(config, stem=4, widths=tuple(8 * 2**i for i in range(len(config.widths))), **changes)


def saved(config: RetinaNetConfig, path: Path, seed: int = 1) -> RetinaNet:
    """A checkpoint of a network whose every number is drawn."""
    model, rng = RetinaNet(config, seed=seed, xp=np), np.random.default_rng(seed)
    state = {n: rng.uniform(0.5, 1.5, a.shape).astype(np.float32) for n, a in model.state_dict().items()}
    model.load_state_dict(state)
    ids = tuple(range(1, len(config.classes) + 1))
    write_checkpoint(path, Checkpoint(to_json(config), config.classes, ids, state))
    return model


def assert_same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


# Recognition.


def test_cocos_names_are_the_reference_systems():
    labels = json.loads((VECTORS / "coco_labels.json").read_text())
    assert list(COCO_80) == labels["detectron2_80"]
    for name, reference in zip(COCO_91, labels["torchvision_91"], strict=True):
        assert name == reference or (reference == "N/A" and name.startswith("N/A "))
    assert [COCO_91[i] for i in CATEGORY_IDS[COCO_80]] == list(COCO_80)


def test_published_detectors(recognised):
    v1 = keys("retinanet_resnet50_fpn")
    for table in ("current", "legacy"):
        assert recognised(v1[table]) == presets.torchvision_v1(COCO_91)
    counted = v1["current"] | dict.fromkeys(v1["extra_keys_with_batchnorm2d"], ())
    assert recognised(counted).backbone == replace(presets.torchvision_v1(COCO_91).backbone, norm=Norm("batch"))
    assert recognised(keys("retinanet_resnet50_fpn_v2")["current"]) == presets.torchvision_v2(COCO_91)
    zoo = keys("detectron2_retinanet_R_50_FPN")["keys"]
    assert recognised(zoo) == presets.detectron2(COCO_80)
    deeper = {n.replace("res4.5.", f"res4.{i}."): s for n, s in zoo.items() if "res4.5." in n for i in range(6, 23)}
    config = presets.detectron2(COCO_80)
    assert recognised(zoo | deeper) == replace(config, backbone=replace(config.backbone, blocks=(3, 4, 23, 3)))


@pytest.mark.parametrize("kind", [RESNET34, RESNET50, RESNET101, RESNEXT101_32X8D])
def test_backbones(kind, recognised):
    """By torchvision's names, which are timm's too; their stride is in the 3x3."""
    kind = thin(kind, norm=Norm("frozen", eps=1e-5), frozen_stages=2)
    model = RetinaNet(replace(presets.torchvision_v1(FIVE), backbone=kind), xp=np)
    state = to_torchvision({n: a for n, a in model.state_dict().items() if n.startswith("backbone.")})
    tensors = {name.removeprefix("backbone.body."): array.shape for name, array in state.items()}
    config = recognised(tensors | {"fc.weight": (10, 64), "bn1.num_batches_tracked": ()})
    assert config == replace(presets.torchvision_v1(["object"]), backbone=kind)


def caffe2(model: RetinaNet) -> dict[str, np.ndarray]:
    """The backbone as detectron2's ImageNet files hold it, with a classifier and a bias that nobody reads."""
    state = {"fc1000_w": np.zeros((10, 64), np.float32), "conv1_b": np.ones(4, np.float32)}
    for name, array in model.state_dict().items():
        if name.startswith("backbone.") and "running" not in name:
            path, kind, leaf = name.removeprefix("backbone.").rsplit(".", 2)
            if path != "stem":
                _, stage, _, block, part = path.split(".")
                branch = {"shortcut": "1", "conv1": "2a", "conv2": "2b", "conv3": "2c"}[part]
                path = f"res{int(stage) + 2}_{block}_branch{branch}"
            else:
                path = "res_conv1" if kind == "norm" else "conv1"
            state[f"{path}_w" if kind == "conv" else f"{path}_bn_{leaf[0] if leaf == 'bias' else 's'}"] = (
                np.ascontiguousarray(np.moveaxis(array, -1, 1)) if array.ndim == 4 else array
            )
    return state


@pytest.mark.parametrize("kind", [RESNET50, RESNEXT101_32X8D])
def test_caffe2_backbones(kind, tmp_path, rng):
    """What the paper and detectron2 start from: BGR, stride in the 1x1 (ResNeXt: 3x3), norms that are affine."""
    base = presets.detectron2(["object"])
    config = presets.with_backbone(base, thin(kind))
    model = RetinaNet(config, xp=np)
    state = {n: rng.uniform(0.5, 1.5, a.shape).astype(np.float32) for n, a in model.state_dict().items()}
    for name, array in state.items():
        if name.endswith(("running_mean", "running_var")):
            array[...] = 0 if name.endswith("mean") else 1 - 1e-5
    model.load_state_dict(state)
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(caffe2(model), 2))
    done = md.convert(tmp_path / "R-50.pkl", tmp_path / "x.safetensors")
    assert done.config == config and done.config.backbone.stride_in_1x1 == (kind is RESNET50)
    assert "R-50.pkl (Caffe2 ResNet)" in done.table and "skipped" not in done.table
    found = read_checkpoint(tmp_path / "x.safetensors").weights
    for name, array in model.state_dict().items():
        if name.startswith("backbone."):
            np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_a_small_backbone_gets_the_small_detector(tmp_path):
    """ResNet-18's last stage has no place in it, and its batch norm goes into the convolutions."""
    kind = replace(RESNET18, norm=Norm("batch"))
    model = RetinaNet(replace(presets.torchvision_v1(FIVE), backbone=kind), xp=np)
    state = to_torchvision({n: a for n, a in model.state_dict().items() if n.startswith("backbone.")})
    np.savez(tmp_path / "resnet18.npz", **{n.removeprefix("backbone.body."): a for n, a in state.items()})
    done = md.convert(tmp_path / "resnet18.npz", tmp_path / "x.safetensors")
    assert done.config == presets.resnet18(["object"])
    assert "skipped backbone.stages.3.blocks.0.conv1.conv.weight: the model has no such tensor" in done.table
    assert "preset resnet18, 1 classes\na backbone alone: pyramid and head start anew" in done.table
    assert load_model(tmp_path / "x.safetensors").config == done.config


def test_what_is_not_recognised_says_so(recognised):
    v1 = keys("retinanet_resnet50_fpn")["current"]
    with pytest.raises(WeightsError, match=r"file\.pth: torchvision RetinaNet, .*has 91 classes, but 2 names were"):
        recognised(v1, classes=["cat", "dog"])
    nothing = {name: shape for name, shape in v1.items() if "cls_logits" not in name}
    with pytest.raises(WeightsError, match=r"there is no 'head\.class_subnet\.final\.bias'; choose a preset"):
        recognised(nothing)
    wide = v1 | {"head.regression_head.bbox_reg.bias": [60], "head.classification_head.cls_logits.bias": [30]}
    with pytest.raises(WeightsError, match="it has 15 anchors a cell, not 9"):
        recognised(wide)
    deep_stem = {"conv1.0.weight": (4, 3, 3, 3), "layer1.0.conv1.weight": (4, 4, 1, 1)}
    with pytest.raises(WeightsError, match="torchvision ResNet, but not of a kind that is known: there is no"):
        recognised(deep_stem)
    with pytest.raises(WeightsError, match="minidet's own names, which say nothing of anchors: choose a preset"):
        recognised({"backbone.stem.conv.weight": (4, 7, 7, 3)})


# Round trips.

NETWORKS = {
    "torchvision_v1": replace(
        presets.torchvision_v1(FIVE),
        backbone=thin(RESNET50, blocks=(1, 2, 1, 1), norm=Norm("frozen", eps=0.0), frozen_stages=2),
        pyramid=replace(presets.torchvision_v1(FIVE).pyramid, channels=8),
    ),
    "torchvision_v2": replace(
        presets.torchvision_v2(FIVE),
        backbone=thin(RESNET50, blocks=(1, 1, 1, 1), norm=Norm("batch")),
        pyramid=replace(presets.torchvision_v2(FIVE).pyramid, channels=32),
    ),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_to_torchvisions_names_and_back_is_bitwise(kind, suffix, tmp_path):
    """And the network is recognised in full, from its weights alone."""
    model = saved(NETWORKS[kind], tmp_path / "run.safetensors")
    md.export(tmp_path / "run.safetensors", tmp_path / f"theirs{suffix}")
    theirs = read_arrays(tmp_path / f"theirs{suffix}")
    filters = theirs["backbone.body.conv1.weight"]
    np.testing.assert_array_equal(filters, np.moveaxis(model.backbone.stem.conv.weight.data, -1, 1))
    done = md.convert(tmp_path / f"theirs{suffix}", tmp_path / "back.safetensors", classes=FIVE)
    assert done.config == NETWORKS[kind]
    assert_same(read_checkpoint(tmp_path / "back.safetensors").weights, model.state_dict())


@pytest.mark.parametrize("preset", ["small", "resnet18"])
def test_what_torchvision_does_not_have_is_named_by_a_preset(preset, tmp_path):
    model = saved(PRESETS[preset](FIVE), tmp_path / "run.safetensors")
    done = md.export(tmp_path / "run.safetensors", tmp_path / "theirs.pth")
    assert "torchvision's builder does otherwise, so build these yourself:" in done.table
    assert "  pyramid.channels: 256 -> 64" in done.table and 'label k is ["a", "b", "c", "d", "e"][k]' in done.table
    with pytest.raises(WeightsError, match="choose a preset that it fits"):
        md.convert(tmp_path / "theirs.pth", tmp_path / "back.safetensors", classes=FIVE)
    md.convert(tmp_path / "theirs.pth", tmp_path / "back.safetensors", classes=FIVE, preset=preset)
    assert_same(read_checkpoint(tmp_path / "back.safetensors").weights, model.state_dict())


def test_torch_takes_what_is_exported(tmp_path):
    """Strictly, counts of batches included, into modules called as torchvision's."""
    torch = pytest.importorskip("torch")
    saved(NETWORKS["torchvision_v2"], tmp_path / "run.safetensors")
    done = md.export(tmp_path / "run.safetensors", tmp_path / "theirs.pth")
    assert "retinanet_resnet50_fpn_v2(\n    weights=None, weights_backbone=None, num_classes=5)" in done.table
    state = torch.load(tmp_path / "theirs.pth", weights_only=True)
    body = {n.removeprefix("backbone.body."): a for n, a in state.items() if n.startswith("backbone.body.")}
    stem = torch.nn.ModuleDict({"conv1": torch.nn.Conv2d(3, 4, 7, bias=False), "bn1": torch.nn.BatchNorm2d(4)})
    stem.load_state_dict({n: a for n, a in body.items() if n.startswith(("conv1.", "bn1."))}, strict=True)
    assert state.keys() >= {n.replace("layer1", "layer4") for n in state if "layer1" in n}


@pytest.mark.parametrize("kind", ["zip.pth", "legacy.pth", "d2style.pkl"])
def test_samples_become_models(kind, tmp_path):
    """torch's and the zoo's containers, read without either: the same network, and the same detections."""
    done = md.convert(SAMPLES / f"sample_tiny_{kind}", tmp_path / "x.safetensors", classes=FIVE)
    assert done.config.backbone.blocks == (1, 2, 1, 1) and done.config.backbone.widths == (4, 8, 16, 32)
    assert "torchvision RetinaNet): 136 tensors loaded" in done.table
    assert "but pyramid.channels: 256 -> 16" in done.table
    assert "batch norm has eps 0, as torchvision's published weights need it" in done.table
    with np.load(VECTORS / "tiny_v1_a.npz") as vectors:
        found = md.detect(load_model(tmp_path / "x.safetensors"), vectors["image0"])
    assert len(found) > 10 and np.isfinite(found.boxes).all()


def test_a_network_that_does_not_fit_is_refused(tmp_path):
    source, out = SAMPLES / "sample_tiny_zip.pth", tmp_path / "x.safetensors"
    with pytest.raises(WeightsError, match=r"sample_tiny_zip\.pth: a detector whose classes are not known: name them"):
        md.convert(source, out)
    with pytest.raises(WeightsError, match=r"not the network of this preset: \d+ of its tensors do not fit and \d+ "):
        md.convert(source, out, preset="torchvision_v2", classes=FIVE)
    with pytest.raises(ValueError, match="there is no preset 'v3'; known are paper, torchvision_v1"):
        md.convert(source, out, preset="v3", classes=FIVE)
    with pytest.raises(ValueError, match=r"--set model\.backbone\.nrm=1: there is no 'model\.backbone\.nrm'"):
        md.convert(source, out, classes=FIVE, settings=["model.backbone.nrm=1"])
    with pytest.raises(ValueError, match=r"x\.pth: the result is a file ending in \.safetensors"):
        md.convert(source, tmp_path / "x.pth", classes=FIVE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cut", ["bbox_reg.bias", "cls_logits.bias", "bbox_reg.weight", "backbone.body.conv1.weight"])
def test_a_network_that_lacks_a_tensor_is_refused(cut, tmp_path):
    state = read_arrays(SAMPLES / "sample_tiny_zip.pth")
    write_torch(tmp_path / "x.pth", {name: array for name, array in state.items() if not name.endswith(cut)})
    with pytest.raises(WeightsError, match=r"x\.pth: .*(there is no '|missing, first |are missing)"):
        md.convert(tmp_path / "x.pth", tmp_path / "x.safetensors", classes=FIVE)
    assert not (tmp_path / "x.safetensors").exists()


def test_the_source_is_not_overwritten(tmp_path):
    for name in ("best.safetensors", "last.safetensors"):
        saved(NETWORKS["torchvision_v1"], tmp_path / name)
    with pytest.raises(ValueError, match="would overwrite the file that is converted: choose another name"):
        md.export(tmp_path, tmp_path / "best.safetensors")
    with pytest.raises(ValueError, match=r"last\.safetensors: would overwrite a checkpoint of a training"):
        md.export(tmp_path, tmp_path / "last.safetensors")
    with pytest.raises(ValueError, match=r"a file ending in \.pth, \.pt, \.safetensors, \.npz"):
        md.export(tmp_path, tmp_path / "run.onnx")
    assert len(list(tmp_path.iterdir())) == 2


# Other classes.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "run.safetensors"
    return path, saved(presets.small(["cat", "dog", "owl"]), path)


def class_output(model: RetinaNet) -> list[np.ndarray]:
    """Weight and bias by anchor and class."""
    K, final = len(model.config.classes), model.head.class_subnet.final
    return [final.weight.data.reshape(-1, K, 3, 3, 64), final.bias.data.reshape(-1, K)]


def test_other_classes_start_at_the_prior(trained):
    """The same number of them, too: a dog's filters are not a cell's."""
    path, source = trained
    for classes in (["cell"], ["cell", "egg", "ray"], ["dog", "cat", "owl"]):
        model = RetinaNet(presets.small(classes), seed=2, xp=np)
        weight, _ = class_output(model)
        model.head.class_subnet.final.bias.data = np.full(9 * len(classes), 7, np.float32)
        done = load_initial(model, path)
        assert done.untouched == ("head.class_subnet.final.weight", "head.class_subnet.final.bias")
        assert len(done.loaded) == len(source.state_dict()) - 2
        assert f"its 3 classes are others than the model's {len(classes)}" in done.table()
        assert "  every class starts at its prior probability\n" in done.table()
        np.testing.assert_allclose(class_output(model)[1], -math.log(99), rtol=1e-6)
        np.testing.assert_array_equal(class_output(model)[0], weight)


def test_rows_of_equally_named_classes(trained):
    path, source = trained
    model = RetinaNet(presets.small(["cell", "owl", "cat"]), seed=2, xp=np)
    weight, _ = class_output(model)
    done = load_initial(model, path, copy_classes=True)
    assert done.copied == ("owl", "cat")
    assert "every class starts at its prior probability, but for owl, cat" in done.table()
    for new, old, first in zip(class_output(model), class_output(source), (weight, None), strict=True):
        np.testing.assert_array_equal(new[:, 1], old[:, 2])
        np.testing.assert_array_equal(new[:, 2], old[:, 0])
        np.testing.assert_allclose(new[:, 0], -math.log(99) if first is None else first[:, 0], rtol=1e-6)


def test_the_same_classes_are_simply_loaded(trained):
    path, source = trained
    model = RetinaNet(presets.small(["cat", "dog", "owl"]), seed=2, xp=np)
    done = load_initial(model, path, copy_classes=True)
    assert not done.skipped and not done.untouched and "prior" not in done.table()
    assert_same(model.state_dict(), source.state_dict())


def test_the_stride_must_be_where_it_was(tmp_path):
    config = replace(presets.paper(FIVE), backbone=thin(RESNET50, stride_in_1x1=True))
    model = RetinaNet(replace(config, pyramid=replace(config.pyramid, channels=8)), xp=np)
    np.savez(tmp_path / "resnet.npz", **{"conv1.weight": np.zeros((4, 3, 7, 7), np.float32)})
    with pytest.raises(
        WeightsError, match=r"have their stride in the 3x3 convolution, this preset in the 1x1: set .*1x1 to false"
    ):
        load_initial(model, tmp_path / "resnet.npz")


def test_the_papers_recipe_starts_from_caffe2s_backbone(tmp_path, rng):
    """Its filters see BGR bytes, the preset gives RGB in 0..1: the maps are the same."""
    kind = thin(RESNET50, blocks=(1, 1, 1, 1))
    config = presets.with_backbone(presets.detectron2(FIVE), kind)
    source = RetinaNet(config, seed=1, xp=np)
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(caffe2(source), 2))
    paper = RetinaNet(presets.with_backbone(presets.paper(FIVE), kind), seed=2, xp=np)
    load_initial(source, tmp_path / "R-50.pkl")
    load_initial(paper, tmp_path / "R-50.pkl")
    image = rng.integers(0, 256, (64, 64, 3), np.uint8)
    maps = []
    for model in (source, paper):
        rule = replace(model.config.preprocess, min_size=0)
        maps.append(model.backbone(md.Tensor(rule.prepare(image)[None]))[-1].data)
    np.testing.assert_allclose(maps[0], maps[1], atol=1e-4 * np.abs(maps[0]).max())
    grey = replace(paper.config, preprocess=replace(paper.config.preprocess, mean=(0.5, 0.5, 0.5)))
    with pytest.raises(WeightsError, match=r"Caffe2 ResNet expects other pixels: .*; set model\.preprocess as it was"):
        load_initial(RetinaNet(grey, xp=np), tmp_path / "R-50.pkl")


def test_evaluation_tells_classes_by_name(trained, tmp_path):
    """A detector of more classes, in another order, is judged on those of the data set."""
    data = shapes("val", images=3, size=64)
    config = presets.small(data.classes)
    config = replace(config, postprocess=replace(config.postprocess, score_threshold=0.3))
    source = RetinaNet(config, seed=3, xp=np)
    write_checkpoint(tmp_path / "x.safetensors", Checkpoint({}, data.classes, data.category_ids, source.state_dict()))
    source.head.class_subnet.final.bias.data += 4.5
    write_checkpoint(tmp_path / "x.safetensors", Checkpoint({}, data.classes, data.category_ids, source.state_dict()))
    more = RetinaNet(replace(config, classes=("ghost", *reversed(data.classes))), seed=4, xp=np)
    load_initial(more, tmp_path / "x.safetensors", copy_classes=True)
    wanted, found = (
        sorted((r["image_id"], r["category_id"], round(r["score"], 5)) for r in detections_of(m, data))
        for m in (source, more)
    )
    assert len(wanted) > 100 and found == wanted
    with pytest.raises(ValueError, match=r"the data set has cat: evaluate on the classes"):
        unknown = shapes("val", images=1)
        unknown.classes = ("cat",)
        detections_of(source, unknown)


# The command.


def run(*arguments, status: int = 0) -> None:
    assert cli.main([str(argument) for argument in arguments]) == status


def test_the_command_there_and_back(tmp_path, capsys, rng):
    (tmp_path / "names.txt").write_text("\n".join(FIVE) + "\n\n")
    converted = tmp_path / "x.safetensors"
    run("convert", SAMPLES / "sample_tiny_legacy.pth", "--classes", tmp_path / "names.txt", "--out", converted)
    assert f"in {converted}" in capsys.readouterr().out
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "photo.png")
    run("detect", converted, tmp_path / "photo.png", "--out", tmp_path / "found")
    assert set(json.loads((tmp_path / "found" / "photo.json").read_text())) >= {"detections"}
    run("convert", converted, "--to", "torchvision", "--out", tmp_path / "back.pth")
    assert "model.load_state_dict(torch.load('back.pth'))" in capsys.readouterr().out
    theirs, ours = read_arrays(SAMPLES / "sample_tiny_legacy.pth"), read_arrays(tmp_path / "back.pth")
    assert sorted(a.tobytes() for a in ours.values()) == sorted(a.tobytes() for a in theirs.values())
    run("convert", converted, "--to", "torchvision", "--preset", "small", "--out", tmp_path / "b.pth", status=2)
    assert "--to writes a model as it is" in capsys.readouterr().err
    run("train", "--data", "shapes", "--copy-classes", "--out", tmp_path / "run", status=2)
    assert "--copy-classes says what to take from the weights of --init" in capsys.readouterr().err


def test_training_starts_from_a_foreign_detector(tmp_path, capsys):
    """Whatever its classes are called: the network is recognised, and all but the class output taken over."""
    data = tiny.coco_folder(tmp_path / "data", train=2, val=1)
    small = ["--set", "model.preprocess.min_size=64", "--set", "samples=0", "--set", "validations=0", "--quiet"]
    start = ["--init", SAMPLES / "sample_tiny_d2style.pkl", "--images", 2, "--batch-size", 2]
    run("train", "--data", data, "--out", tmp_path / "run", *start, *small)
    printed = capsys.readouterr().out
    assert "134 tensors loaded" in printed and "every class starts at its prior probability" in printed
    config = load_model(tmp_path / "run").config
    assert config.backbone.blocks == (1, 2, 1, 1) and config.classes == shapes().classes


def test_names_from_every_kind_of_file(tmp_path):
    categories = {"categories": [{"id": 9, "name": "dog"}, {"id": 2, "name": "cat"}]}
    for name, content, wanted in (
        ("a.txt", "cat\n dog \n", ["cat", "dog"]),
        ("b.json", '["cat", "dog"]', ["cat", "dog"]),
        ("c.json", json.dumps(categories), ["cat", "dog"]),
    ):
        (tmp_path / name).write_text(content)
        assert names_in(tmp_path / name) == wanted
    (tmp_path / "d.json").write_text('{"names": []}')
    with pytest.raises(ValueError, match=r"--classes .*d\.json: cannot be read: 'categories'"):
        names_in(tmp_path / "d.json")
    (tmp_path / "e.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"e\.json: expected a list of names, or COCO's categories"):
        names_in(tmp_path / "e.json")
