"""The doctor: sound data pass, every sabotage is named with its cure, and what is predicted comes true."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import tiny
from sabotage import SABOTAGES, sound_folder

import minidet as md
from minidet import cli
from minidet.autograd import Tensor
from minidet.cli.train import _with
from minidet.data import write_coco
from minidet.detection import BACKGROUND, Targets, loss
from minidet.images import open_image
from minidet.inspection import coverage as coverage_module
from minidet.inspection.coverage import best_possible, limits_text, longest, measure_coverage, recommend
from minidet.inspection.findings import MUST_FIX, WARNING
from minidet.inspection.raw import read_raw
from minidet.inspection.trial import check_trial, expected_first_loss, run_trial
from minidet.kernels import best_matches
from minidet.models import RetinaNet, presets
from minidet.training import SCRATCH, Checkpoint, TrainConfig, write_checkpoint
from minidet.training.settings import to_json

SETTINGS = [f"{name}={value}" for name, value in tiny.SETTINGS.items()]
NO_TRIAL = "minidet.inspection.doctor._tried"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return sound_folder(tmp_path_factory.mktemp("sound") / "data")


@pytest.fixture
def untried(monkeypatch):
    """Without the training that is tried: these tests are of data."""
    monkeypatch.setattr(NO_TRIAL, lambda *_: (None, []))


def tiny_settings(classes, images, *more):
    return _with([*SETTINGS, *more], presets.small(classes), replace(SCRATCH, images=40, batch_size=2))


def serious(diagnosis):
    return {finding.code for finding in diagnosis.findings if finding.severity in (MUST_FIX, WARNING)}


# --- data ------------------------------------------------------------------------------------------------


def test_sound_data_pass(sound, untried):
    diagnosis = md.doctor(sound)
    assert serious(diagnosis) == set() and diagnosis.status == 0
    assert diagnosis.table().endswith("OK: go")
    assert "24 images, 77 boxes, 8 classes" in diagnosis.table()


@pytest.mark.parametrize("name", SABOTAGES)
def test_every_sabotage_is_named_with_its_cure(name, sound, untried, tmp_path):
    sabotage = SABOTAGES[name]
    folder = shutil.copytree(sound, tmp_path / "data")
    sabotage.spoil(folder)
    diagnosis = md.doctor(folder)
    (finding,) = [finding for finding in diagnosis.findings if finding.code == sabotage.code]
    assert (finding.severity, finding.count) == (sabotage.severity, sabotage.count)
    told = " ".join([finding.what, *finding.where, finding.cause, finding.fix])
    assert [word for word in sabotage.words if word not in told] == []
    assert finding.cause and finding.fix
    assert serious(diagnosis) - {sabotage.code} <= set(sabotage.also), "what is sound is not blamed"
    assert diagnosis.status == (2 if sabotage.severity == MUST_FIX else 1)


def test_several_sabotages_at_once_are_all_named(sound, untried, tmp_path):
    """The reader stops at the first mistake; the doctor must not."""
    folder = shutil.copytree(sound, tmp_path / "data")
    names = ("missing files", "annotation ids twice", "truncated image", "renamed class", "images in both splits")
    for name in names:
        SABOTAGES[name].spoil(folder)
    assert {SABOTAGES[name].code for name in names} <= serious(md.doctor(folder))


def saved_run(folder, classes):
    """A checkpoint of a network that was never trained."""
    config, _ = tiny_settings(classes, 1)
    saved = Checkpoint(to_json(config), classes, tuple(range(1, len(classes) + 1)), RetinaNet(config).state_dict())
    write_checkpoint(folder / "last.safetensors", saved)
    return folder


def test_classes_of_a_checkpoint(sound, untried, tmp_path):
    names = md.shapes().classes
    for n, (classes, code, severity) in enumerate((
        (names, None, None),
        (names[::-1], "classes-reordered", WARNING),
        ((*names[:-1], "dog"), "classes-differ", WARNING),
    )):  # fmt: skip
        run = saved_run(tmp_path / str(n), classes)
        found = [f for f in md.doctor(sound, init=run).findings if f.code.startswith("classes-")]
        assert [(f.code, f.severity) for f in found] == ([(code, severity)] if code else [])
    assert "label 0 is 'circle' in instances_train.json, 'half' in" in " ".join(
        w for f in md.doctor(sound, init=tmp_path / "1").findings for w in f.where
    )


def test_raw_columns_are_the_files(sound):
    raw = read_raw(sound / "annotations" / "instances_train.json", "train")
    data = json.loads((sound / "annotations" / "instances_train.json").read_text())
    assert raw.ids.tolist() == [entry["id"] for entry in data["annotations"]]
    assert raw.bbox.tolist() == [entry["bbox"] for entry in data["annotations"]]
    assert raw.usable.all() and not raw.broken
    assert [raw.image_ids[row] for row in raw.image_row] == [entry["image_id"] for entry in data["annotations"]]


@pytest.mark.parametrize("name", ["bccd", "coco_free80"])
def test_real_data_have_no_mistake(name, data_folder, untried):
    diagnosis = md.doctor(data_folder(name), quick=True)
    assert diagnosis.status < 2
    assert serious(diagnosis) <= {"class-without-objects"}


# --- coverage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["paper", "torchvision_v1", "detectron2", "small"])
def test_coverage_is_that_of_all_anchors(preset, rng, undrawn):
    """Against the matcher's kernel on every anchor of the padded image."""
    config = presets.PRESETS[preset](("a",))
    config = replace(config, preprocess=replace(config.preprocess, min_size=224, max_size=320))
    model = RetinaNet(config, xp=np)
    for H, W in ((300, 400), (333, 200)):
        corner = rng.uniform(0, [W - 12, H - 12], (60, 2))
        far = np.minimum(corner + np.exp(rng.uniform(1, 5.5, (60, 2))), [W, H])
        boxes = np.concatenate([corner, far], axis=1).astype(np.float32)
        got = measure_coverage(config, model.maps, boxes, np.tile([H, W], (60, 1)), np.zeros(60, int))
        new = config.preprocess.size(H, W)
        padded = [-(-side // 32) * 32 for side in new]
        inside = config.preprocess.boxes(boxes, (H, W), new)
        anchors = model.anchors(*padded)
        np.testing.assert_allclose(got.iou, best_matches(anchors, inside)[2], atol=2e-6)
        # No anchor of the grid does better than the best shape at its best place.
        assert np.all(got.iou <= best_possible(got.sides, config.anchors) + 1e-6)


def test_half_a_stride_off_is_the_worst_where_anchors_stand_all_around(rng, undrawn):
    config = presets.paper(("a",))
    model = RetinaNet(config, xp=np)
    sides = np.exp(rng.uniform(3, 5.5, (200, 2)))
    centres = rng.uniform(200, 400, (200, 2))
    boxes = np.concatenate([centres - sides / 2, centres + sides / 2], axis=1)
    got = measure_coverage(config, model.maps, boxes, np.tile([600, 600], (200, 1)), np.zeros(200, int))
    worst = best_possible(sides, config.anchors, shift=0.5)
    assert np.all(got.iou >= worst - 1e-6) and np.mean(got.iou - worst) > 0.05


def test_the_limits_of_the_papers_anchors():
    anchors = presets.paper(("a",)).anchors
    assert longest(0.5, anchors) == pytest.approx(4.5) and longest(0.4, anchors) == pytest.approx(6.125)
    told = limits_text(presets.paper(("a",)))
    assert "IoU 0.5 needs 512 px² after resizing (22.6 px square) and at most 4.5 : 1" in told
    size = 32 * 2 ** (1 / 3)
    for q, reached in ((2.25, 0.5), (49 / 16, 0.4)):  # a box q times as long as the longest anchor
        side = np.array([[size * math.sqrt(2 * q), size / math.sqrt(2 * q)]])
        assert best_possible(side, anchors)[0] == pytest.approx(reached, rel=1e-6)
    assert best_possible(np.array([[16 * math.sqrt(2)] * 2]), anchors)[0] == pytest.approx(0.5, rel=1e-6)


def test_what_is_recommended_helps_and_can_be_typed(rng, undrawn):
    config = presets.small(("a",))
    model = RetinaNet(config, xp=np)
    corner = rng.uniform(0, 100, (300, 2))
    for sides in (np.full((300, 2), 7.0), np.tile([60.0, 8.0], (300, 1))):
        boxes, sizes = np.concatenate([corner, corner + sides], axis=1), np.tile([200, 200], (300, 1))
        before = measure_coverage(config, model.maps, boxes, sizes, np.zeros(300, int))
        lines, told = recommend(before, model.maps, boxes, sizes)
        flags = [word.strip("'") for line in lines for word in line.split("--set ") if word.strip()]
        changed, _ = _with([flag.strip().strip("'") for flag in flags], config, SCRATCH)
        after = measure_coverage(changed, model.maps, boxes, sizes, np.zeros(300, int))
        assert after.shares()[0] > before.shares()[0] + 0.5
        assert told == f"then {after.shares()[0]:.1%} reach 0.5"


def test_nothing_is_laid_out(monkeypatch, undrawn):
    """Ten times the objects in blocks: the same shares."""
    config = presets.small(("a",))
    model = RetinaNet(config, xp=np)
    boxes = np.tile([[10.0, 10, 40, 40], [5, 5, 9, 9]], (50, 1))
    whole = measure_coverage(config, model.maps, boxes, np.tile([128, 128], (100, 1)), np.zeros(100, int))
    monkeypatch.setattr(coverage_module, "BLOCK", 7)
    again = measure_coverage(config, model.maps, boxes, np.tile([128, 128], (100, 1)), np.zeros(100, int))
    np.testing.assert_array_equal(whole.iou, again.iou)
    assert whole.shares() == (0.5, 0.0, 0.5)
    assert set(whole.groups) == {"small objects", "level P3", "class a"}


# --- the trial -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"alpha": None}, {"gamma": 0.0}, {"normaliser": "image"}])
def test_the_expected_first_loss(settings):
    """Against the criterion, shown logits that all say the prior."""
    config = presets.paper(("a", "b", "c"))
    criterion = replace(config.loss, **settings)
    labels = np.full((2, 50), BACKGROUND)
    labels[0, :3], labels[1, 40:], labels[1, 5] = 1, -2, 0
    weights, none = np.array([0.3, 0.7]), np.zeros((0, 4))
    targets = Targets(labels, np.zeros(0, np.int64), none, none, np.array([3, 1]), np.zeros((50, 4)))
    logits = Tensor(np.full((2, 50, 3), -math.log(99)))
    said = loss(logits, Tensor(np.zeros((2, 50, 4))), targets, weights, criterion, config.coder).classification
    assert expected_first_loss(criterion, 0.01, labels, weights, 3) == pytest.approx(said, rel=1e-9)


@pytest.fixture(scope="module")
def tried():
    """A trial of the tiny network, the network, and the weights it had."""
    config, recipe = tiny_settings(md.shapes().classes, 1, "validations=1")
    model = RetinaNet(config)
    before = {name: array.copy() for name, array in model.state_dict().items()}
    train, val = md.shapes("train", images=20, size=64), md.shapes("val", images=4, size=64)
    return run_trial(model, train, val, recipe, program=10**8, quick=True), model, before, recipe


def test_a_trial_changes_nothing(tried):
    _, model, before, _ = tried
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_trial_of_a_sound_training(tried):
    trial, _, _, recipe = tried
    assert 0.5 < trial.first_loss / trial.expected_loss < 2
    assert trial.heart[-1] <= 0.5 * trial.heart[0]
    assert trial.steps == 20 and trial.tried == trial.part == 2
    assert set(trial.seconds) == {"data", "match", "forward", "backward", "update"}
    assert all(value > 0 for value in trial.seconds.values()) and trial.validation_seconds > 0
    assert trial.peak > 10**8 and trial.counted > 10**5
    assert list(check_trial(trial, recipe)) == []
    assert "closed form" in trial.table() and "peak memory" in trial.table()


def test_a_prior_that_was_lost(tried):
    """A class output without its bias starts with a loss hundreds of times too large."""
    _, model, before, recipe = tried
    data = md.shapes("train", images=4, size=64)
    model.load_state_dict(before | {"head.class_subnet.final.bias": 0 * before["head.class_subnet.final.bias"]})
    found = list(check_trial(run_trial(model, data, None, recipe, program=0, quick=True), recipe))
    model.load_state_dict(before)
    assert [(f.code, f.severity) for f in found if f.code == "first-loss"] == [("first-loss", MUST_FIX)]


def test_a_rate_at_which_nothing_is_learned(tried, monkeypatch):
    monkeypatch.setattr("minidet.inspection.trial.BUDGET", 1e6)  # however busy the machine is
    _, model, _, recipe = tried
    data = md.shapes("train", images=4, size=64)
    for lr, severity in ((1e-9, WARNING), (1e25, MUST_FIX)):
        wrong = replace(recipe, lr=lr, clip=1e9)
        found = list(check_trial(run_trial(model, data, None, wrong, program=0, quick=True), wrong))
        assert [f.severity for f in found if f.code == "not-learned-by-heart"] == [severity]


def test_memory_that_is_not_there(tried):
    trial, _, _, _ = tried
    gib = 2**30
    recipe = TrainConfig(batch_size=16)
    large = replace(trial, memory={"program": gib, "activations": 15 * gib}, available=8 * gib, part=16)
    (finding,) = check_trial(large, recipe)
    assert (finding.code, finding.severity) == ("memory", MUST_FIX)
    assert "16.0 of 8.0 GiB" in finding.what and "--set accumulate=3 " in finding.fix
    (finding,) = check_trial(replace(large, available=18 * gib), recipe)
    assert finding.severity == WARNING and "--set accumulate=2 " in finding.fix
    assert "smaller" in next(check_trial(replace(large, available=gib), recipe)).fix


# --- the whole -------------------------------------------------------------------------------------------


@pytest.fixture
def minidet(capsys):
    def run(*arguments, status):
        got = cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert got == status, printed.out + printed.err
        return printed

    return run


def test_the_command(minidet, sound, tmp_path):
    flags = ["--images", 40, "--batch-size", 2, "--set", "validations=0", "--quick", *tiny.NETWORK]
    flags += ["--set", "model.anchors.sizes=[[16, 20, 25], [32, 40, 50]]"]
    printed = minidet("doctor", "--data", sound, "--out", tmp_path, *flags, status=0)
    assert "OK: go" in printed.out and "20 steps" in printed.out
    report = json.loads((tmp_path / "doctor.json").read_text())
    assert report["status"] == 0 and report["trial"]["steps"] == 20
    assert report["coverage"]["all"][0] == 77
    assert sum(report["coverage"]["all"][1:]) == pytest.approx(1)
    assert (tmp_path / "doctor.txt").read_text() in printed.out
    assert open_image(tmp_path / "doctor.png").shape == (1200, 1680, 3)


def test_the_commands_status_is_for_scripts(minidet, sound, tmp_path, untried):
    folder = shutil.copytree(sound, tmp_path / "data")
    SABOTAGES["copies of an image"].spoil(folder)
    assert "WARNINGS" in minidet("doctor", "--data", folder, status=1).out
    SABOTAGES["corners"].spoil(folder)
    out = minidet("doctor", "--data", folder, "--out", tmp_path / "out", status=2).out
    assert "MUST FIX: do not train before this is fixed" in out
    assert open_image(tmp_path / "out" / "doctor.png").shape == (1200, 1680, 3)
    assert "no such file or folder" in minidet("doctor", "--data", tmp_path / "nowhere", status=2).err


def test_built_in_data_and_data_of_ones_own(untried):
    diagnosis = md.doctor(md.shapes("train", images=200), validate=md.shapes("val", images=50))
    assert diagnosis.status == 0 and set(diagnosis.splits) == {"train", "val"}
    assert len(diagnosis.coverage) > 500 and diagnosis.to_json()["trial"] is None


def test_data_that_training_refuses_for_another_reason(sound, tmp_path, monkeypatch):
    """Were a check to miss what the reader refuses, the verdict must still not be "go"."""
    folder = shutil.copytree(sound, tmp_path / "data")
    SABOTAGES["annotation ids twice"].spoil(folder)
    monkeypatch.setattr("minidet.inspection.doctor.check_annotations", lambda raw, learned: [])
    diagnosis = md.doctor(folder, settings=tiny_settings)
    (finding,) = [f for f in diagnosis.findings if f.code == "refused"]
    assert finding.severity == MUST_FIX and "annotation id" in finding.what


PREDICTED = """
import json, sys
from minidet import cli
sys.exit(min(1, cli.main(["doctor", *sys.argv[1:]]) // 2))
"""
MEASURED = """
import json, sys
from minidet import cli
from minidet.inspection.process import peak
status = cli.main(["train", *sys.argv[1:]])
print(json.dumps(peak()))
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", ["shapes", "bccd", "photos"])
def test_predictions_come_true(case, tmp_path, data_folder):
    """Time of a step and peak memory, against a run in a process of its own; the best of three predictions.

    A machine that does other work at the same time slows both down, but not alike.
    """
    if case == "shapes":
        write_coco(md.shapes("train", images=160), tmp_path / "data", "train")
        data, flags = tmp_path / "data", ["--images", "480", "--set", "batch_size=16"]
    elif case == "bccd":
        data, flags = data_folder("bccd"), ["--images", "80", "--preset", "resnet18"]
        flags += ["--set", "model.backbone.norm.name=group", "--set", "model.backbone.norm.groups=8"]
        flags += ["--set", "augment.transpose=true"]
    else:
        data, flags = data_folder("coco_free80"), ["--images", "40", "--set", "accumulate=2"]
    flags = ["--data", str(data), *flags, "--set", "validations=0", "--set", "samples=0"]
    environment = os.environ | {"NUMBA_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

    def run(program, *more):
        command = [sys.executable, "-c", program, *flags, *map(str, more)]
        return subprocess.run(command, capture_output=True, text=True, timeout=1800, env=environment, check=True).stdout

    measured = []
    for n in range(3):
        run(PREDICTED, "--out", tmp_path / f"doctor{n}")
        printed = run(MEASURED, "--out", tmp_path / f"run{n}", "--quiet")
        rows = np.genfromtxt(tmp_path / f"run{n}" / "metrics.csv", delimiter=",", names=True)
        milliseconds = sum(rows[f"{phase}_ms"] for phase in ("data", "match", "forward", "backward", "update"))
        measured.append((float(np.median(milliseconds[2:])) / 1e3, json.loads(printed.splitlines()[-1])))
    trials = [json.loads((tmp_path / f"doctor{n}" / "doctor.json").read_text())["trial"] for n in range(3)]
    seconds = [trial["step_seconds"] for trial in trials]
    for name, predicted, found in (
        ("seconds a step", min(seconds), min(second for second, _ in measured)),
        ("peak bytes", np.median([t["peak_bytes"] for t in trials]), np.median([size for _, size in measured])),
    ):
        print(f"{case}: {name}: predicted {predicted:,.4g}, measured {found:,.4g}, off by {predicted / found - 1:+.1%}")
        assert 0.75 < predicted / found < 1.25, name
