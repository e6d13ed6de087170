# %% [markdown]
# # 6 · Making convolution fast
#
# Nine tenths of a detector's time is convolution.  The definition of chapter 2 is one matrix product, and yet a
# convolution can be ten thousand times slower than necessary, or faster than its own definition allows.
# **Which ideas, in which order, make up the difference, and what do they cost in accuracy?**
#
# **You will see** one layer computed in seven ways, as a share of what this machine can multiply at most; that
# each step saves *memory traffic*, and only the last one *arithmetic*; and how the cost of a whole detector grows.
#
# | | |
# |---|---|
# | Needs | chapter 2 (convolution as a matrix product) |
# | Reads | `minidet/kernels/convolution/cpu/direct.py`, `minidet/kernels/convolution/cpu/winograd.py` |
# | Source | Lavin and Gray, *Fast Algorithms for Convolutional Neural Networks*, arXiv:1509.09308 |
# | Time | about 20 s on two cores |

# %%
import os
from pathlib import Path
from time import perf_counter

import numpy as np
from numba import get_num_threads, njit

import minidet as md
from minidet.kernels import batched_nms, best_matches, convolve, gather_windows, only
from minidet.kernels.convolution import Geometry
from minidet.kernels.convolution.cpu.lanes import LANES, ROWS, VECTORS, WIDTH
from minidet.kernels.convolution.cpu.microkernel import product_tile
from minidet.kernels.parallel import parallel
from minidet.plots import bars, lines

rng = np.random.default_rng(6)
out = Path(os.environ.get("MINIDET_CHAPTER_OUT", "runs/chapters")) / "06"
out.mkdir(parents=True, exist_ok=True)


def seconds(run, times=5):
    """The best of several: other programs can only slow us down."""
    clocks = [(perf_counter(), run(), perf_counter()) for _ in range(times)]
    return min(after - before for before, _, after in clocks)


# %% [markdown]
# ## The layer, and what it must cost
#
# A 3x3 convolution of 128 channels into 128 filters on a map of 64 x 64, as ResNet-50 has it three times.  Every
# output is a sum of $9 \cdot 128$ products, and a product with its addition counts as two operations.

# %%
H = W = 64
C = F = 128
x = rng.normal(size=(1, H, W, C)).astype(np.float32)
weight = rng.normal(size=(F, 3, 3, C)).astype(np.float32)
operations, numbers = 2 * H * W * F * 9 * C, x.size + weight.size + H * W * F
print(f"{operations:,} operations on {numbers:,} numbers, {operations / numbers:,.0f} for each")
assert operations == 1_207_959_552 and operations / numbers > 1000

# %% [markdown]
# ## The roof
#
# A core multiplies and adds whole vectors.  It can only keep that up if nothing has to be fetched: so we let the
# innermost piece of the library, the *register tile*, work on a few kilobytes that never leave the first cache.

# %%
@parallel
def busy(thread, repeats):
    one_thread(repeats)


@njit
def one_thread(repeats):
    a, b, y = np.ones(ROWS * 128, np.float32), np.ones(128 * WIDTH, np.float32), np.empty(ROWS * WIDTH, np.float32)
    for _ in range(repeats):
        product_tile(a, 0, 128, b, 0, 128, 0, y, 0, WIDTH, ROWS, VECTORS)


threads, repeats = get_num_threads(), 20_000
busy(threads, 10)
peak = 1e-9 * 2 * threads * repeats * ROWS * WIDTH * 128 / seconds(lambda: busy(threads, repeats), 10)
print(f"\nvectors of {LANES} numbers on {threads} threads: at most {peak:.0f} billion operations a second")

# %% [markdown]
# ## Loops
#
# The definition, letter by letter.  In Python we have patience for eight filters at one pixel; Numba compiles the
# same lines to machine code, and has time for all.

# %%
def loops(x, weight, y, rows, columns, filters):
    for p in range(rows):
        for q in range(columns):
            for f in range(filters):
                total = np.float32(0)
                for i in range(3):
                    for j in range(3):
                        for c in range(x.shape[2]):
                            total += weight[f, i, j, c] * x[p + i, q + j, c]
                y[p, q, f] = total


padded, y_loops, compiled = np.pad(x[0], ((1, 1), (1, 1), (0, 0))), np.zeros((H, W, F), np.float32), njit(loops)
compiled(padded, weight, y_loops, 1, 1, 1)
speed = {
    "loops in Python": 1e-9 * 8 * 2 * 9 * C / seconds(lambda: loops(padded, weight, y_loops, 1, 1, 8), 2),
    "the same, compiled": 1e-9 * operations / seconds(lambda: compiled(padded, weight, y_loops, H, W, F), 1),
}
for way, reached in speed.items():
    print(f"{way:20}{reached:9.4f} billion a second, {peak / reached:7,.0f} times below the roof")
assert speed["the same, compiled"] > 50 * speed["loops in Python"]

# %% [markdown]
# Compiled, it is still far below: each sum is *one* chain of additions, one after the other and one number wide.
#
# ## A matrix product
#
# Chapter 2 wrote every window as a row.  The product of matrices is the best studied loop there is, and NumPy
# passes it on to a library written for it.  The price: nine copies of the input.

# %%
def as_matrix_product(x):
    rows = gather_windows(np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), (1, 1), (1, 1)).reshape(H * W, -1)
    return rows @ weight.reshape(F, -1).T, rows


y, rows = as_matrix_product(x)
speed["im2col + matmul"] = 1e-9 * operations / seconds(lambda: as_matrix_product(x))
print(f"\nthe windows take {rows.nbytes / 2**20:.0f} MiB, the map itself {x.nbytes / 2**20:.0f}")
assert np.allclose(y.reshape(H, W, F), y_loops, atol=1e-3) and rows.nbytes == 9 * x.nbytes
assert speed["im2col + matmul"] > 3 * speed["the same, compiled"]

# %% [markdown]
# ## Blocks, and registers
#
# *Blocked*: lay out a few rows at a time, so that the product reads them from a cache and not from memory.
#
# *Direct*: lay out nothing.  A tile of a few output pixels times a few vectors of filters is kept in registers; a
# table says where each tap of each pixel lies.  A tile of $R$ pixels and $V$ vectors needs $R + V$ loads for $RV$
# multiplications of vectors: the larger the tile the less is fetched, until the registers are full.

# %%
geometry, flat = Geometry(((H, W),), (3, 3), (1, 1), (1, 1)), x.reshape(1, H * W, C)


def by(version, arguments=(flat, weight, None, None, None, False, geometry, {})):
    """The layer by the library's version of this name, as a function."""
    with only(version):
        name, run = convolve.choose(*arguments)
    assert name == f"numpy:{version}"
    return lambda: run(*arguments)


found = {"im2col + matmul": y, "blocked": by("blocked")(), "direct": by("direct")()}
for version in ("blocked", "direct"):
    speed[version] = 1e-9 * operations / seconds(by(version))
loads = (ROWS + VECTORS) / (ROWS * VECTORS)
print(f"\na register tile of {ROWS} pixels x {VECTORS} vectors: {loads:.2f} loads for each multiplication")
assert loads < 0.7 and speed["direct"] > 3 * speed["the same, compiled"]

# %% [markdown]
# ## Fewer multiplications
#
# No loop over the definition's products can pass the roof.  But a convolution needs fewer of them.  Two outputs of
# three taps are six products; Winograd's *F(2, 3)* takes four:
#
# $$m_1 = (d_0 - d_2)\,w_0 \quad m_2 = (d_1 + d_2)\tfrac{w_0 + w_1 + w_2}{2} \quad
#   m_3 = (d_2 - d_1)\tfrac{w_0 - w_1 + w_2}{2} \quad m_4 = (d_1 - d_3)\,w_2$$
#
# $$y_0 = m_1 + m_2 + m_3 \qquad y_1 = m_2 - m_3 - m_4$$
#
# The sums of weights are made once, those of inputs once for all filters.  By hand, with $d = 1, 2, 3, 4$ and
# $w = 1, 10, 100$: $m = (-2,\ 277.5,\ 45.5,\ -200)$, so $y = (321,\ 432)$.

# %%
B = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], np.float32)          # m from d ...
G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)            # ... and from w
A = np.array([[1, 1, 1, 0], [0, 1, -1, -1]], np.float32)                                       # y from m
d, w = np.array([1, 2, 3, 4]), np.array([1, 10, 100])
m = (B @ d) * (G @ w)
assert m.tolist() == [-2, 277.5, 45.5, -200] and (A @ m).tolist() == np.correlate(d, w).tolist() == [321, 432]

# %% [markdown]
# In two dimensions both ways: 16 products instead of 36 for 2 x 2 outputs, and with tiles of 4 x 4, *F(4, 3)*,
# 36 instead of 144: a quarter.  For each of those 36 places, tiles and channels make one matrix product, computed
# by the register tile while its numbers are in the cache.

# %%
for version in (2, 4):
    found[f"Winograd F({version}, 3)"] = by(f"winograd{version}")()
    speed[f"Winograd F({version}, 3)"] = 1e-9 * operations / seconds(by(f"winograd{version}"))

# %% [markdown]
# ## Seven ways, one answer
#
# The error is against the definition in float64, in units of $\sqrt{9C}\;\mathrm{rms}(x)\;\mathrm{rms}(w)$, the size
# of an output.  F(4, 3) adds and subtracts numbers larger than the result, and loses a digit.

# %%
exact = convolve.textbook(flat.astype(float), weight.astype(float), None, None, None, False, geometry, {})
size = np.sqrt(9 * C * np.mean(x**2) * np.mean(weight**2))
error = {way: np.abs(y.reshape(exact.shape) - exact).max() / size for way, y in found.items()}
print(f"\n{'':20}{'billion/s':>10}{'of the roof':>13}{'error':>9}")
for way in speed | error:
    reached = f"{speed[way]:10.3g}{speed[way] / peak:13.1%}" if way in speed else " " * 23
    print(f"{way:20}{reached}" + (f"{error[way]:9.0e}" if way in error else ""))
title, roof = "A 3x3 convolution of 128 channels, 64 x 64", ("this machine's peak", peak)
bars(speed, out / "speed.png", x="billion operations of the definition a second", title=title, limit=roof)
assert all(e < (1e-4 if way == "Winograd F(4, 3)" else 1e-5) for way, e in error.items())
assert error["Winograd F(4, 3)"] > error["direct"] and speed["Winograd F(4, 3)"] > 1.5 * speed["im2col + matmul"]

# %% [markdown]
# ## How cost grows
#
# Convolutions, and what they must remember for the way back, grow with the number of pixels: here for training steps
# of RetinaNet on ResNet-50 (`python -m tests.benchmarks.growth --picture chapters/pictures/growth.png`, on a Xeon).
#
# ![time per image and peak memory against pixels, for one, two and four images a step](pictures/growth.png)
#
# What else can grow is the number of objects.  Matching compares each anchor with each object; suppression
# compares each box with those it could overlap.  The anchors here are those of an image of 512 x 512.

# %%
model = md.RetinaNet(md.presets.small(["thing"]))
anchors, counts = model.anchors(512, 512), (10, 100, 1000, 10_000)
corner = rng.uniform(0, 700, (max(counts), 2))
boxes = np.concatenate([corner, corner + rng.uniform(10, 90, corner.shape)], axis=1).astype(np.float32)
scores, labels = rng.random(len(boxes), np.float32), rng.integers(0, 80, len(boxes))
work = {
    f"matching with {len(anchors):,} anchors": lambda n: best_matches(anchors, boxes[:n]),
    "suppression, 80 classes": lambda n: batched_nms(boxes[:n], scores[:n], labels[:n], 0.5),
}
curves = {name: (counts, [1e3 * seconds(lambda n=n, f=f: f(n), 2) for n in counts]) for name, f in work.items()}
for name, (_, clocks) in curves.items():
    print(f"{name}: " + ", ".join(f"{n:,} in {ms:.3g} ms" for n, ms in zip(counts, clocks, strict=True)))
lines(curves, out / "objects.png", x="objects", y="milliseconds", title="Objects in an image", log="xy")
(_, matching), (_, suppression) = curves.values()
assert matching[3] < 40 * matching[2] and suppression[3] < 500      # ten times the objects, about ten times the work
print(f"\nlook at {out / 'speed.png'} and {out / 'objects.png'}")

# %% [markdown]
# ## Three things to remember
#
# 1. A processor multiplies faster than it fetches: what is fast reuses numbers where they are, in the registers
#    first, then in the cache.  Everything up to the direct convolution is a way to fetch less.
# 2. The definition says what to compute, not how: another algorithm may need a quarter of the multiplications.
# 3. Speed has a price in digits.  It is known, stated and tested: `tests/test_convolution_engines.py`.
#
# **Next**: chapter 7 scales the same code up to COCO.
