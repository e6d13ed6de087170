"""Settings as JSON: exact both ways, and strict about what they do not know.  The recipe of a training."""

import json
from dataclasses import dataclass, replace
from typing import Literal

import pytest

from minidet.models import RetinaNet, RetinaNetConfig, presets
from minidet.optim import SGD, AdamW
from minidet.training import FINE_TUNE, SHAPES, TrainConfig
from minidet.training.settings import differences, from_json, to_json


@dataclass(frozen=True)
class Inner:
    size: int = 3
    scale: float | None = None


@dataclass(frozen=True)
class Outer:
    inner: Inner
    names: tuple[str, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    nested: tuple[tuple[float, ...], ...] = ()
    method: Literal["float", "pil"] = "pil"
    flag: bool = False
    rule: AdamW | SGD | None = None


def through_text(value):
    return json.loads(json.dumps(to_json(value)))


@pytest.mark.parametrize(
    "value",
    [
        Outer(Inner()),
        Outer(Inner(4, 1 / 3), ("a", "b"), (5, 0.1), ((1.0,), (2.0, 3.0)), "float", True, SGD(momentum=0.5)),
        SHAPES,
        replace(FINE_TUNE, rule=SGD(nesterov=True), clip=None, milestones=(100, 200)),
        *(preset(("cat", "dog")) for preset in presets.PRESETS.values()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_round_trip(value):
    assert from_json(type(value), through_text(value)) == value


def test_absent_keys_take_their_defaults_and_whole_numbers_fit_floats():
    assert from_json(Outer, {"inner": {"scale": 2}}) == Outer(Inner(scale=2.0))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"Outer: expected a dictionary, got \[\]"),
        ({}, "Outer: the setting 'inner' is missing"),
        ({"inner": {"szie": 4}}, r"Outer\.inner: unknown setting 'szie'; did you mean 'size'\?"),
        ({"inner": {}, "qqq": 1}, "Outer: unknown setting 'qqq'; known are inner, names, pair"),
        ({"inner": {"size": 1.5}}, r"Outer\.inner\.size: expected int, got 1\.5"),
        ({"inner": {"size": True}}, r"Outer\.inner\.size: expected int, got True"),
        ({"inner": {"scale": float("nan")}}, r"Outer\.inner\.scale: expected float or NoneType, got nan"),
        ({"inner": {}, "pair": [1, float("inf")]}, r"Outer\.pair\[1\]: expected a finite number, got inf"),
        ({"inner": {"scale": "big"}}, r"Outer\.inner\.scale: expected float or NoneType, got 'big'"),
        ({"inner": {}, "names": ["a", 1]}, r"Outer\.names\[1\]: expected str, got 1"),
        ({"inner": {}, "pair": [1]}, r"Outer\.pair: expected tuple.*got \[1\]"),
        ({"inner": {}, "method": "cv2"}, r"Outer\.method: expected one of 'float', 'pil', got 'cv2'"),
        ({"inner": {}, "rule": {"class": "Lion"}}, r"Outer\.rule: class must be one of AdamW, SGD, got 'Lion'"),
        ({"inner": {}, "rule": {"class": "SGD", "beta1": 0.9}}, r"Outer\.rule: unknown setting 'beta1'"),
        ({"inner": {}, "rule": {"class": "SGD", "momentum": 2}}, "momentum must be in"),
    ],
)
def test_what_does_not_fit_is_named(data, message):
    with pytest.raises(ValueError, match=message):
        from_json(Outer, data)


def test_only_settings_can_be_stored():
    with pytest.raises(TypeError, match="a setting of type object cannot be stored"):
        to_json(object())


def test_differences_are_listed_by_path():
    old = Outer(Inner(), rule=AdamW())
    new = Outer(Inner(size=4), rule=AdamW(beta1=0.8))
    assert differences(to_json(old), to_json(old)) == []
    assert differences(to_json(old), to_json(new)) == ["inner.size: 3 -> 4", "rule.beta1: 0.9 -> 0.8"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": 0}, "training: images must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"accumulate": 25}, "a batch of 24 images cannot be split into 25 parts"),
        ({"clip": 0.0}, "clip must be above 0, or None"),
        ({"weight_decay": -1.0}, r"training: weight_decay must not be negative, got -1\.0"),
        ({"milestones": (-1,)}, "milestones must ascend, none below 0"),
        ({"images": 100, "warmup": 100}, "a warm-up of 100 images does not fit into a training of 100"),
        ({"norm_weight_decay": -1.0}, r"training: norm_weight_decay must not be negative, got -1\.0"),
        ({"aspect_factor": -1}, "training: aspect_factor must not be negative, got -1"),
        ({"ema": 0}, r"training: ema and min_sizes must be at least 1, got 0 and \(\)"),
        ({"min_sizes": (640, 0)}, r"got None and \(640, 0\)"),
        ({"warmup_start": 2.0}, r"warmup_start must be in \[0, 1\], got 2\.0"),
        ({"lr": 0.0}, r"training: lr must be above 0, got 0\.0"),
    ],
)
def test_impossible_recipes(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SHAPES, **changes)


def test_the_recipe_scales_its_rate_and_says_so():
    config = replace(FINE_TUNE, accumulate=2, milestones=(100, 200), cooldown=0.1, min_sizes=(240, 320), ema=1000)
    assert config.schedule().peak == pytest.approx(1e-3)
    assert config.summary(205) == (
        "5,200 images = 25.37 epochs of 205; 1,300 steps of 4, each in 2 parts\n"
        "AdamW, learning rate 0.001 (= 0.004 * 4 / 16, the linear rule), warm-up 520 images, "
        "x 0.1 at 100, 200 images, cosine to 0, linear to 0 over the last 10%, "
        "shorter sides of 240, 320 px, weights averaged over 1,000 images, backbone x 0.25"
    )
    assert TrainConfig(images=30_000).schedule().warmup == 1_600


def test_the_optimizer_leaves_out_what_is_frozen_and_slows_the_backbone():
    model = RetinaNet(presets.resnet18(("cell",)))
    first, second = FINE_TUNE.optimizer(model).groups
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert first.parameters.keys() | second.parameters.keys() == trainable
    assert len(trainable) < len(model.parameters())
    assert all(name.startswith("backbone.") for name in first.parameters)
    assert not any(name.startswith("backbone.") for name in second.parameters)
    assert (first.lr_scale, second.lr_scale) == (0.25, 1.0)
    model.backbone.freeze()
    with pytest.raises(ValueError, match="backbone_lr_scale is set, but no trainable parameter"):
        FINE_TUNE.optimizer(model)


def test_norms_may_decay_on_their_own():
    model = RetinaNet(presets.small(("a",)))
    config = replace(TrainConfig(), weight_decay=0.05, norm_weight_decay=0.0, backbone_lr_scale=0.5)
    decays = {name: (g.lr_scale, g.weight_decay) for g in config.optimizer(model).groups for name in g.parameters}
    assert decays.keys() == dict(model.named_parameters()).keys()
    for name, (scale, decay) in decays.items():
        assert decay == (0.0 if ".norm." in name else 0.05), name
        assert scale == (0.5 if name.startswith("backbone.") else 1.0), name
    assert {decay for _, decay in decays.values()} == {0.0, 0.05}


def test_a_training_is_stretched_with_its_milestones():
    config = TrainConfig(images=90, warmup=10, milestones=(60, 80), cooldown=0.0)
    assert config.stretched(90) is config
    assert config.stretched(270) == replace(config, images=270, milestones=(180, 240))
    assert config.stretched(45) == replace(config, images=45, milestones=(30, 40), warmup=4)
    assert SHAPES.stretched(100) == replace(SHAPES, images=100)


def test_every_preset_is_read_as_its_own_class():
    data = through_text(presets.small(("a",)))
    data["backbone"]["widhts"] = [1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"RetinaNetConfig\.backbone: unknown setting 'widhts'; did you mean 'widths'"):
        from_json(RetinaNetConfig, data)
