# %% [markdown]
# # 2 · Convolution, there and back
#
# A convolution slides a window over an image and asks everywhere: how much does this patch look like my
# filter?  To learn the filter we need the way back: **given how the loss changes with every output, how does
# it change with every weight, and with every pixel?**
#
# **You will see** that a convolution is one matrix product, once its windows are written as rows; that the
# way back is two more of the same size; and that pixels get their gradients through the *transpose* of
# reading windows.
#
# | | |
# |---|---|
# | Needs | chapter 1 (the tape), matrix products |
# | Reads | `minidet/ops/convolution.py`, `minidet/kernels/convolution/definition.py`, `minidet/kernels/windows.py` |
# | Source | Dumoulin and Visin, *A guide to convolution arithmetic for deep learning*, arXiv:1603.07285 |
# | Time | about 3 s on a laptop CPU |

# %%
import os
from itertools import product
from pathlib import Path
from time import perf_counter

import numpy as np

from minidet import Tensor, shapes
from minidet.kernels import gather_windows, scatter_windows
from minidet.ops import conv2d
from minidet.plots import contact_sheet

rng = np.random.default_rng(2)
out = Path(os.environ.get("MINIDET_CHAPTER_OUT", "runs/chapters")) / "02"
out.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## One dimension, by hand
#
# A filter of two weights makes $y_p = w_0 x_p + w_1 x_{p+1}$.  Of three pixels the middle one is read twice, by
# window 0 at its right end and by window 1 at its left end, so on the way back it hears from both:
#
# $$\frac{\partial L}{\partial x_1} = w_1 \frac{\partial L}{\partial y_0} + w_0 \frac{\partial L}{\partial y_1}.$$

# %%
w, gy = np.array([2.0, 3.0]), np.array([10.0, 100.0])      # dL/dy: tens and hundreds tell who sent what
gx = np.zeros(3)
for p in range(2):                      # every window ...
    gx[p : p + 2] += gy[p] * w          # ... gives back to the pixels it read
print("dL/dx =", gx)
assert gx.tolist() == [20, 230, 300]

# %% [markdown]
# ## The definition
#
# Images are `(N, H, W, C)`: image, row, column, channel.  Filters are `(F, k, k, C)`.  With stride $s$, and $z$
# zeros of padding around the image,
#
# $$y_{n,p,q,f} = \sum_{i,j,c} w_{f,i,j,c}\; x_{n,\; ps + i - z,\; qs + j - z,\; c}, \qquad
#   P = \lfloor (H + 2z - k) / s \rfloor + 1, \quad Q \text{ likewise from } W.$$

# %%
def pad(x, z):
    return np.pad(x, ((0, 0), (z, z), (z, z), (0, 0)))


def convolve_by_loops(x, w, s, z):
    (N, H, W, _), (F, k, _, _) = x.shape, w.shape
    P, Q = ((side + 2 * z - k) // s + 1 for side in (H, W))
    x, y = pad(x, z), np.empty((N, P, Q, F))
    for n, p, q, f in product(range(N), range(P), range(Q), range(F)):
        y[n, p, q, f] = np.sum(w[f] * x[n, p * s : p * s + k, q * s : q * s + k])
    return y


# %% [markdown]
# ## Windows as rows
#
# Each output is a dot product of a window and a filter.  Write every window as a row of one matrix and every
# filter as a column of another, and all the dot products are *one* matrix product, which computers do best.

# %%
def windows_of(x, k, s, z):
    return gather_windows(pad(x, z), (k, k), (s, s), (1, 1))                # (N, P, Q, k, k, C)


def convolve(x, w, s, z):
    windows, F = windows_of(x, w.shape[1], s, z), len(w)
    return (windows.reshape(-1, w[0].size) @ w.reshape(F, -1).T).reshape(*windows.shape[:3], F)


x, w = rng.normal(size=(2, 24, 24, 8)), rng.normal(size=(16, 3, 3, 8))
times = [perf_counter()]
for method in (convolve_by_loops, convolve):
    y = method(x, w, 1, 1)
    times.append(perf_counter())
print("\n{:,} outputs: {:.0f} ms by loops, {:.1f} ms by a product".format(y.size, *1e3 * np.diff(times)))
assert np.allclose(y, convolve_by_loops(x, w, 1, 1), rtol=1e-12, atol=1e-12)

# %% [markdown]
# ## Reading windows is a matrix, and giving back is its transpose
#
# `gather_windows` copies numbers, so it is linear: a matrix $G$ with one 1 in each row, which says what pixel
# this place of that window reads.  For 3 x 3 windows of a 5 x 5 map we can write it down, by gathering 25
# images in which a single pixel is lit.

# %%
lit = np.eye(25).reshape(25, 5, 5, 1)
G = windows_of(lit, 3, 1, 0).reshape(25, 9 * 9).T                           # 9 windows of 9 places
assert np.all(np.sort(G, axis=1) == [0] * 24 + [1])
readers = G.sum(axis=0).reshape(5, 5).astype(int)
print(f"\nhow many windows read each pixel, the column sums of G:\n{readers}")
assert readers[0, 0] == 1 and readers[2, 2] == 9

# %% [markdown]
# On the way back, what a window received goes to the pixels it had read, and overlaps add up: that is $G^\top$,
# and what `scatter_windows` does without any matrix.  For maps of any size there is a test without a matrix,
# too: $\langle Gx, c\rangle = \langle x, G^\top c\rangle$ for whatever $x$ and $c$.

# %%
c = rng.normal(size=(1, 3, 3, 3, 3, 1))
assert np.allclose(scatter_windows(c, 5, 5, (1, 1), (1, 1)).ravel(), G.T @ c.ravel(), rtol=1e-13, atol=1e-13)

x = rng.normal(size=(2, 31, 40, 3))
c = rng.normal(size=windows_of(x, 3, 2, 0).shape)
there, back = np.vdot(windows_of(x, 3, 2, 0), c), np.vdot(x, scatter_windows(c, 31, 40, (2, 2), (1, 1)))
print(f"\n<G x, c>   = {there:.9f}\n<x, G^T c> = {back:.9f}")
assert abs(there - back) < 1e-9

# %% [markdown]
# ## The way back
#
# Forward, $Y = R\,W^\top$ with the rows $R = Gx$.  Two factors, two gradients, each of them a product again:
#
# $$\frac{\partial L}{\partial W} = \Big(\frac{\partial L}{\partial Y}\Big)^{\!\top} R, \qquad
#   \frac{\partial L}{\partial x} = G^\top \Big(\frac{\partial L}{\partial Y}\, W\Big).$$

# %%
def gradients(x, w, gy, s, z):
    windows, (_, H, W, _), F = windows_of(x, w.shape[1], s, z), x.shape, len(w)
    gy = gy.reshape(-1, F)
    gw = gy.T @ windows.reshape(-1, w[0].size)
    gwindows = gy @ w.reshape(F, -1)
    gx = scatter_windows(gwindows.reshape(windows.shape), H + 2 * z, W + 2 * z, (s, s), (1, 1))
    return gx[:, z : z + H, z : z + W], gw.reshape(w.shape)                 # padding is no pixel


# %% [markdown]
# Two judges: differences along a random direction of all inputs at once, and the library.

# %%
print(f"\n{'H x W':>7}{'k':>4}{'stride':>8}{'padding':>9}{'P x Q':>8}{'off from differences':>23}{'from conv2d':>13}")
for (H, W), k, s, z in [((5, 6), 3, 1, 0), ((5, 6), 3, 1, 1), ((7, 6), 3, 2, 1), ((6, 5), 1, 2, 0)]:
    x, w = rng.normal(size=(2, H, W, 2)), rng.normal(size=(3, k, k, 2))
    y = convolve(x, w, s, z)
    v, dx, dw, h = rng.normal(size=y.shape), rng.normal(size=x.shape), rng.normal(size=w.shape), 6e-6
    gx, gw = gradients(x, w, v, s, z)
    rise = np.vdot(v, convolve(x + h * dx, w + h * dw, s, z) - convolve(x - h * dx, w - h * dw, s, z))
    by_nudging = abs(np.vdot(gx, dx) + np.vdot(gw, dw) - rise / (2 * h))

    tx, tw = Tensor(x, requires_grad=True), Tensor(w, requires_grad=True)
    ty = conv2d(tx, tw, stride=s, padding=z)
    ty.backward(v)
    library = max(np.abs(a - b).max() for a, b in [(y, ty.data), (gx, tx.grad), (gw, tw.grad)])

    P, Q = y.shape[1:3]
    print(f"{H:3} x {W}{k:4}{s:8}{z:9}{P:4} x {Q}{by_nudging:23.0e}{library:13.0e}")
    assert (P, Q) == ((H + 2 * z - k) // s + 1, (W + 2 * z - k) // s + 1)
    assert by_nudging < 1e-7 and library < 1e-12

# %% [markdown]
# ## What it costs
#
# An output takes $k^2 C$ multiplications and as many additions: $2 \cdot NPQF \cdot k^2 C$ operations in all.
# Both gradients are products of the same sizes, so a step of training costs three forward passes.  RetinaNet's
# two towers are four convolutions each, 3 x 3 and 256 to 256 channels, on five levels of the image.

# %%
positions = sum(side**2 for side in (100, 50, 25, 13, 7))                   # of an 800 x 800 image
towers = 2 * 4 * (2 * positions * 256 * 3**2 * 256)
print(f"\nboth towers, one image of 800 x 800: {towers / 1e9:.0f} GFLOP, and {3 * towers / 1e9:.0f} to train")
assert round(towers / 1e9) == 126

# %% [markdown]
# ## What a filter sees
#
# Right minus left answers to vertical edges, bottom minus top to horizontal ones.  A network finds filters like
# these by itself, in its first layer; later layers ask about the answers of earlier ones.

# %%
photo = shapes("val", images=20)[16].image
gray = (photo / 255).mean(axis=2)[None, :, :, None]
side = np.array([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4             # Sobel's filter, and its transpose
sobel = np.stack([side, side.T])[..., None]
response = convolve(gray, sobel, 1, 0)[0]

mirrored = convolve(gray[:, :, ::-1], sobel, 1, 0)[0]                   # left and right change roles
assert np.allclose(mirrored[:, ::-1], response * [-1, 1])


def enlarged(picture):
    return picture.repeat(3, axis=0).repeat(3, axis=1)


def shaded(y):
    """Gray where the answer is 0, white where positive, black where negative."""
    return np.clip(127.5 + 500 * y, 0, 255).astype(np.uint8)[:, :, None].repeat(3, axis=2)


pictures = [enlarged(picture) for picture in (photo, shaded(response[:, :, 0]), shaded(response[:, :, 1]))]
contact_sheet(pictures, ["image", "right minus left", "bottom minus top"], out / "filters.png", columns=3)
print(f"\nlook at {out / 'filters.png'}: white where it gets brighter, to the right or downwards")

# %% [markdown]
# ## Three things to remember
#
# 1. Windows as rows, filters as columns: a convolution is one matrix product.
# 2. The gradient of the weights correlates what came in with what came back; the gradient of the pixels is
#    scattered to where they were read, the transpose of gathering.
# 3. To test a transpose, compare $\langle Gx, c\rangle$ with $\langle x, G^\top c\rangle$: no matrix, any size.
#
# **Next**: chapter 3, the loss that makes a hundred thousand windows worth asking.
