"""The command from end to end: what it prints, what it leaves, how it stops, how it goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
from PIL import Image

from minidet import cli
from minidet.autograd import Tensor
from minidet.cli import command
from minidet.cli.train import _with
from minidet.data import coco, shapes
from minidet.detect import detect
from minidet.detection import postprocess
from minidet.evaluation.report import NUMBERS
from minidet.images import open_image
from minidet.models import presets
from minidet.training import SCRATCH, load_model, read_checkpoint
from minidet.training.monitor import read_metrics

STEPS_30 = ["--images", "60", "--batch-size", "2", "--set", "validations=0", "--set", "samples=0", "--quiet"]
REPORTS = {"best.safetensors", "curves.png", "last.safetensors", "metrics.csv", "metrics.json", "samples.png"}


@pytest.fixture
def minidet(capsys):
    """`minidet("eval", run, ...)` runs the command in this process; what it printed, once it returned `status`."""

    def run(*arguments, status: int = 0):
        capsys.readouterr()
        got = cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert got == status, printed.err
        return printed

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.coco_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A training of four steps with one validation."""
    out = tmp_path_factory.mktemp("runs") / "first"
    arguments = ["--epochs", "1", "--batch-size", "2", "--set", "validations=1", "--quiet", *tiny.NETWORK]
    assert cli.main(["train", "--data", str(folder), "--out", str(out), *arguments]) == 0
    return out


def weights(run) -> dict[str, np.ndarray]:
    return read_checkpoint(run / "last.safetensors").weights


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def assert_metrics(path, images):
    numbers = json.loads(path.read_text())
    assert numbers.keys() >= {*NUMBERS, "per_class", "images", "seconds"}
    assert numbers["images"] == images and numbers["seconds"] > 0
    assert all(-1 <= numbers[name] <= 1 for name in NUMBERS)
    assert numbers["per_class"]["circle"].keys() == {"AP", "AP50"}


# --- training --------------------------------------------------------------------------------------------


def test_the_built_in_images(minidet, tmp_path, monkeypatch):
    """README's command with the preset as it is, on a hundredth of the images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minidet.cli.options.SHAPES_VAL", 4)
    printed = minidet("train", "--data", "shapes", "--images", 48, "--set", "validations=1")
    assert "48 images = 0.00 epochs of 28,800; 2 steps of 24" in printed.out
    assert "AP   IoU .50:.95" in printed.out and all(name in printed.out for name in shapes().classes)
    assert "in runs/shapes: metrics.json, metrics.csv, curves.png, samples.png" in printed.out
    assert "N_pos" in printed.err  # the progress bar's
    out = tmp_path / "runs" / "shapes"
    assert set(os.listdir(out)) == REPORTS
    assert_metrics(out / "metrics.json", 4)
    assert load_model(out).config.backbone.widths == (16, 32, 64, 128)
    printed = minidet("eval", out, "--data", "shapes")
    assert printed.out.startswith("4 images, ")


def test_a_coco_folder(run, folder):
    assert set(os.listdir(run)) == REPORTS
    assert_metrics(run / "metrics.json", 3)
    assert [row.position for row in read_metrics(run / "metrics.csv")] == [2, 4, 6, 8]
    model = load_model(run)
    assert model.config.classes == coco(folder).classes
    assert model.config.backbone.widths == (8, 8)


def test_data_without_validation(minidet, tmp_path):
    """Nothing is measured on the images of the training instead, also not where one file is given."""
    data = tiny.coco_folder(tmp_path / "data", train=2)
    (data / "annotations" / "instances_val.json").unlink()
    for name in (data, data / "annotations" / "instances_train.json"):
        run = tmp_path / name.stem
        printed = minidet("train", "--data", name, "--out", run, "--images", 2, "--quiet", *tiny.NETWORK)
        assert f"{name.name} has no annotations/instances_val.json: AP will not be measured" in printed.err
        assert "IoU" not in printed.out
        assert "AP" not in json.loads((run / "metrics.json").read_text())


def test_validation_is_found_under_the_names_of_coco_2017(minidet, tmp_path):
    data = tiny.coco_folder(tmp_path / "data", train=2)
    for file in list((data / "annotations").iterdir()):
        file.rename(file.with_name(f"{file.stem}2017.json"))
    flags = ["--images", 2, "--quiet", "--set", "validations=1"]
    minidet("train", "--data", data, "--out", tmp_path / "run", *flags, *tiny.NETWORK)
    assert_metrics(tmp_path / "run" / "metrics.json", 3)


def test_the_seed_decides(minidet, folder, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        flags = ["--images", 4, "--batch-size", 2, "--seed", seed, "--set", "validations=0", "--quiet"]
        minidet("train", "--data", folder, "--out", tmp_path / name, *flags, *tiny.NETWORK)
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    name = "pyramid.output.0.weight"
    assert np.any(weights(tmp_path / "a")[name] != weights(tmp_path / "c")[name])


def test_starting_from_a_run(minidet, run, tmp_path):
    """Its settings come with its weights; a head for other classes starts anew."""
    data = tiny.coco_folder(tmp_path / "data", train=2)
    file = data / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"] = []
    content["categories"] = [{"id": 7, "name": "cat"}]
    file.write_text(json.dumps(content))
    (data / "annotations" / "instances_val.json").unlink()
    for init in (run, run / "best.safetensors"):
        out = tmp_path / init.name
        printed = minidet("train", "--data", data, "--init", init, "--out", out, "--images", 1, "--quiet")
        assert "best.safetensors (minidet checkpoint): " in printed.out
        assert re.search(r"skipped head\.\S+: its 8 classes are others than the model's 1", printed.out)
        model = load_model(out)
        assert (model.config.classes, model.config.backbone.widths) == (("cat",), (8, 8))


def test_a_run_is_never_overwritten(minidet, run, folder):
    before = (run / "last.safetensors").read_bytes()
    printed = minidet("train", "--data", folder, "--out", run, "--images", 2, *tiny.NETWORK, status=2)
    assert "already holds a training: resume it (--resume), or choose another folder" in printed.err
    assert (run / "last.safetensors").read_bytes() == before


def test_resuming_needs_no_settings_and_refuses_others(minidet, run, folder):
    before = weights(run)
    printed = minidet("train", "--data", folder, "--out", run, "--resume", "--quiet")
    assert "3 images, " in printed.out  # nothing was left to do but to measure
    assert_same(weights(run), before)
    minidet("train", "--data", folder, "--out", run, "--resume", "--epochs", 1, "--set", "workers=1", "--quiet")
    for flags, change in (
        (["--images", 40], "images: 8 -> 40"),
        (["--seed", 3], "seed: 0 -> 3"),
        (["--set", "model.head.prior=0.5"], "model.head.prior: 0.01 -> 0.5"),
        (["--preset", "small"], "model.backbone.stem: 8 -> 16"),
    ):
        printed = minidet("train", "--data", folder, "--out", run, "--resume", *flags, status=2)
        assert "to resume is to continue the same training, but these settings changed" in printed.err
        assert change in printed.err


# --- stopping --------------------------------------------------------------------------------------------

KILLED = """
import os, sys
from minidet import cli
from minidet.data.reading import Reader

number, count = int(sys.argv[1]), int(sys.argv[2])
resized, taken = Reader.resized, 0

def counting(self, *args):
    global taken
    taken += 1
    if taken == count:
        os.kill(os.getpid(), number)
    return resized(self, *args)

Reader.resized = counting
sys.exit(cli.main(sys.argv[3:]))
"""
"""The command, sent signal NUMBER while it takes its COUNT-th picture, read now or kept from an epoch before."""


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """Thirty steps at a stretch."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert cli.main(["train", "--data", str(folder), *STEPS_30, "--out", str(out), *tiny.NETWORK]) == 0
    return out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda n: n.name)
def test_thirty_steps_are_twelve_and_eighteen(minidet, whole, folder, tmp_path, number):
    """Killed after 12 of 30 steps and resumed: the weights are bitwise those of the training never stopped.

    kill -9 loses the steps since the last of ten saves; they are done again.
    """
    train = ["train", "--data", folder, *STEPS_30, "--out"]
    parts = tmp_path / "parts"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(int(number)), "25", *map(str, [*train, parts, *tiny.NETWORK])],
        capture_output=True,
        text=True,
        timeout=300,
    )
    stopped = read_checkpoint(parts).training["state"]["position"]
    if number == signal.SIGKILL:
        assert (killed.returncode, stopped) == (-signal.SIGKILL, 24)
    else:
        assert (killed.returncode, stopped) == (130, 26)
        assert "minidet: stopped after 26 of 60 images: saved in" in killed.stderr

    minidet("train", "--data", folder, "--out", parts, "--resume", "--quiet")
    assert_same(weights(whole), weights(parts))
    losses = [[row.loss for row in read_metrics(run / "metrics.csv")] for run in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 30


def test_control_c_saves(folder, tmp_path):
    """The installed command, interrupted from outside: one line, status 130, and something to go on from."""
    out = tmp_path / "run"
    flags = ["--images", "1000000", "--batch-size", "2", "--set", "checkpoints=0", *tiny.NETWORK]
    command = [sys.executable, "-m", "minidet", "train", "--data", str(folder), "--out", str(out), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 240
        while len(read_metrics(out / "metrics.csv")) < 2 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "stopping after this step; once more stops at once, without saving" in said
    assert f"saved in {out}/last.safetensors; resume to go on" in said
    assert "Traceback" not in said
    assert read_checkpoint(out).training["state"]["position"] >= 4


def test_control_c_where_there_is_nothing_to_save(minidet, run, folder, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("minidet.cli.eval.evaluate_together", interrupted)
    assert minidet("eval", run, "--data", folder, status=130).err == "minidet: interrupted\n"


def test_a_training_that_explodes_says_where(minidet, folder, tmp_path):
    flags = ["--images", 40, "--batch-size", 2, "--set", "lr=1e25", "--set", "clip=1e9", "--set", "validations=0"]
    printed = minidet("train", "--data", folder, "--out", tmp_path, "--quiet", *tiny.NETWORK, *flags, status=2)
    assert re.search(r"minidet: step \d+: the loss is (nan|inf).*\nThe first value that is not finite: ", printed.err)
    assert "a lower learning rate" in printed.err


def test_a_network_that_does_not_fit_into_memory(minidet, folder, tmp_path, monkeypatch):
    def full(*_, **__):
        raise MemoryError("Unable to allocate 60 GiB")

    monkeypatch.setattr("minidet.cli.train.train", full)
    printed = minidet("train", "--data", folder, "--out", tmp_path, *tiny.NETWORK, status=2)
    assert printed.err == "minidet: out of memory: Unable to allocate 60 GiB; try a smaller --batch-size\n"


# --- evaluating ------------------------------------------------------------------------------------------


def test_eval(minidet, run, folder, tmp_path):
    printed = minidet("eval", run, "--data", folder, "--split", "train", "--out", tmp_path)
    assert printed.out.startswith("8 images, ") and "AR   100 detections" in printed.out
    assert_metrics(tmp_path / "metrics.json", 8)
    assert open_image(tmp_path / "precision_recall.png").shape[1] > 300
    checked = minidet("eval", run / "last.safetensors", "--data", folder, "--check").out
    assert_metrics(run / "metrics.json", 3)
    again = checked.partition("pycocotools on the same")[2]
    rows = re.findall(r"^(A[PR]\w*) +(-?[\d.]+) +(-?[\d.]+) +(\S+)$", again, re.M)
    assert [row[0] for row in rows] == list(NUMBERS)
    assert all(ours == theirs and abs(float(apart)) < 1e-9 for _, ours, theirs, apart in rows)


def test_eval_of_a_split_that_is_not_there(minidet, run, folder):
    printed = minidet("eval", run, "--data", folder, "--split", "test", status=2)
    assert "no annotations/instances_test.json; it has the splits train, val" in printed.err


# --- detecting -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resizing(folder, tmp_path_factory):
    """A run whose network sees every picture 64 pixels high."""
    out = tmp_path_factory.mktemp("runs") / "resizing"
    size = ["--set", "model.preprocess.min_size=64", "--set", "model.preprocess.max_size=128"]
    arguments = ["--images", "2", "--batch-size", "2", *size, "--set", "validations=0", "--quiet", *tiny.NETWORK]
    assert cli.main(["train", "--data", str(folder), "--out", str(out), *arguments]) == 0
    return out


def test_boxes_are_in_the_pictures_own_pixels(minidet, resizing, tmp_path, rng):
    """Against the network called by hand: a picture of 300 x 200 is seen as 96 x 64, so boxes grow by 300 / 96."""
    Image.fromarray(rng.integers(0, 256, (200, 300, 3), dtype=np.uint8)).save(tmp_path / "wide.jpg", quality=95)
    out = tmp_path / "found"
    printed = minidet("detect", resizing, tmp_path / "wide.jpg", "--out", out, "--threshold", 0)
    assert f"{tmp_path / 'wide.jpg'}: 100 drawn (score > 0), 100 in wide.json" in printed.out

    model = load_model(resizing)
    image = open_image(tmp_path / "wide.jpg")
    seen = model.config.preprocess.prepare(image)
    assert seen.shape == (64, 96, 3)
    logits, deltas = model(Tensor(seen[None]))
    (expected,) = postprocess(
        logits.data, deltas.data, model.anchors(64, 96), model.level_counts(64, 96), [(64, 96)],
        model.config.postprocess, model.config.coder,
    )  # fmt: skip
    text = (out / "wide.json").read_text()
    result = json.loads(text)
    assert text.count("\n") == 100 + 2  # a line for each
    assert (result["width"], result["height"]) == (300, 200)
    assert result["image"] == str(tmp_path / "wide.jpg")
    boxes = np.array([found["box"] for found in result["detections"]])
    np.testing.assert_allclose(boxes, expected.boxes * ([300 / 96, 200 / 64] * 2), atol=0.006)  # two decimals
    assert boxes[:, 2].max() > 250 and boxes[:, 3].max() > 150
    assert [found["label"] for found in result["detections"]] == [model.config.classes[k] for k in expected.labels]
    np.testing.assert_allclose([found["score"] for found in result["detections"]], expected.scores, atol=6e-5)
    assert result == detect(model, tmp_path / "wide.jpg").to_json()

    drawn = open_image(out / "wide.png")
    assert drawn.shape[0] / drawn.shape[1] == image.shape[0] / image.shape[1] and drawn.shape >= image.shape


def test_folders_and_files_of_every_kind(minidet, run, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, mode in (("a.png", "L"), ("b.JPG", "RGB"), ("c.gif", "P")):
        Image.new(mode, (70, 50)).save(photos / name, format="JPEG" if name == "b.JPG" else None)
    (photos / "notes.txt").write_text("not a picture")
    Image.new("RGB", (64, 64)).save(tmp_path / "d.bmp")
    out = tmp_path / "new" / "found"
    minidet("detect", run, photos, tmp_path / "d.bmp", "--out", out, "--threshold", 0.9)
    assert sorted(os.listdir(out)) == [f"{name}.{suffix}" for name in "abcd" for suffix in ("json", "png")]
    assert open_image(out / "b.png").max() < 16  # nothing scores that much, so nothing is drawn


# --- helping ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["train"], ["eval"], ["detect"], ["download"], ["doctor"], ["explain"]])
def test_help_shows_examples(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"examples:\n  minidet {' '.join(command)}" in shown
    assert max(map(len, shown.splitlines())) <= 115


def test_the_examples_of_the_help_are_understood():
    examples = "".join(part.EXAMPLES for part in (command, *command.SUBCOMMANDS)).splitlines()
    commands = [re.split(r"\s{2,}", line.strip())[0].split()[1:] for line in examples if line.startswith("  minidet ")]
    assert len(commands) >= 12
    for words in commands:
        assert command._parser().parse_args(words).run
    settings = [word for line in examples for word in line.split() if "=" in word and line.startswith("  --set")]
    assert len(settings) == 5
    config, recipe = _with(settings, presets.small(("a",)), SCRATCH)
    assert (recipe.lr, config.head.depth, config.preprocess.max_size) == (0.002, 4, 640)


def test_a_mistake_ends_in_one_line_and_status_2(tmp_path):
    """In a process of its own, where a traceback could not hide."""
    command = [sys.executable, "-m", "minidet", "train", "--data", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr == f"minidet: {tmp_path}/nowhere: no such file or folder\n"
