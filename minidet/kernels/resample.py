"""Bytes to numbers and to another size, in one pass over the image."""

from __future__ import annotations

import numpy as np

from minidet import backend
from minidet.kernels import cuda
from minidet.kernels.compiler import compiled
from minidet.kernels.kernel import Kernel


@Kernel
def resample(image, levels, height: int, width: int):
    """Look every byte up, then sample linearly between the four pixels nearest to each new centre.

    With centres at c = (i + 1/2) * H / height - 1/2, at least 0, and t = c - floor(c), along both axes:
        y[i] = (1 - t) * x[floor(c)] + t * x[floor(c) + 1], the last pixel repeated

    A byte has only 256 values, so `levels` holds all that normalising can make of one.

    Shapes:
        image: (H, W, C), bytes
        levels: (256, C)
        returns: (height, width, C), in the type of `levels`
    Rule: no antialiasing: a smaller image skips pixels (align_corners=False elsewhere).
    """
    xp = backend.namespace(image)
    H, W, C = image.shape
    entries = xp.astype(image, xp.int64) * C + xp.arange(C, device=image.device)
    pixels = xp.reshape(xp.take(xp.reshape(levels, (-1,)), xp.reshape(entries, (-1,))), (H, W, C))
    for axis, (old, new) in enumerate(((H, height), (W, width))):
        centres = (xp.arange(new, dtype=xp.float64, device=image.device) + 0.5) * (old / new) - 0.5
        centres = xp.where(centres > 0, centres, xp.zeros_like(centres))
        lower = xp.astype(centres, xp.int64)
        upper = xp.where(lower + 1 < old, lower + 1, lower)
        t = xp.astype(centres - xp.astype(lower, xp.float64), levels.dtype)
        t = xp.reshape(t, (-1, 1, 1) if axis == 0 else (1, -1, 1))
        first, second = xp.take(pixels, lower, axis=axis), xp.take(pixels, upper, axis=axis)
        pixels = first + t * (second - first)
    return pixels


@resample.faster_on("numpy")
def _resample_numba(image, levels, height: int, width: int):
    # With channels between rows and columns no image is contiguous, flipped or not: one compiled version reads all.
    return _resample(image.transpose(0, 2, 1), np.ascontiguousarray(levels), height, width)


@resample.faster_on("cupy")
def _resample_cuda(image, levels, height: int, width: int):
    y = backend.namespace(image).empty((height, width, image.shape[2]), dtype=levels.dtype)
    arguments = cuda.contiguous(image), cuda.contiguous(levels), y, *image.shape, height, width
    cuda.launch(__file__, "resample", y.size, *arguments, real=levels.dtype)
    return y


@compiled(nogil=True)
def _resample(image, levels, height, width):
    H, C, W = image.shape
    out = np.empty((height, width, C), levels.dtype)
    if (height, width) == (H, W):
        for i in range(H):
            for c in range(C):
                for j in range(W):
                    out[i, j, c] = levels[image[i, c, j], c]
        return out
    row = np.empty((W, C), levels.dtype)  # one row of the new height, still of the old width
    for i in range(height):
        centre = max((i + 0.5) * (H / height) - 0.5, 0.0)
        above = int(centre)
        below = min(above + 1, H - 1)
        t = levels.dtype.type(centre - above)
        for j in range(W):
            for c in range(C):
                first, second = levels[image[above, c, j], c], levels[image[below, c, j], c]
                row[j, c] = first + t * (second - first)
        for j in range(width):
            centre = max((j + 0.5) * (W / width) - 0.5, 0.0)
            left = int(centre)
            right = min(left + 1, W - 1)
            t = levels.dtype.type(centre - left)
            for c in range(C):
                out[i, j, c] = row[left, c] + t * (row[right, c] - row[left, c])
    return out
