# %% [markdown]
# # 8 · The same program on a GPU
#
# Nothing in chapters 1 to 7 said where an array lives.  Set `MINIDET_BACKEND=cupy`, and the same lines compute on a
# GPU.  **What changes when they do, what stays exactly as it was, and what does such a machine dislike?**
#
# **You will see** one name that decides; the three habits that a GPU punishes; why channels come last; a 3x3
# convolution as three products without copying a pixel; what bfloat16 and TF32 round away and what they must not;
# and how much memory a training step needs.  All of it is shown on whatever machine you have: there is no GPU in
# the assertions below.
#
# | | |
# |---|---|
# | Needs | chapters 2 and 6 |
# | Reads | `minidet/backend.py`, `minidet/kernels/precision.py`, `minidet/models/retinanet.py` |
# | Source | Micikevicius et al., *Mixed Precision Training*, arXiv:1710.03740; Chen et al., arXiv:1604.06174 |
# | Time | about 15 s on two cores |

# %%
import os
from pathlib import Path

import numpy as np

import minidet as md
from minidet import Tensor, backend
from minidet.autograd import observe
from minidet.images import Preprocess
from minidet.inspection.layers import measure_layers
from minidet.kernels import convolve, resample
from minidet.kernels.convolution import geometry_of
from minidet.plots import bars, lines

rng = np.random.default_rng(8)
out = Path(os.environ.get("MINIDET_CHAPTER_OUT", "runs/chapters")) / "08"
out.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## One name
#
# An array knows its library, and every operation asks it once.  The variable is read in one place, when a model is
# made; the weights are drawn on the host, so that one seed is one network everywhere.

# %%
xp = backend.default()
model = md.RetinaNet(md.presets.small(["cell"]), seed=0)
images = xp.asarray(rng.normal(size=(4, 64, 64, 3)).astype(np.float32))
logits, deltas = model(Tensor(images))
print(f"computed by {xp.__name__}: logits {logits.shape}, deltas {deltas.shape}")
assert model.xp is logits.xp is xp

# %% [markdown]
# ## What a GPU dislikes: small work
#
# A program on a CPU *tells* a GPU what to do, one kernel after the other, and telling costs time whatever the size.
# How many things does one pass order?  As many for four images as for one: so big batches are how to be
# fast, and fusing (a convolution with its norm and rectifier is *one* operation here) is how small ones are.


# %%
def ops(images):
    seen = []
    with observe(lambda phase, node, array: seen.append(node.op)):
        model(Tensor(images))
    return seen


one, four = ops(images[:1]), ops(images)
print(f"\n{len(four)} operations, of which {sum('conv2d' in op for op in four)} convolutions, for any number of images")
assert one == four

# %% [markdown]
# ## Waiting, and shapes that depend on data
#
# The CPU runs ahead of the GPU, until it wants to *know* a number: then it waits, and afterwards the GPU waits for
# it.  `float(loss)` is such a place; `values[values > 0]` hides one, for nobody can allocate the result before the
# GPU has counted.  Same sum, same shape, nothing to ask:

# %%
values = rng.normal(size=1000)
chosen, masked = values[values > 0], np.where(values > 0, values, 0)
print(f"\nchosen: {chosen.shape}, known when it is done; masked: {masked.shape}, known before")
assert np.isclose(chosen.sum(), masked.sum()) and masked.shape == values.shape != chosen.shape

# %% [markdown]
# ## How images travel
#
# As bytes, where resizing leaves bytes: a quarter of float32's.  From *pinned* memory, which the GPU reads by itself,
# in a second stream, while the first computes (`minidet/data/upload.py`); there, each byte's value is looked up.

# %%
levels, photo = Preprocess().levels(), rng.integers(0, 256, (80, 130, 3), dtype=np.uint8)
there = backend.to_numpy(resample(xp.asarray(photo), xp.asarray(levels), 80, 130))
print(f"\n{photo.nbytes:,} bytes travel, {there.nbytes:,} are computed with: {len(levels)} levels, 3 channels")
assert there.nbytes == 4 * photo.nbytes and np.array_equal(there, levels[photo, [0, 1, 2]])

# %% [markdown]
# ## Channels last
#
# Matrix units multiply rows of neighbouring numbers.  With channels last, a map *is* a matrix with a row for each
# pixel, and a 1x1 convolution is one product.  With channels first, somebody has to turn it around before.

# %%
N, H, W, C, F = 2, 10, 13, 16, 8
x = rng.normal(size=(N, H, W, C)).astype(np.float32)
last, first = x.reshape(-1, C), x.transpose(0, 3, 1, 2).copy().transpose(0, 2, 3, 1).reshape(-1, C)
assert np.shares_memory(last, x) and np.array_equal(last, first)
print(f"\nrows of pixels: {last.shape} in place; from channels first only by a copy")

# %% [markdown]
# ## A 3x3 convolution in three batched products
#
# Put zeros around the map and see its pixels as one long list.  The neighbours $(i, j)$ of *all* pixels are then the
# same list, begun a fixed distance further on.  Three neighbours side by side are one row of $3C$ numbers;
# rows that begin at pixels 0, 3, 6, ... form a matrix without overlap, those from 1, 4, 7, ... another one, and
# those from 2, 5, 8, ... a third:
#
# $$y_p = \sum_{i=0}^{2} \left[x_{p + id},\ x_{p + id + 1},\ x_{p + id + 2}\right] w_i, \quad d = \text{pitch}$$
#
# Three values of $i$, each a batch of three products with sums of length $3C$; nothing is laid out.  One
# zero behind every row is enough: it is the one before the next row, too.

# %%
weight = rng.normal(size=(F, 3, 3, C)).astype(np.float32)
pitch = W + 1
T = -(-H * pitch // 3)                                          # rows of each product
padded = np.zeros((3 * T + 2 * pitch + 3, C), np.float32)
place = (np.arange(H)[:, None] * pitch + np.arange(W)).reshape(-1)
padded[place + pitch + 1] = x[0].reshape(-1, C)
y = np.zeros((T, 3, F), np.float32)
for i in range(3):
    begin, step = padded[i * pitch :], padded.strides[0]
    rows = np.lib.stride_tricks.as_strided(begin, (3, T, 3 * C), (step, 3 * step, padded.itemsize))
    assert np.shares_memory(rows, padded)
    y += (rows @ weight[:, i].reshape(F, 3 * C).T).transpose(1, 0, 2)
y = y.reshape(3 * T, F)[place]                                  # without the zeros between the rows
geometry = geometry_of(((H, W),), (3, 3), padding=(1, 1))
want = convolve(x[:1].reshape(1, H * W, C), weight, None, None, None, False, geometry, {})
error = np.abs(y - want[0]).max() / np.abs(want).max()
print(f"\nthree batched products of {rows.shape} and {(3 * C, F)}: largest error {error:.1e}")
assert error < 1e-6

# %% [markdown]
# ## Fewer bits
#
# A float32 has 23 bits of fraction.  TF32 lets the matrix units read the first 10 of them, and sums in float32:
# nothing else changes.  bfloat16 *stores* 7, in half the memory.  Both keep float32's 8 bits of exponent.


# %%
def rounded(x, kept):
    """float32 to the nearest number with so many bits of fraction, ties to even."""
    bits, drop = np.asarray(x, np.float32).view(np.uint32), 23 - kept
    half = (1 << drop >> 1) - (drop > 0) + (bits >> drop & (drop > 0))
    return ((bits + half.astype(np.uint32)) >> drop << drop).view(np.float32)


formats = {"float32": 23, "TF32": 10, "bfloat16": 7}
numbers = rng.normal(size=100_000).astype(np.float32)
for name, kept in formats.items():
    worst = np.abs(rounded(numbers, kept) / numbers - 1).max()
    print(f"{name:9} rounds by at most {worst:.1e} of a number")
    assert worst <= 2.0 ** -(kept + 1)

# %% [markdown]
# Errors of factors are independent and partly cancel in a long sum.  The *sum* must not be kept so short: adding
# ones in bfloat16 stops at 256, because 257 is no number of it.  So products are summed in float32 and rounded once.

# %%
errors = {}
for name, kept in formats.items():
    errors[name] = lengths, found = (4, 32, 256, 2304), []
    for length in lengths:
        a, b = (rng.normal(size=(200, length)).astype(np.float32) for _ in range(2))
        exact = (a.astype(float) * b).sum(axis=1)
        sums = (rounded(a, kept) * rounded(b, kept)).sum(axis=1)
        found.append(np.sqrt(np.mean((sums - exact) ** 2) / np.mean(exact**2)))
    print(f"sums of {lengths[-1]} products, factors in {name}: off by {found[-1]:.1e}")
lines(errors, out / "rounding.png", x="products in a sum", y="relative error",
      title="Rounded factors, summed in float32", log="xy")
assert 1e-4 < errors["TF32"][1][-1] < 5e-4 and 1e-3 < errors["bfloat16"][1][-1] < 5e-3
total = np.float32(0)
for _ in range(1000):
    total = rounded(total + np.float32(1), 7)
print(f"\na thousand ones, summed in bfloat16: {total:.0f}")
assert total == 256

# %% [markdown]
# The same ends a training whose *weights* are bfloat16: a step moves a weight by a thousandth, and nothing happens.
# Weights, their gradients, the optimizer, statistics and losses stay float32; maps and factors of products are
# bfloat16.  Small gradients are safe, for the exponent is float32's: float16 would lose them, and needs
# losses scaled up.

# %%
assert rounded(1.001, 7) == 1 and np.float32(1.001) > 1
assert rounded(1e-20, 7) > 0 and np.float16(1e-20) == 0
print("1 + 0.001 in bfloat16 is 1; 1e-20 is still there, in float16 it is 0")

# %% [markdown]
# `TrainConfig(precision="bfloat16")` or `--set precision=bfloat16` does that; on NumPy too, where it is only
# slow (it needs the package `ml_dtypes`).  `tests/test_precision.py` holds a network in it beside float32.
#
# ## The memory of a step
#
# The backward pass needs what the forward pass computed.  The layer table tells every output's bytes for one image:
# here of 400 x 672, so four times that, but for the rim, is one of 800 x 1344.

# %%
large = md.RetinaNet(md.presets.torchvision_v1([f"class {k}" for k in range(91)]), seed=0)
layers = measure_layers(large, (400, 672))
whole = 16 * 4 * sum(layer.memory for layer in layers) / 1e9
towers = 16 * 4 * sum(layer.memory for layer in layers if ".tower." in layer.name) / 1e9
weights = sum(p.data.size for p in large.parameters()) * 4 / 1e9
memory = {"float32": whole, "bfloat16": whole / 2, "float32, towers recomputed": whole - towers}
for name, gigabytes in memory.items():
    print(f"outputs of 16 images of 800 x 1344, {name}: {gigabytes:.1f} GB")
print(f"weights, their gradients and momentum: {3 * weights:.2f} GB")
bars(memory, out / "memory.png", x="GB", title="What 16 images leave for the backward pass")
assert 20 < whole < 40 and towers > 2 and 3 * weights < 0.1 * whole

# %% [markdown]
# So it is the *images* that fill the memory, not the weights.  Too much?  `accumulate` cuts a batch into parts;
# `precision="bfloat16"` halves its bytes; `recompute=True` forgets what residual blocks and towers contain and
# computes it again, for a third more work and not one different bit.

# %%
gradients = []
for recompute in (False, True):
    model.compute(recompute=recompute)
    for parameter in model.parameters():
        parameter.grad = None
    md.ops.sum(model(Tensor(images))[0]).backward()
    gradients.append(backend.to_numpy(model.pyramid.lateral[0].weight.grad))
assert np.array_equal(*gradients) and np.abs(gradients[0]).max() > 0
print(f"\nlook at {out / 'rounding.png'} and {out / 'memory.png'}")

# %% [markdown]
# ## What has not been shown
#
# **How fast any of this is on a GPU.**  All that its authors could try so far ran on a CPU; what is asserted here is
# algebra, rounding and bytes, the same everywhere.  `python -m tests.benchmarks.gpu` measures the rest: what a GPU
# copies and multiplies at most, every engine's share of that, and whole networks beside torchvision's.
#
# ## Three things to remember
#
# 1. Say *what* to compute and let the array say *where*: then another machine is another name.
# 2. A GPU wants much work at once, without questions in between, on numbers that lie side by side.
# 3. Round factors and maps, never sums, statistics or weights.
#
# **Next**: your own data on a faster machine: `MINIDET_BACKEND=cupy minidet train --data DIR`.
