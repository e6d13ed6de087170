"""The loop: it learns, stops and continues exactly, and says what went wrong."""

import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import model as tiny_model

from minidet import backend
from minidet.autograd import Tensor, record
from minidet.data import Loader, shapes
from minidet.detect import detect
from minidet.models import ResNet, RetinaNet
from minidet.nn import BatchNorm2d
from minidet.ops import relu, sum
from minidet.optim import SGD
from minidet.training import (
    SHAPES,
    CheckpointError,
    NonFiniteError,
    TrainConfig,
    load_model,
    read_checkpoint,
    train,
    write_checkpoint,
)
from minidet.training.average import WeightAverage
from minidet.training.blame import first_non_finite
from minidet.training.interrupt import Interrupt
from minidet.training.monitor import read_metrics
from minidet.training.settings import from_json
from minidet.training.state import restore
from minidet.training.step import batch_gradient

QUICK = TrainConfig(images=60, batch_size=2, validations=0, checkpoints=3, augment=SHAPES.augment, samples=2)
"""30 steps of 2 images."""

STORED_LOGIT = -4.601950645446777
"""Mean logit of tests/data/checkpoint_v1.safetensors for a ramp, when that was written."""


def tiny_data(images: int = 40, **kwargs):
    return shapes("train", images=images, size=64, **kwargs)


class Wrapped:
    """A data set that calls `hook(index)` before it gives an image."""

    def __init__(self, dataset, hook):
        self.dataset, self.hook, self.taken = dataset, hook, 0
        self.classes, self.category_ids = dataset.classes, dataset.category_ids

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.taken += 1
        self.hook(self.taken)
        return self.dataset[index]


def interrupt_at(count):
    """A hook that presses Ctrl-C while image number `count` is being loaded."""
    return lambda taken: os.kill(os.getpid(), signal.SIGINT) if taken == count else None


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def without_times(rows):
    return [{k: v for k, v in vars(row).items() if not k.endswith("_ms")} for row in rows]


def test_it_learns_and_leaves_its_reports(tmp_path):
    model, data = tiny_model(), tiny_data(4)
    scores = iter([0.1, 0.3, 0.2])
    seen = []

    def evaluator(model, dataset, batch_size):
        seen.append(dataset)
        ap = next(scores)
        return Numbers(AP=ap, AP50=2 * ap)

    config = replace(QUICK, images=120, batch_size=4, lr=4e-2, warmup=0, validations=3, clip=None)
    done = train(model, data, validate=data, out=tmp_path, config=config, quiet=True, evaluator=evaluator)

    losses = done.history["loss"]
    assert len(losses) == 30 and np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert seen == [data] * 3
    assert [ap for ap in done.history["AP"] if ap is not None] == [0.1, 0.3, 0.2]
    assert (done.state.best_ap, done.state.best_position) == (0.3, 80)
    assert sorted(os.listdir(tmp_path)) == [
        "best.safetensors", "curves.png", "last.safetensors", "metrics.csv", "metrics.json", "samples.png",
    ]  # fmt: skip
    assert read_checkpoint(tmp_path).training["state"]["position"] == 80
    numbers = json.loads((tmp_path / "metrics.json").read_text())
    assert numbers["AP"] == 0.2
    assert (numbers["training"]["images"], numbers["training"]["best_AP"]) == (120, 0.3)
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row.position for row in rows] == list(range(4, 121, 4))
    assert [row.loss for row in rows] == losses
    assert rows[0].loss == pytest.approx(rows[0].classification + rows[0].box)
    assert rows[0].gradient_norm > 0 and rows[0].positives > 0


class Numbers(dict):
    def to_json(self):
        return dict(self)


@pytest.mark.parametrize(
    ("rule", "norm", "normaliser"), [(TrainConfig().rule, "group", "batch"), (SGD(), "batch", "moving")]
)
def test_a_killed_training_resumes_bitwise(rule, norm, normaliser, tmp_path):
    config = replace(QUICK, rule=rule)
    whole, parts = tiny_model(norm, normaliser), tiny_model(norm, normaliser)
    train(whole, tiny_data(), out=tmp_path / "whole", config=config, quiet=True)

    # Ctrl-C while step 12 runs: the step is finished and saved.
    data = Wrapped(tiny_data(), interrupt_at(23))
    with pytest.raises(KeyboardInterrupt, match=r"stopped after 24 of 60 images: saved in .*resume to go on"):
        train(parts, data, out=tmp_path / "parts", config=config, quiet=True)

    # A new process would start from a new model, of any seed.
    resumed = tiny_model(norm, normaliser, seed=9)
    train(resumed, tiny_data(), out=tmp_path / "parts", config=config, quiet=True, resume=True)
    assert_same_state(whole.state_dict(), resumed.state_dict())
    a, b = (read_checkpoint(tmp_path / name / "last.safetensors") for name in ("whole", "parts"))
    assert_same_state(a.optimizer, b.optimizer)
    a, b = (without_times(read_metrics(tmp_path / name / "metrics.csv")) for name in ("whole", "parts"))
    assert a == b


def test_a_crash_continues_from_the_last_checkpoint(tmp_path):
    def crash(taken):
        if taken == 51:
            raise MemoryError("crash")

    whole, data = tiny_model(), tiny_data(60)
    train(whole, data, config=QUICK, quiet=True)
    with pytest.raises(RuntimeError, match="crash"):
        train(tiny_model(), Wrapped(data, crash), out=tmp_path, config=QUICK, quiet=True)
    assert read_checkpoint(tmp_path).training["state"]["position"] == 40
    assert len(read_metrics(tmp_path / "metrics.csv")) == 25  # five of them are to be done again
    resumed = tiny_model()
    done = train(resumed, data, out=tmp_path, config=replace(QUICK, workers=1), quiet=True, resume=True)
    assert_same_state(whole.state_dict(), resumed.state_dict())
    assert done.history["step"] == list(range(1, 31))


def test_a_table_that_a_crash_cut_short_is_read_up_to_there(tmp_path):
    train(tiny_model(), tiny_data(), images=6, out=tmp_path, config=QUICK, quiet=True)
    path = tmp_path / "metrics.csv"
    text = path.read_text()
    path.write_text(text[: text.rindex(",", 0, text.rindex(",") - 20)])
    assert [row.position for row in read_metrics(path)] == [2, 4]
    train(tiny_model(), tiny_data(), images=6, out=tmp_path, config=QUICK, quiet=True, resume=True)
    path.write_text("epoch,accuracy\n1,0.5\n")
    assert read_metrics(path) == []


def test_resuming_a_finished_training_only_measures_it(tmp_path):
    model = tiny_model()
    train(model, tiny_data(), images=4, out=tmp_path, config=QUICK, quiet=True)
    config = replace(QUICK, images=4, validations=1)
    done = train(
        model, tiny_data(), validate=tiny_data(), out=tmp_path, config=config, quiet=True, resume=True,
        evaluator=lambda model, dataset, batch_size: Numbers(AP=0.5, AP50=0.6),
    )  # fmt: skip
    assert done.evaluation["AP"] == 0.5
    assert (done.state.position, done.state.best_ap) == (4, 0.5)
    best = read_checkpoint(tmp_path / "best.safetensors")  # as if the first training had been stopped while measuring
    assert best.training["state"] == read_checkpoint(tmp_path / "last.safetensors").training["state"]


def test_an_interrupted_validation_is_finished_and_saved(tmp_path):
    def evaluator(model, dataset, batch_size):
        assert read_checkpoint(tmp_path).training["state"]["position"] == 2  # saved before it began
        os.kill(os.getpid(), signal.SIGINT)
        return Numbers(AP=0.5, AP50=0.6)

    config = replace(QUICK, images=4, validations=2, checkpoints=0)
    with pytest.raises(KeyboardInterrupt, match="stopped after 2 of 4 images"):
        train(
            tiny_model(), tiny_data(), validate=tiny_data(), out=tmp_path, config=config, quiet=True,
            evaluator=evaluator,
        )  # fmt: skip
    for name in ("last", "best"):
        state = read_checkpoint(tmp_path / f"{name}.safetensors").training["state"]
        assert (state["position"], state["best_ap"]) == (2, 0.5)
    with pytest.raises(KeyboardInterrupt, match="stopped after 1 of 4 images: nothing was saved"):
        train(tiny_model(), Wrapped(tiny_data(), interrupt_at(1)), config=replace(config, batch_size=1), quiet=True)


def test_the_second_interrupt_acts_at_once(capsys):
    before = signal.getsignal(signal.SIGINT)  # a background job is started with SIGINT ignored
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert "stopping after this step" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_interrupt_leaves_other_threads_alone():
    entered = []

    def run():
        with Interrupt() as interrupt:
            entered.append(interrupt.requested)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert entered == [False]


@pytest.mark.parametrize("normaliser", ["batch", "image", "moving"])
def test_accumulated_parts_equal_the_whole_batch(normaliser):
    gradients, measured = [], []
    for parts in (1, 2, 3):
        model = tiny_model(normaliser=normaliser)
        (batch,) = Loader(tiny_data(), model.config.preprocess, batch_size=8, images=8)
        # In float64: with fewer images another convolution may be the faster one, and round otherwise.
        batch = replace(batch, images=batch.images.astype(np.float64))
        measured.append(batch_gradient(model, batch, parts, 100.0))
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for other, got in zip(gradients[1:], measured[1:], strict=True):
        assert got.positives == measured[0].positives and got.moving == measured[0].moving
        assert got.loss == pytest.approx(measured[0].loss, rel=1e-6)
        for name, g in gradients[0].items():
            np.testing.assert_allclose(other[name], g, rtol=1e-6, atol=1e-6 * float(np.abs(g).max()), err_msg=name)


def test_it_runs_on_any_array_library():
    weights = []
    config = replace(QUICK, rule=SGD(), lr=0.02)  # Adam steps as far for a gradient that is nothing but rounding
    for library in ("numpy", "array_api_strict"):
        model = tiny_model(xp=backend.load(library))
        train(model, tiny_data(), images=4, config=config, quiet=True)
        weights.append(model.state_dict())
    for name, first in tiny_model().state_dict().items():
        np.testing.assert_allclose(weights[1][name], weights[0][name], rtol=1e-4, atol=1e-6, err_msg=name)
        assert np.abs(weights[0][name] - first).max() > 1e-5, f"{name} has hardly moved"


def test_a_loss_that_is_no_number_names_step_images_and_layer(tmp_path):
    model, data = tiny_model(), tiny_data()
    stem = next(name for name, _ in model.named_parameters())

    def poison(taken):
        if taken == 5:  # while step 3 is loaded
            dict(model.named_parameters())["pyramid.output.0.bias"].data[...] = 3e38

    with pytest.raises(NonFiniteError) as caught:
        train(model, Wrapped(data, poison), out=tmp_path, config=replace(QUICK, checkpoints=30), quiet=True)
    text = str(caught.value)
    assert "step 3: the loss is nan" in text
    assert "The first value that is not finite: the output of" in text and "layer head" in text
    assert "images 4 to 5 of the training: " in text and "train_0000" in text
    assert "a lower learning rate (now 0.00033)" in text
    assert read_checkpoint(tmp_path).training["state"]["position"] == 4
    assert np.isfinite(read_checkpoint(tmp_path).weights[stem]).all()


def test_blame_finds_the_first_bad_value():
    model = tiny_model()
    x = Tensor(np.ones(3), requires_grad=True)
    layer = SimpleNamespace(
        named_parameters=lambda: iter([("block.conv.weight", x)]), state_dict=dict, load_state_dict=dict
    )
    images = np.zeros((1, 2))

    def bad_gradient(x):
        return record("bad", x.data, (x,), lambda gy: (gy * np.inf,))

    def with_nan(x):
        return record("log", x.data * np.nan, (x,), lambda gy: (gy,))

    cases = [
        (np.array([np.nan]), lambda: None, "the input images"),
        (images, lambda: sum(with_nan(x)), "the output of log in layer block.conv"),
        (images, lambda: sum(with_nan(relu(x * 1.0))), "the output of log after layer block.conv"),
        (images, lambda: sum(bad_gradient(x)).backward(), "the gradient of bad in layer block.conv"),
        (images, lambda: None, "nowhere when the step was repeated"),
    ]
    for batch_images, run, expected in cases:
        assert first_non_finite(layer, batch_images, run).startswith(expected)
    name, parameter = list(model.named_parameters())[3]
    parameter.data[...] = np.inf
    assert first_non_finite(model, images, lambda: None) == f"the parameter {name}"


def test_looking_for_the_bad_value_leaves_no_trace_in_batch_norms():
    norm = BatchNorm2d(1)
    x = Tensor(np.ones((1, 2, 1, 1), np.float32))
    first_non_finite(norm, x.data, lambda: norm(x * 3))
    assert norm.running_mean.tolist() == [0] and norm.running_var.tolist() == [1]


def test_trainings_are_not_mixed_up(tmp_path):
    model, data = tiny_model(), tiny_data()
    config = replace(QUICK, images=4)

    def again(model=model, data=data, **changes):
        changes = {"resume": True, "out": tmp_path, "config": config} | changes
        train(model, data, quiet=True, **changes)

    with pytest.raises(CheckpointError, match=r"last\.safetensors: no such checkpoint"):
        again()
    again(resume=False)
    with pytest.raises(ValueError, match=r"already holds a training: resume it \(--resume\), or choose another folder"):
        again(resume=False)
    with pytest.raises(ValueError, match="to resume, say where: out=FOLDER"):
        again(out=None)
    with pytest.raises(CheckpointError, match=r"these settings changed: images: 4 -> 8; seed: 0 -> 1\."):
        again(config=replace(config, images=8, seed=1))
    with pytest.raises(CheckpointError, match=r"model\.loss\.normaliser: 'batch' -> 'image'"):
        again(model=tiny_model(normaliser="image"))
    renumbered = tiny_data()
    renumbered.category_ids = tuple(range(8))
    with pytest.raises(CheckpointError, match=r"classes circle \(1\), .* and 3 more, but the data has circle \(0\)"):
        again(data=renumbered)
    shorter = tiny_data()
    shorter.images -= 1
    with pytest.raises(CheckpointError, match=r"trained on \d+ images, but the data has \d+: their order"):
        again(data=shorter)
    renamed = tiny_data()
    renamed.classes = ("cat", "dog")
    with pytest.raises(ValueError, match=r"the model knows \('circle', .*the data set has \('cat', 'dog'\)"):
        again(data=renamed)
    whole = read_checkpoint(tmp_path)
    write_checkpoint(tmp_path / "last.safetensors", replace(whole, training={}))
    with pytest.raises(CheckpointError, match=r"last\.safetensors: this checkpoint holds weights only: start from it"):
        again()


def test_a_checkpoint_is_all_a_model_needs(tmp_path):
    model, data = tiny_model(), tiny_data()
    train(model, data, images=4, out=tmp_path, config=QUICK, quiet=True)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    image = data[0].image
    np.testing.assert_array_equal(detect(loaded, image).boxes, detect(model, image).boxes)
    whole = read_checkpoint(tmp_path)
    name = next(iter(whole.weights))
    fewer = {k: v for k, v in whole.weights.items() if k != name}
    write_checkpoint(tmp_path / "last.safetensors", replace(whole, weights=fewer))
    with pytest.raises(CheckpointError, match=f"(?s)last.*{name}: missing"):
        load_model(tmp_path / "last.safetensors")
    write_checkpoint(tmp_path / "last.safetensors", replace(whole, model={"clases": []}))
    with pytest.raises(CheckpointError, match="unknown setting 'clases'; did you mean 'classes'"):
        load_model(tmp_path)


def test_a_backbone_of_ones_own_is_passed_in_again(tmp_path):
    data, config = tiny_data(), tiny_model().config

    def backbone():
        return ResNet(replace(config.backbone, widths=(4, 8)), rng=np.random.default_rng(0))

    model = RetinaNet(config, backbone=backbone())
    train(model, data, images=2, out=tmp_path, config=QUICK, quiet=True)
    loaded = load_model(tmp_path, backbone=backbone())
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(loaded.state_dict()[name], array)
    with pytest.raises(CheckpointError, match="the state dict does not fit"):
        load_model(tmp_path)


def test_a_checkpoint_of_format_1_is_still_read():
    stored = Path(__file__).parent / "data" / "checkpoint_v1.safetensors"
    model, checkpoint = load_model(stored), read_checkpoint(stored)
    assert (checkpoint.classes, checkpoint.category_ids) == (("circle", "ring"), (1, 5))
    config = from_json(TrainConfig, checkpoint.training["config"])
    state = restore(checkpoint, model, config.optimizer(model), config, checkpoint, WeightAverage(model, config.ema))
    assert (state.position, state.steps, config.rule) == (4, 2, SGD())
    logits, _ = model(Tensor(np.linspace(-1, 1, 32 * 32 * 3, dtype=np.float32).reshape(1, 32, 32, 3)))
    assert float(np.mean(logits.data)) == pytest.approx(STORED_LOGIT, rel=1e-5)


def test_progress_is_shown(capsys):
    train(
        tiny_model(), tiny_data(), validate=tiny_data(), images=4, config=replace(QUICK, validations=1),
        evaluator=lambda model, dataset, batch_size: Numbers(AP=0.25, AP50=0.5),
    )  # fmt: skip
    shown = capsys.readouterr()
    assert "4 images = 0.10 epochs of 40; 2 steps of 2" in shown.out
    assert "4 images: AP 0.250, AP50 0.500" in shown.out
    assert "4/4" in shown.err and "N_pos" in shown.err and "backward" in shown.err
