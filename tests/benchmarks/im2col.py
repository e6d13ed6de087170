"""Convolution as small libraries write it (DeZero, Chainer on a CPU): NCHW, windows laid out, tensordot."""

from __future__ import annotations

import numpy as np

from tests.benchmarks.problem import LAYERS, layer_arrays
from tests.benchmarks.worker import serve


def im2col(x, k: int, stride: int, P: int, Q: int):
    """(N, C, H, W) -> (N, C, k, k, P, Q): one strided copy for each of the k * k taps."""
    x = np.pad(x, ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    columns = np.empty((*x.shape[:2], k, k, P, Q), x.dtype)
    for i in range(k):
        for j in range(k):
            columns[:, :, i, j] = x[:, :, i : i + stride * P : stride, j : j + stride * Q : stride]
    return columns


def col2im(columns, shape, stride: int):
    """The transpose: every tap is added back to where it was read."""
    N, C, k, _, P, Q = columns.shape
    H, W = shape[2:]
    x = np.zeros((N, C, H + 2 * (k // 2), W + 2 * (k // 2)), columns.dtype)
    for i in range(k):
        for j in range(k):
            x[:, :, i : i + stride * P : stride, j : j + stride * Q : stride] += columns[:, :, i, j]
    return x[:, :, k // 2 : k // 2 + H, k // 2 : k // 2 + W]


class LayerJob:
    """One convolution: forward, or forward and everything backward."""

    def __init__(self, index: int, images: int, backward: bool) -> None:
        self.layer = layer = LAYERS[index]
        self.backward = backward
        x, weight, self.bias, gy = layer_arrays(layer, images)
        self.x, self.gy = _maps(x, layer.maps), _maps(gy, self.layer.outputs)
        self.weight = np.ascontiguousarray(weight.transpose(0, 3, 1, 2))

    def run(self) -> None:
        """Once, level by level."""
        for x, gy, side in zip(self.x, self.gy, self.layer.outputs, strict=True):
            columns = im2col(x, self.layer.size, self.layer.stride, side, side)
            y = np.tensordot(columns, self.weight, ((1, 2, 3), (1, 2, 3))) + self.bias  # (N, P, Q, F)
            self.y = np.rollaxis(y, 3, 1)
            if self.backward:
                self.gweight = np.tensordot(gy, columns, ((0, 2, 3), (0, 4, 5)))
                self.gbias = gy.sum(axis=(0, 2, 3))
                if self.layer.channels > 3:
                    gcolumns = np.rollaxis(np.tensordot(self.weight, gy, (0, 1)), 3)
                    self.gx = col2im(gcolumns, x.shape, self.layer.stride)


def _maps(flat, sides) -> list[np.ndarray]:
    N, _, C = flat.shape
    parts = np.split(flat, np.cumsum([side**2 for side in sides])[:-1], axis=1)
    maps = [part.reshape(N, side, side, C) for part, side in zip(parts, sides, strict=True)]
    return [np.ascontiguousarray(m.transpose(0, 3, 1, 2)) for m in maps]


if __name__ == "__main__":
    serve({"layer": LayerJob})
