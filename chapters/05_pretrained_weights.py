# %% [markdown]
# # 5 · Pretrained weights
#
# Nobody trains from random weights if somebody has trained already.  Their weights come in files that PyTorch
# wrote, and PyTorch reads them by **running** them: a `.pth` holds a pickle, and a pickle is a program.
# **What is in such a file, how does one read it without running it, and what of it helps with other classes?**
#
# **You will see** the program that makes a tensor, instruction by instruction; a file that would run a command,
# refused; a detector that goes through PyTorch's format and back without losing a bit; and the same detector
# taught other classes, with its last layer forgotten for good reason.
#
# | | |
# |---|---|
# | Needs | chapter 3 (the prior), chapter 4 (training) |
# | Reads | `minidet/weights/unpickling.py`, `minidet/weights/tensors.py`, `minidet/weights/initial.py` |
# | Source | Lin et al., arXiv:1708.02002, section 4.1; the Python library reference, `pickletools` |
# | Time | about 20 s on two cores |

# %%
import os
import pickletools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

import minidet as md
from minidet.detection import build_targets, image_weights, loss
from minidet.plots import lines
from minidet.training import SHAPES
from minidet.weights import WeightsError, read_arrays
from minidet.weights.torch_file import state_program

out = Path(os.environ.get("MINIDET_CHAPTER_OUT", "runs/chapters")) / "05"
out.mkdir(parents=True, exist_ok=True)
images = int(os.environ.get("MINIDET_CHAPTER_IMAGES", 0)) or 1_280

# %% [markdown]
# ## A tensor is a program
#
# Two rows of three numbers, saved.  The numbers themselves lie in another entry of the zip archive, the
# *storage*; the pickle only says how to walk through it.

# %%
x = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
program = state_program({"x": x})
for operation, argument, place in pickletools.genops(program):
    print(f"{place:4} {operation.name:12}{'' if argument is None else argument}")
names = {argument for operation, argument, _ in pickletools.genops(program) if operation.name == "GLOBAL"}
assert names == {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage"}

# %% [markdown]
# Read it as a stack machine does: names and numbers are pushed, TUPLE gathers what lies above the last MARK, and
# REDUCE calls what lies below.  The call is `_rebuild_tensor_v2(storage, 0, (2, 3), (3, 1), ...)`: element
# $(i, j)$ is number $0 + 3i + 1j$ of the storage.  With other strides the same six numbers are another tensor:

# %%
storage = x.reshape(-1)


def element(i, j, offset, strides):
    return storage[offset + i * strides[0] + j * strides[1]]


assert [[element(i, j, 0, (3, 1)) for j in range(3)] for i in range(2)] == x.tolist()
assert [[element(i, j, 0, (1, 3)) for j in range(2)] for i in range(3)] == x.T.tolist()

# %% [markdown]
# ## The same machine runs anything
#
# REDUCE calls *whatever* was pushed.  Seven instructions, and loading "weights" runs a command:

# %%
attack = b"\x80\x02cos\nsystem\nX\x0b\x00\x00\x00touch ownedq\x00\x85R."
(out / "weights.pkl").write_bytes(attack)
steps = [operation.name for operation, _, _ in pickletools.genops(attack)]
print("\n" + " ".join(steps))
assert len(steps) == 7
try:
    read_arrays(out / "weights.pkl")
    raise AssertionError("it was read")
except WeightsError as error:
    print(str(error).replace(str(out), "..."))
    assert "asks for 'os.system', which no tensor needs; nothing was run" in str(error)
assert not Path("owned").exists()

# %% [markdown]
# So minidet carries the instructions out itself, without Python's own reader.  Of names it knows those that
# tensors need and looks them up in a table of its own; anything else is refused before a second instruction is
# looked at.  And it believes no number: walking beyond the storage is refused too.

# %%
beyond = program.replace(b"J\x02\x00\x00\x00J\x03\x00\x00\x00t", b"J\x09\x00\x00\x00J\x03\x00\x00\x00t")  # nine rows
assert beyond != program
(out / "weights.pkl").write_bytes(beyond)
try:
    read_arrays(out / "weights.pkl")
    raise AssertionError("it was read")
except WeightsError as error:
    print(str(error).replace(str(out), "..."))
    assert "does not lie in its storage of 6 elements" in str(error)
(out / "weights.pkl").unlink()

# %% [markdown]
# ## There and back
#
# A detector to give away: `small`, trained for some seconds on images of 64 x 64.  Saved under torchvision's
# names, as a `.pth` that PyTorch reads; read again; every bit is there.

# %%
recipe = replace(SHAPES, batch_size=8, lr=5.6e-3, validations=0, samples=0)
shutil.rmtree(out / "teacher", ignore_errors=True)                      # of an earlier run of this chapter
train = md.shapes("train", images=28_800, size=64)
teacher = md.RetinaNet(md.presets.small(train.classes), seed=0)
history = md.train(teacher, train, config=replace(recipe, images=images), out=out / "teacher", quiet=True).history
print(f"\n{images} images: loss {np.mean(history['loss'][:10]):.2f} -> {np.mean(history['loss'][-10:]):.2f}")

md.export(out / "teacher", out / "teacher.pth")
theirs = read_arrays(out / "teacher.pth")
print(*(f"{name:42}{theirs[name].shape}" for name in list(theirs)[:3]), sep="\n")
assert theirs["backbone.body.conv1.weight"].shape == (16, 3, 7, 7)      # theirs: out, in, height, width
assert teacher.backbone.stem.conv.weight.shape == (16, 7, 7, 3)         # ours: out, height, width, in

md.convert(out / "teacher.pth", out / "back.safetensors", preset="small", classes=train.classes)
back = md.load_model(out / "back.safetensors")
assert all(np.array_equal(a, back.state_dict()[name]) for name, a in teacher.state_dict().items())

# %% [markdown]
# For detectors and backbones that are published, names and shapes tell which they are, and neither preset nor
# classes have to be given.  With a file of torchvision's or detectron2's model zoo beside you:
#
#     minidet convert retinanet_resnet50_fpn_coco-eeacb38b.pth --out coco.safetensors
#     minidet detect coco.safetensors photo.jpg --out found
#     minidet train --data DIR --init coco.safetensors --out runs/mine
#
# ## Other classes
#
# Now somebody needs the same outlines under other names.  There are as many classes as before, so *every* tensor
# fits, and that is the trap: nothing would complain, and the last layer would go on saying what it knows.  minidet
# compares names, keeps all but that layer, and lets each class start at its prior (chapter 3).

# %%
class Renamed:
    """The same images; the outline that was called A is now called what B was."""

    def __init__(self, data):
        self.data, self.classes = data, tuple(f"kind {k}" for k in range(len(data.classes)))
        self.category_ids, self.size = data.category_ids, data.size

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        sample = self.data[index]
        return replace(sample, labels=(sample.labels + 3) % len(self.classes))

    def ground_truth(self):
        raise NotImplementedError("nothing is evaluated here")


others = Renamed(md.shapes("train", images=28_800, seed=1, size=64))


config = md.presets.small(others.classes)
scratch, trap, tuned = (md.RetinaNet(config, seed=1) for _ in range(3))
trap.load_state_dict(teacher.state_dict())                              # no word about names
done = md.load_initial(tuned, out / "teacher" / "last.safetensors")
print("\n" + done.table())
assert done.untouched == ("head.class_subnet.final.weight", "head.class_subnet.final.bias")


def first_loss(model):
    """The classification loss of 16 images before any step."""
    samples = [others[i] for i in range(16)]
    pixels = np.stack([model.config.preprocess.prepare(s.image) for s in samples])
    anchors = model.anchors(64, 64)
    targets = build_targets(anchors, [s.boxes for s in samples], [s.labels for s in samples], model.config.matcher)
    weights, _ = image_weights(model.config.loss, targets.positives)
    with md.no_grad():
        result = loss(*model(md.Tensor(pixels)), targets, weights, model.config.loss, model.config.coder)
    return float(result.classification)


start = {"from random weights": first_loss(scratch), "from the teacher's": first_loss(tuned)}
print("\nclassification loss before the first step: " + ", ".join(f"{k} {v:.2f}" for k, v in start.items()))
assert all(abs(value - 1.13) < 0.35 for value in start.values())        # chapter 3's number: sure of nothing

# %% [markdown]
# Where names stay, their rows of the last layer can stay, wherever they are now: `copy_classes`, on the command line
# `--copy-classes`.  With all eight names in reverse, the outputs are the teacher's in reverse.

# %%
reverse = md.RetinaNet(md.presets.small(train.classes[::-1]), seed=2)
print("\n" + md.load_initial(reverse, out / "teacher" / "last.safetensors", copy_classes=True).table().splitlines()[4])
pixels = md.Tensor(config.preprocess.prepare(train[0].image)[None])
with md.no_grad():
    logits, same = teacher.eval()(pixels)[0].data, reverse.eval()(pixels)[0].data
assert np.allclose(same[..., ::-1], logits, atol=1e-4)

# %% [markdown]
# ## What it is worth
#
# The same few images for both, once from random weights and once from the teacher's.

# %%
few = replace(recipe, images=images // 4)
curves = {}
for name, model in (("from random weights", scratch), ("from the teacher's", tuned)):
    losses = np.array(md.train(model, others, config=few, quiet=True).history["loss"])
    smooth = np.convolve(losses, np.ones(8) / 8, "valid")
    curves[name] = (8 * np.arange(8, len(losses) + 1), smooth)
    print(f"{name:22} loss after {few.images} images {smooth[-1]:.3f}")
assert curves["from the teacher's"][1][-1] < curves["from random weights"][1][-1]
lines(curves, out / "fine_tuning.png", x="images seen", y="loss, mean of 8 steps", title="Eight renamed classes")
print(f"\nlook at {out / 'fine_tuning.png'}")

# %% [markdown]
# ## Three things to remember
#
# 1. Loading a pickle runs a program.  What tensors need of it is small enough to be carried out by hand.
# 2. Weights mean something only together with conventions that no shape tells: order of axes and of channels,
#    where the stride is, epsilon, anchors.  A preset is these conventions.
# 3. For other classes keep everything but the class output, even if it fits, and start that at the prior.
#
# **Next**: chapter 6 asks where the time goes.
