"""The mean of the weights: what it is, where it is used, and that a stopped training goes on with the same one."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from tiny import model as tiny_model

from minidet import backend
from minidet.autograd import Tensor, no_grad
from minidet.data import shapes
from minidet.nn import BatchNorm2d
from minidet.optim import SGD
from minidet.training import SHAPES, TrainConfig, load_model, read_checkpoint, train
from minidet.training.average import WeightAverage

QUICK = TrainConfig(images=16, batch_size=2, validations=0, checkpoints=0, augment=SHAPES.augment, samples=1, ema=12)


def data():
    return shapes("train", images=30, size=64)


def output(model) -> np.ndarray:
    ramp = np.linspace(-1, 1, 64 * 64 * 3, dtype=np.float32).reshape(1, 64, 64, 3)
    with no_grad():
        return model.eval()(Tensor(ramp))[0].data


@pytest.mark.parametrize("library", ["numpy", "array_api_strict"])
def test_it_is_a_plain_mean_at_first_and_then_forgets(library, rng):
    xp = backend.load(library)
    layer = BatchNorm2d(3).to(xp)
    average = WeightAverage(layer, images=10)
    seen, position, want = [], 0, np.zeros(3)
    for batch in (2, 2, 2, 1, 2, 2, 2, 2, 2):
        seen.append(rng.normal(size=3).astype(np.float32))
        layer.weight.data = xp.asarray(seen[-1])
        layer.running_mean = xp.asarray(-seen[-1])
        average.update(layer, position, batch)
        position += batch
        fresh = max(1 - math.exp(-batch / 10), batch / position)
        want += fresh * (seen[-1] - want)
        if position == 6:
            np.testing.assert_allclose(want, np.mean(seen, axis=0), rtol=1e-6)  # before 10 images: all alike
    weights = average.weights(layer)
    np.testing.assert_allclose(weights["weight"], want, rtol=1e-5)
    np.testing.assert_allclose(weights["running_mean"], -want, rtol=1e-5)
    assert weights["running_var"].tolist() == [1, 1, 1]  # what never moves is kept to the last bit
    assert not np.allclose(want, np.mean(seen, axis=0), rtol=1e-3)


def test_inside_the_model_is_the_mean_and_outputs_follow(rng):
    """Also where something was derived from the weights before."""
    model, other = tiny_model("frozen"), tiny_model("frozen", seed=1)
    average = WeightAverage(model, images=10)
    own = output(model)
    average.load(other.state_dict())
    with pytest.raises(ZeroDivisionError), average.in_place(model):
        np.testing.assert_array_equal(output(model), output(other))
        raise ZeroDivisionError
    np.testing.assert_array_equal(output(model), own)
    nothing = WeightAverage(model, None)
    with nothing.in_place(model):
        np.testing.assert_array_equal(output(model), own)
    assert nothing.mean == {}


def test_training_leaves_the_mean_of_its_steps(tmp_path):
    """Here: of all, for `ema` reaches back further than the training; the steps themselves stay what they were."""
    plain, model = tiny_model("batch"), tiny_model("batch")
    seen, config = [], replace(QUICK, ema=1000, images=10)

    class Watched(type(data())):
        def __getitem__(self, index):
            seen.append(plain.state_dict())
            return super().__getitem__(index)

    watched = Watched("train", 30, 0, 64, "standard")
    steps = train(plain, watched, config=replace(config, ema=None), quiet=True)
    seen.append(plain.state_dict())
    done = train(model, data(), config=config, out=tmp_path, quiet=True)
    assert done.history["loss"] == steps.history["loss"]
    after = seen[2::2]  # of every second image: a step is two
    assert len(after) == 5
    loaded, last = load_model(tmp_path).state_dict(), read_checkpoint(tmp_path / "last.safetensors")
    for name, array in model.state_dict().items():
        mean = np.mean([state[name] for state in after], axis=0, dtype=np.float64)
        np.testing.assert_allclose(array, mean, rtol=1e-4, atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(loaded[name], array)
        np.testing.assert_array_equal(last.optimizer[f"own.{name}"], after[-1][name])
    assert any(np.any(array != after[-1][name]) for name, array in loaded.items())


def test_the_mean_is_what_is_validated_and_called_best(tmp_path):
    model, judged = tiny_model(), []

    def evaluator(model, dataset, batch_size):
        judged.append(model.state_dict())
        return {"AP": 0.1 * len(judged), "AP50": 0.0, "to_json": None}

    class Numbers(dict):
        def to_json(self):
            return dict(self)

    train(
        model, data(), validate=data(), out=tmp_path, config=replace(QUICK, validations=2), quiet=True,
        evaluator=lambda *args, **kwargs: Numbers(evaluator(*args, **kwargs)),
    )  # fmt: skip
    assert len(judged) == 2
    best = read_checkpoint(tmp_path)
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(judged[-1][name], array)
        np.testing.assert_array_equal(best.weights[name], array)
    assert any(np.any(best.optimizer[f"own.{name}"] != array) for name, array in best.weights.items())


@pytest.mark.parametrize("ema", [None, 12])
def test_a_stopped_training_goes_on_exactly(ema, tmp_path):
    """With everything on that depends on the position: the mean, scales, groups and running statistics."""
    config = replace(
        QUICK, ema=ema, min_sizes=(48, 64), aspect_factor=0, rule=SGD(), norm_weight_decay=0.0, checkpoints=1000
    )
    whole, parts = tiny_model("batch", "moving"), tiny_model("batch", "moving")
    train(whole, data(), config=config, out=tmp_path / "whole", quiet=True)

    class Stops(type(data())):
        left = 11

        def __getitem__(self, index):
            self.left -= 1
            if self.left == 0:
                raise InterruptedError("pulled the plug")
            return super().__getitem__(index)

    with pytest.raises(RuntimeError, match="pulled the plug"):
        train(parts, Stops("train", 30, 0, 64, "standard"), config=config, out=tmp_path / "parts", quiet=True)
    resumed = tiny_model("batch", "moving", seed=9)
    train(resumed, data(), config=config, out=tmp_path / "parts", quiet=True, resume=True)
    a, b = (read_checkpoint(tmp_path / name / "last.safetensors") for name in ("whole", "parts"))
    for mine, theirs in ((a.weights, b.weights), (a.optimizer, b.optimizer), (whole.state_dict(), b.weights)):
        assert mine.keys() == theirs.keys()
        for name in mine:
            np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
    assert ("own.backbone.stem.norm.running_mean" in a.optimizer) == (ema is not None)
