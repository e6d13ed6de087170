"""What users get wrong, and what they are told: one table, from flags to files to the environment.

A row is a name, what to do, and the message.  What to do is arguments of the command, which must end with status
2, or a call from Python, which must raise; either is made by a function of a `Place`, where files can be spoilt.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from safetensors.numpy import save_file
from test_checkpoint import rewritten
from test_coco import boxes, changed, content, write
from test_images import bomb, truncated

import minidet as md
from minidet import cli
from minidet.evaluation.average_precision import accumulate
from minidet.training import read_checkpoint, write_checkpoint

HALF = {"class": "SGD", "momentum": 2}


@dataclass(frozen=True)
class Place:
    """A folder for this test alone, a data set, and a finished training."""

    path: Path
    data: Path
    run: Path

    def train(self, *flags, data=None) -> list:
        """Arguments that would train for one image, were it not for `flags`."""
        length = [] if {"--images", "--epochs", "--resume"} & set(flags) else ["--images", 1]
        out = [] if "--out" in flags else ["--out", self.path / "out"]
        network = [] if "--preset" in flags or "--resume" in flags or "--init" in flags else tiny.NETWORK
        return ["train", "--data", data or self.data, "--quiet", *length, *out, *network, *flags]

    def set(self, setting: str) -> list:
        return self.train("--set", setting)

    def json(self, data) -> list:
        """Training on a data set whose json holds `data`."""
        return self.train(data=write(self.path / "set", copy.deepcopy(data)))

    def picture(self, name: str, make: Callable[[Path], object]) -> list:
        """Detecting in a file that `make` writes."""
        make(self.path / name)
        return self.detect(self.path / name)

    def detect(self, *arguments) -> list:
        return ["detect", self.run, *arguments, "--out", self.path / "found"]

    def checkpoint(self, **changes) -> list:
        """Evaluating a checkpoint whose metadata are changed."""
        path = Path(shutil.copy(self.run / "last.safetensors", self.path / "last.safetensors"))
        rewritten(path, **changes)
        return ["eval", path, "--data", self.data]

    def weights(self, change: Callable[[dict], dict]) -> list:
        """Evaluating a checkpoint whose weights are changed."""
        whole = read_checkpoint(self.run / "last.safetensors")
        write_checkpoint(self.path / "last.safetensors", replace(whole, weights=change(dict(whole.weights))))
        return ["eval", self.path / "last.safetensors", "--data", self.data]

    def init(self, name: str, content: bytes | dict, *flags: str) -> list:
        """Starting from a file with these bytes or arrays."""
        path = self.path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif path.suffix == ".npz":
            np.savez(path, **content)
        else:
            save_file(content, path)
        return self.train("--init", path, *flags)

    def file(self, name: str, content: bytes = b"") -> Path:
        path = self.path / name
        path.write_bytes(content)
        return path

    def without_training(self) -> list:
        """Resuming from weights alone."""
        whole = read_checkpoint(self.run / "last.safetensors")
        write_checkpoint(self.path / "last.safetensors", replace(whole, training={}))
        return self.train("--resume", "--out", self.path)

    def other_size(self) -> list:
        data = write(self.path / "set", content())
        Image.new("L", (80, 60)).save(data / "images" / "b.png")
        return self.train("--epochs", 1, data=data)

    def broken_picture(self) -> list:
        data = write(self.path / "set", content())
        truncated(data / "images" / "b.png")
        return self.train("--epochs", 1, data=data)

    def twins(self) -> list:
        for name in ("a.png", "a.jpg"):
            Image.new("L", (8, 8)).save(self.path / name)
        return self.detect(self.path)

    def onto_itself(self) -> list:
        Image.new("L", (8, 8)).save(self.path / "a.png")
        return ["detect", self.run, self.path / "a.png", "--out", self.path]

    def other_classes(self) -> list:
        return ["eval", self.run, "--data", write(self.path / "set", content()), "--split", "train"]


class Mislabelled:
    """A data set of one's own, whose labels count from 1."""

    classes, category_ids = ("cat",), (1,)

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return replace(md.shapes(images=1, size=64)[0], boxes=np.array([[0.0, 0, 9, 9]]), labels=np.array([1]))


def renamed(weights: dict) -> dict:
    weights["head.extra"] = weights.pop(next(iter(weights)))
    return weights


def cut(weights: dict) -> dict:
    name = next(iter(weights))
    return weights | {name: weights[name][:1]}


def judge(**changes):
    """Our evaluator, on one result with something wrong."""
    truth = md.shapes("val", images=2).ground_truth()
    accumulate(truth, [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "score": 0.5} | changes])


NOTHING = r"the following arguments are required: "
OBJECT = np.array([{"any": "object"}], object)

BAD: dict[str, tuple[Callable[[Place], list | Callable], str]] = {
    # --- flags
    "no command": (lambda p: [], NOTHING + "COMMAND"),
    "an unknown command": (lambda p: ["trian"], "invalid choice: 'trian' .*did you mean train?"),
    "no data": (lambda p: ["train"], NOTHING + "--data"),
    "no run to evaluate": (lambda p: ["eval", "--data", p.data], NOTHING + "RUN"),
    "no picture to detect in": (lambda p: p.detect(), NOTHING + r"IMAGE\|FOLDER"),
    "an unknown option": (lambda p: p.train("--sede", 1), "unrecognized arguments: --sede 1; did you mean --seed?"),
    "an option cut short": (lambda p: p.train("--epoch", 3), "unrecognized .*--epoch 3; did you mean --epochs?"),
    "an option without its value": (lambda p: p.train("--seed"), "argument --seed: expected one argument"),
    "an unknown preset": (lambda p: p.train("--preset", "smal"), "invalid choice: 'smal' .*did you mean small?"),
    "images and epochs": (
        lambda p: p.train("--images", 1, "--epochs", 1), "--epochs: not allowed with argument --images"
    ),
    "half an image": (lambda p: p.train("--images", 0.5), "argument --images: invalid int value: '0.5'"),
    "no images": (lambda p: p.train("--images", 0), "training: images must be at least 1, got 0"),
    "no epochs": (lambda p: p.train("--epochs", 0), "--epochs must be a number above 0, got 0"),
    "epochs that are no number": (lambda p: p.train("--epochs", "nan"), "--epochs must be a number above 0, got nan"),
    "epochs without end": (lambda p: p.train("--epochs", "inf"), "--epochs must be a number above 0, got inf"),
    "a batch of none": (lambda p: p.train("--batch-size", 0), "training: batch_size must be at least 1, got 0"),
    "a seed below 0": (lambda p: p.train("--seed", -1), "training: seed must be at least 0, got -1"),
    "a threshold above 1": (
        lambda p: p.detect(p.data, "--threshold", 30), "--threshold is a score from 0 to 1, got 30"
    ),
    # --- settings
    "a setting without a value": (lambda p: p.set("lr"), "--set lr: expected NAME=VALUE"),
    "an unknown setting": (lambda p: p.set("learning=1"), "--set learning=1: there is no 'learning'; .*known|mean"),
    "a setting misspelt": (lambda p: p.set("wormup=1"), "there is no 'wormup'; did you mean 'warmup'?"),
    "a setting of a setting misspelt": (
        lambda p: p.set("model.head.dept=1"), "there is no 'model.head.dept'; did you mean 'depth'?"
    ),
    "a setting inside a number": (lambda p: p.set("lr.x=1"), "--set lr.x=1: there is no 'lr.x'"),
    "a setting of another type": (lambda p: p.set("lr=fast"), "training.lr: expected float, got 'fast'"),
    "a setting that is not finite": (lambda p: p.set("lr=NaN"), "training.lr: expected a finite number, got nan"),
    "a rate below 0": (lambda p: p.set("lr=-1"), "training: lr must be above 0, got -1"),
    "more parts than images": (
        lambda p: p.set("accumulate=99"), "a batch of 4 images cannot be split into 99 parts"
    ),
    "a chance above 1": (lambda p: p.set("augment.hflip=2"), "Augment.hflip is a probability in 0..1, got 2"),
    "an optimizer that is not there": (
        lambda p: p.set('rule={"class": "Lion"}'), "training.rule: class must be one of AdamW, SGD, got 'Lion'"
    ),
    "momentum beyond 1": (lambda p: p.set(f"rule={json.dumps(HALF)}"), "SGD: momentum must be in .*got 2"),
    "levels without anchors": (
        lambda p: p.set("model.pyramid.levels=3"), "anchors for 2 levels, but a pyramid of 3"
    ),
    "groups that do not divide": (
        lambda p: p.set("model.backbone.norm.groups=3"), "GroupNorm: 3 groups do not divide 8 channels"
    ),
    "a network without channels": (
        lambda p: p.set("model.pyramid.channels=0"), "channels and levels must be at least 1, got 0 and 2"
    ),
    "thresholds the wrong way round": (
        lambda p: p.set("model.matcher.low=0.9"), "matcher: needs 0 <= low <= high <= 1, got low=0.9, high=0.5"
    ),
    "classes of another data set": (lambda p: p.set('model.classes=["cat"]'), r"the model knows \('cat',\)"),
    # --- places
    "data that are not there": (lambda p: p.train(data=p.path / "none"), "none: no such file or folder"),
    "a folder that holds no data": (lambda p: p.train(data=p.path), "no annotations/instances_train.json; is it"),
    "a file as the run's folder": (lambda p: p.train("--out", p.file("x")), "--out .*x: this is a file"),
    "a folder that holds a run": (lambda p: p.train("--out", p.run), r"holds a training: resume it \(--resume\), or"),
    "nothing to resume": (lambda p: p.train("--resume"), "out/last.safetensors: no such checkpoint"),
    "another length when resuming": (
        lambda p: p.train("--resume", "--out", p.run, "--images", 7), "these settings changed: images: 2 -> 7"
    ),
    "first weights when resuming": (
        lambda p: p.train("--resume", "--out", p.run, "--init", p.run), "--init gives first weights, --resume continues"
    ),
    "weights only, to resume": (
        lambda p: p.without_training(), "last.safetensors: this checkpoint holds weights only: start from it"
    ),
    "no such run": (lambda p: ["eval", p.path / "none", "--data", p.data], "none: no such checkpoint"),
    "a folder without a run": (lambda p: ["eval", p.path, "--data", p.data], "holds neither best.safetensors nor"),
    "a split that is not there": (
        lambda p: ["eval", p.run, "--data", p.data, "--split", "test"], "it has the splits train, val"
    ),
    "a split of the built-in data": (
        lambda p: ["eval", p.run, "--data", "shapes", "--split", "dev"], "no split 'dev': choose one of train, val"
    ),
    "a run with other classes": (lambda p: p.other_classes(), "the model knows the classes circle, .* has car, brush"),
    "a picture that is not there": (lambda p: p.detect(p.path / "a.jpg"), "a.jpg: no such file"),
    "a folder without pictures": (lambda p: p.detect(p.path), r"no pictures in this folder \(.jpg"),
    "two pictures, one result": (lambda p: p.twins(), r"a.jpg and .*a.png would both become a.png"),
    "a result over its picture": (lambda p: p.onto_itself(), "a.png would overwrite the picture itself"),
    # --- json
    "json cut short": (lambda p: p.json(b'{"images": ['), "instances_train.json: not valid json: .*line 1 column"),
    "json nested too deeply": (lambda p: p.json(b"[" * 100_000), "not valid json"),
    "detections instead of ground truth": (lambda p: p.json(b"[]"), "holds a list, as COCO writes detections"),
    "no annotations": (lambda p: p.json(changed(annotations=...)), "needs a list called 'annotations'"),
    "no images in it": (lambda p: p.json(changed(images=[])), "images is empty"),
    "two categories of one id": (
        lambda p: p.json(changed("categories", 1, id=90)), "category id 90 is 'brush' and 'car'"
    ),
    "two images of one id": (lambda p: p.json(changed("images", 1, id=5)), "image id 5 is there twice"),
    "two annotations of one id": (lambda p: p.json(changed("annotations", 1, id=70)), "id 70 is there twice"),
    "an unknown image": (
        lambda p: p.json(changed("annotations", 1, image_id=8)), "annotation id 71: image_id 8 is not the id of any"
    ),
    "an unknown category": (
        lambda p: p.json(changed("annotations", 1, category_id=0)), r"category_id 0 is not among .*\(3, 90\)"
    ),
    "an id that is text": (lambda p: p.json(changed("images", 1, id="9")), "'id' must be an integer, got '9'"),
    "an image without a size": (lambda p: p.json(changed("images", 1, width=...)), "image id 9: 'width' is missing"),
    "crowd or not": (lambda p: p.json(changed("annotations", 1, iscrowd="no")), "iscrowd must be 0 or 1, got 'no'"),
    # --- boxes
    "a box of three": (lambda p: p.json(boxes([1, 2, 3])), r"bbox must be four numbers .*got \[1, 2, 3\]"),
    "a box of NaN": (lambda p: p.json(boxes([1, 2, float("nan"), 4])), "bbox must be four numbers"),
    "a box without area": (lambda p: p.json(boxes([1, 2, 0, 6])), "id 70 .*a.png, 40 x 30.*has no area"),
    "a box outside": (lambda p: p.json(boxes([50, 5, 6, 6])), "reaches over x 50..56 and y 5..11, beyond its image"),
    "corners": (lambda p: p.json(boxes([2, 3, 35, 25], [20, 10, 39, 29])), "would fit as x1, y1, x2, y2"),
    "fractions": (lambda p: p.json(boxes([0.1, 0.2, 0.5, 0.5])), "lies in 0..1, .*multiply by the image's size"),
    # --- pictures
    "a path upwards": (
        lambda p: p.json(changed("images", 1, file_name="../../etc/passwd")), "'../../etc/passwd' leaves the image"
    ),
    "a path from the root": (lambda p: p.json(changed("images", 1, file_name="/etc/passwd")), "leaves the image"),
    "a path of Windows": (lambda p: p.json(changed("images", 1, file_name=r"C:\b.png")), "leaves the image folder"),
    "a picture of the set missing": (
        lambda p: p.json(changed("images", 1, file_name="z.png")), r"1 of its 3 images are missing.*z.png"
    ),
    "a picture of another size": (lambda p: p.other_size(), "b.png is 80 x 60, but .*annotates image id 9 as 40 x 30"),
    "a picture of the set cut short": (lambda p: p.broken_picture(), r"b.png: cannot be decoded"),
    "a picture cut short": (lambda p: p.picture("a.jpg", truncated), r"a.jpg: cannot be decoded .*truncated"),
    "a decompression bomb": (lambda p: p.picture("a.png", bomb), "a.png: more than .* pixels: a decompression bomb"),
    "a page of the web": (
        lambda p: p.picture("a.jpg", lambda path: path.write_text("<html>404")), "a.jpg: not an image; readable are"
    ),
    "a program": (
        lambda p: p.picture("a.eps", lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0")), "a.eps: not an image"
    ),
    # --- checkpoints
    "a checkpoint cut short": (
        lambda p: ["eval", p.file("a.safetensors", (p.run / "last.safetensors").read_bytes()[:9999]), "--data", p.data],
        "a.safetensors: truncated: 9,999 of at least",
    ),
    "a checkpoint of torch": (
        lambda p: ["eval", p.file("model.pth", b"PK\x03\x04 a zip"), "--data", p.data], "model.pth: not a safetensors"
    ),
    "a checkpoint of the future": (lambda p: p.checkpoint(version="99"), "checkpoint format '99'; this minidet reads"),
    "a checkpoint of somebody": (lambda p: p.checkpoint(format="pt"), "but not a minidet checkpoint"),
    "a checkpoint in another layout": (lambda p: p.checkpoint(layout="OIHW"), "layout 'OIHW', expected 'OHWI'"),
    "a checkpoint without its head": (lambda p: p.checkpoint(header="{"), "damaged: its header cannot be read"),
    "a checkpoint that lacks a weight": (lambda p: p.weights(renamed), r"(?s)last.safetensors: .*missing.*head.extra"),
    "a checkpoint of another shape": (lambda p: p.weights(cut), r"(?s)last.safetensors: .*shape"),
    # --- first weights
    "weights that are not there": (lambda p: p.train("--init", p.path / "a.npz"), "a.npz: no such file"),
    "weights of no kind": (lambda p: p.init("a.pth", b"PK"), "a.pth: no .pth, .pkl, .safetensors or .npz, or a"),
    "weights cut short": (lambda p: p.init("a.npz", b"PK\x03\x04"), "a.npz: a truncated zip archive: .*copy it again"),
    "weights of half a network": (
        lambda p: p.init("a.npz", {"conv1.weight": np.ones((64, 3, 7, 7), np.float32)}), "not of a kind that is known"
    ),
    "weights that would run": (lambda p: p.init("a.npz", {"a": OBJECT}), "a.npz: holds pickled objects"),
    "weights of another world": (lambda p: p.init("a.npz", {"bert": np.ones(3)}), r"no known system \(first: bert\)"),
    "weights that fit nothing": (
        lambda p: p.init("a.npz", {"conv1.weight": np.ones((9, 3, 7, 7), np.float32)}, "--preset", "resnet18"),
        "choose the preset it was made",
    ),
    "weights of a failed training": (
        lambda p: p.init("a.npz", {"conv1.weight": np.full((64, 3, 7, 7), np.nan, np.float32)}, "--preset", "resnet18"),
        "are not finite",
    ),
    # --- environment
    "MINIDET_BACKEND=torch": (lambda p: p.train(), "MINIDET_BACKEND='torch' is unknown: choose one of numpy, cupy"),
    "MINIDET_BACKEND=cupy": (lambda p: p.train(), r"needs CuPy .*pip install 'minidet\[cupy\]'"),
    "MINIDET_BACKEND=array_api_strict": (lambda p: p.detect(p.data), "needs a package: pip install array-api-strict"),
    # --- Python
    "a call for an unknown split": (lambda p: lambda: md.shapes("trian"), "no split 'trian': choose one of train, val"),
    "a call for an unknown variant": (lambda p: lambda: md.shapes(variant="hard"), "no variant 'hard': choose one of"),
    "a picture of floats": (
        lambda p: lambda: md.detect(md.load_model(p.run), np.zeros((8, 8, 3))), r"uint8 RGB image .*float64 \(8, 8, 3\)"
    ),
    "no class": (lambda p: lambda: md.presets.small(()), "classes is empty: a detector needs at least one"),
    "a class twice": (lambda p: lambda: md.presets.small(("a", "a")), "classes has names more than once: a"),
    "labels from 1": (
        lambda p: lambda: md.train(md.RetinaNet(md.presets.small(("cat",))), Mislabelled(), images=1, quiet=True),
        "labels 1..1 of 1 classes: they count from 0",
    ),
    "a result for an unknown image": (lambda p: lambda: judge(image_id=9), r"results\[0\]: image_id 9 is not among"),
    "a result numbered from 0": (lambda p: lambda: judge(category_id=0), "category_id 0 is not among .*data set's own"),
    "a result without a score": (lambda p: lambda: judge(score=float("nan")), "score nan must be a finite number"),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(data, run): the smallest training there is."""
    root = tmp_path_factory.mktemp("good")
    data, run = tiny.coco_folder(root / "data", train=2, val=1), root / "run"
    flags = ["--images", "2", "--batch-size", "2", "--quiet", "--set", "validations=0"]
    assert cli.main(["train", "--data", str(data), "--out", str(run), *flags, *tiny.NETWORK]) == 0
    return data, run


@pytest.mark.filterwarnings("default::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_named(name, finished, tmp_path, capsys, monkeypatch):
    make, message = BAD[name]
    what = make(Place(tmp_path, *finished))
    if name.startswith("MINIDET_BACKEND="):
        library = name.partition("=")[2]
        monkeypatch.setenv("MINIDET_BACKEND", library)
        if library != "torch":
            monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    if callable(what):
        with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
            what()
        return
    capsys.readouterr()
    try:
        status = cli.main([str(argument) for argument in what])
    except SystemExit as stop:  # how argparse returns
        status = stop.code
    said = capsys.readouterr().err
    assert status == 2, said
    assert re.search(message, said), said
    assert len([line for line in said.splitlines() if line.startswith("minidet")]) == 1
    assert not (tmp_path / "found").exists() or not list((tmp_path / "found").iterdir())


def test_the_table_is_long_enough(capsys):
    with capsys.disabled():
        print(f"\n{len(BAD)} bad inputs, each with its message")
    assert len(BAD) >= 40
