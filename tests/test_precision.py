"""bfloat16 inside, float32 around it; and networks that compute twice to remember less."""

from __future__ import annotations

import builtins
from dataclasses import replace

import numpy as np
import pytest
import tiny

from minidet import Tensor, backend, no_grad
from minidet.autograd import inputs_first
from minidet.data import Loader, shapes
from minidet.detect import detect_batch
from minidet.kernels import convolve, convolve_weight_gradient, only, precision
from minidet.kernels.convolution import geometry_of
from minidet.nn import BatchNorm2d, FrozenBatchNorm2d, GroupNorm
from minidet.training import SHAPES, load_model, read_checkpoint, train
from minidet.training.interrupt import Stopped
from minidet.training.step import batch_gradient

UNIT = 2.0**-8
"""The largest relative error of rounding to bfloat16, which keeps eight bits."""


@pytest.fixture
def narrow():
    pytest.importorskip("ml_dtypes")
    return precision.bfloat16(np)


def first_batch(model, size: int = 64, images: int = 4):
    return next(iter(Loader(shapes(size=size), model.config.preprocess, batch_size=images)))


def gradients(model, batch) -> dict[str, np.ndarray]:
    measured = batch_gradient(model, batch, 1, 100.0)
    return {"loss": np.asarray(measured.loss)} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def distance(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - want) / max(np.linalg.norm(want), 1e-9))


def test_rounding(narrow, rng):
    x = rng.normal(size=10_000).astype(np.float32)
    rounded = precision.widened(x.astype(narrow))
    assert rounded.dtype == np.float32 and (np.abs(rounded - x) <= UNIT * np.abs(x)).all()
    assert precision.is_bfloat16(x.astype(narrow)) and not precision.is_bfloat16(x) and not precision.is_bfloat16(3)
    assert precision.sums_in(x.astype(narrow)) == np.float32 and precision.sums_in(x.astype(float)) == np.float64
    assert precision.widened("memo") == "memo"


@pytest.mark.parametrize("version", ["textbook", "fast"])
def test_a_convolution_rounds_once(version, narrow, rng):
    """As if computed exactly from its rounded input: half a unit in the last place, and no more, whatever it sums."""
    geometry = geometry_of(((6, 7),), (3, 3), padding=(1, 1))
    x, weight = (rng.normal(size=s).astype(np.float32).astype(narrow) for s in ((2, 42, 64), (16, 3, 3, 64)))
    scale, bias = (rng.normal(size=16).astype(np.float32) for _ in range(2))
    shortcut = rng.normal(size=(2, 42, 16)).astype(np.float32).astype(narrow)
    exact = convolve(*(a.astype(np.float64) for a in (x, weight, bias, scale, shortcut)), True, geometry, {})
    with only(version):
        y = convolve(x, weight, bias, scale, shortcut, True, geometry, {})
        gweight = convolve_weight_gradient(x, y, geometry)
    assert y.dtype == narrow and np.abs(y.astype(float) - exact).max() <= 1.01 * UNIT * np.abs(exact).max()
    assert (np.abs(y.astype(float) - exact) <= 1.01 * UNIT * np.abs(exact) + 1e-4).all()
    assert gweight.dtype == np.float32  # sums over all pixels leave unrounded, for parameters are float32


LAYERS = [BatchNorm2d(4), FrozenBatchNorm2d(4), GroupNorm(2, 4)]


@pytest.mark.parametrize("layer", LAYERS, ids=["batch", "frozen", "group"])
def test_statistics_are_float32(layer, narrow, rng):
    """A mean of 100 and a deviation of 1: statistics in bfloat16 would be off by a tenth."""
    x = (rng.normal(100, 1, size=(2, 16, 16, 4))).astype(np.float32).astype(narrow)
    y, want = layer(Tensor(x)), layer(Tensor(x.astype(np.float32)))
    assert y.dtype == narrow and want.dtype == np.float32
    np.testing.assert_allclose(y.data.astype(np.float32), want.data, rtol=UNIT)
    if isinstance(layer, BatchNorm2d):
        assert layer.running_mean.dtype == np.float32 and np.ptp(layer.running_mean) < 4


@pytest.mark.parametrize("norm", ["group", "frozen", "batch"])
def test_a_network_beside_float32(norm, narrow):
    """Every gradient is float32 and points where float32's points; the loss is the same to two digits.

    Near zero a rectifier's slope jumps, so single units switch, which eight channels on four small images feel.
    """
    model = tiny.model(norm)
    batch = first_batch(model)
    want = gradients(model, batch)
    for parameter in model.parameters():
        parameter.grad = None
    model.compute(precision="bfloat16")
    seen = []
    got = gradients(model, batch)
    assert got["loss"] == pytest.approx(want["loss"], rel=0.01)
    for name, gradient in got.items():
        seen.append(distance(gradient, want[name]))
        assert gradient.dtype == want[name].dtype and seen[-1] < 0.5, name
    assert max(seen) > 1e-4 and np.median(seen) < 0.2  # it did round
    with no_grad():
        maps = model.features(Tensor(batch.images))
        outputs = model(Tensor(batch.images))
    assert {m.dtype for m in maps} == {narrow} and {o.dtype for o in outputs} == {np.dtype(np.float32)}


def test_weights_are_cast_once_while_they_last(narrow):
    model = tiny.model()
    model.compute(precision="bfloat16")
    images, weight = first_batch(model).images, model.pyramid.lateral[0].weight
    with no_grad():
        first = model.features(Tensor(images))[0].data
        kept = weight.memo[narrow][0]
        again = model.features(Tensor(images))[0].data
        assert weight.memo[narrow][0] is kept and np.array_equal(first, again)
        weight.data[...] *= 2
        weight.touch()
        assert not np.array_equal(model.features(Tensor(images))[0].data, first)


def test_a_training_in_bfloat16(narrow, tmp_path):
    """Its loss falls, its files are float32, and what was stopped goes on bitwise."""
    data = shapes(size=64)
    config = replace(SHAPES, images=160, batch_size=8, precision="bfloat16", validations=0, checkpoints=1, samples=0)
    whole = tiny.model(seed=1)
    history = train(whole, data, config=config, out=tmp_path / "whole", quiet=True).history["loss"]
    assert np.mean(history[-5:]) < 0.9 * np.mean(history[:5])
    saved = read_checkpoint(tmp_path / "whole" / "last.safetensors")
    assert {a.dtype for a in saved.weights.values()} == {np.dtype(np.float32)}
    loaded = load_model(tmp_path / "whole", precision="bfloat16")
    assert (loaded.precision, load_model(tmp_path / "whole").precision) == ("bfloat16", "float32")
    images = first_batch(whole).images
    with no_grad():
        assert np.array_equal(loaded(Tensor(images))[0].data, whole(Tensor(images))[0].data)

    stopped, steps = tiny.model(seed=1), iter(range(12))

    class Cut:  # a data set that ends in an error, as a crash would
        classes, category_ids = data.classes, data.category_ids

        def __len__(self):
            return len(data)

        def __getitem__(self, index):
            if next(steps, None) is None:
                raise Stopped("here")
            return data[index]

    often = replace(config, checkpoints=160)
    with pytest.raises(Stopped):
        train(stopped, Cut(), config=often, out=tmp_path / "cut", quiet=True)
    train(resumed := tiny.model(seed=1), data, config=often, out=tmp_path / "cut", quiet=True, resume=True)
    for name, values in whole.state_dict().items():
        assert np.array_equal(values, resumed.state_dict()[name]), name


def test_detections_have_float32_boxes(narrow):
    model = tiny.model()
    batch = first_batch(model)
    anything = replace(model.config.postprocess, score_threshold=0.0)
    plain = detect_batch(model, batch.images, batch.sizes, batch.original_sizes, anything)
    model.compute(precision="bfloat16")
    rounded = detect_batch(model, batch.images, batch.sizes, batch.original_sizes, anything)
    assert rounded[0].boxes.dtype == plain[0].boxes.dtype == np.float32
    assert abs(float(rounded[0].scores[0]) - float(plain[0].scores[0])) < 0.01


def test_what_cannot_be_is_said(monkeypatch):
    model = tiny.model()
    with pytest.raises(ValueError, match="float32, bfloat16"):
        model.compute(precision="float16")
    with pytest.raises(ValueError, match="float32, bfloat16"):
        replace(SHAPES, precision="half")
    with pytest.raises(RuntimeError, match="not in the Array API standard"):
        precision.bfloat16(backend.load("array_api_strict"))
    load = builtins.__import__
    monkeypatch.setattr(precision.importlib, "import_module", lambda name: load(f"{name}_that_is_missing"))
    with pytest.raises(RuntimeError, match="pip install ml_dtypes"):
        model.compute(precision="bfloat16")
    assert model.precision == "float32"


@pytest.mark.parametrize("norm", ["group", "frozen", "batch"])
def test_recomputing_changes_no_bit(norm):
    """Of gradients and of running statistics; and fewer arrays are kept, which is what it is for."""
    results = []
    for recompute in (False, True):
        model = tiny.model(norm)
        model.compute(recompute=recompute)
        results.append(gradients(model, first_batch(model)) | model.state_dict())
    for name, values in results[0].items():
        assert np.array_equal(values, results[1][name]), name


def test_recomputing_keeps_less():
    lengths = []
    for recompute in (False, True):
        model = tiny.model()
        model.compute(recompute=recompute)
        logits, _ = model(Tensor(first_batch(model).images))
        ops = [tensor.node.op for tensor in inputs_first(logits) if tensor.node]
        lengths.append(len(ops))
        assert ("checkpoint" in ops) == recompute
    assert lengths[1] < lengths[0]
