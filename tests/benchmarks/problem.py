"""What is measured: the same networks, images and layers for every side.  NumPy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Network:
    """One measurement of a whole network."""

    name: str
    preset: str
    """"r50" (torchvision's ResNet-50 and FPN, every parameter trained) or "small" (the preset of that name)."""
    size: int
    images: int
    objects: int
    """Boxes in every image."""
    step: bool
    """A training step (forward, matching, loss, backward, optimizer) or a forward pass without a tape."""


NETWORKS = [
    Network("r50-forward-n1", "r50", 512, 1, 8, step=False),
    Network("r50-step-n1", "r50", 512, 1, 8, step=True),
    Network("r50-step-n2", "r50", 512, 2, 8, step=True),
    Network("small-forward", "small", 128, 16, 4, step=False),
    Network("small-step", "small", 128, 16, 4, step=True),
]
CLASSES = {"r50": 80, "small": 8}
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 1e-4


def batch(network: Network) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Images (N, H, W, 3), and of each its boxes (G, 4) and labels (G,)."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(network.images, network.size, network.size, 3)).astype(np.float32)
    boxes, labels = [], []
    for _ in range(network.images):
        corner = rng.uniform(0, 0.6, (network.objects, 2))
        sides = rng.uniform(0.1, 0.4, (network.objects, 2))
        boxes.append((network.size * np.concatenate([corner, corner + sides], axis=1)).astype(np.float32))
        labels.append(rng.integers(0, CLASSES[network.preset], network.objects))
    return images, boxes, labels


def layer_name(size: int, stride: int, channels: int, filters: int, maps) -> str:
    """A convolution in tables, and in what either side says about its networks; maps by their sides."""
    where = "pyramid" if len(maps) > 1 else maps[0]
    return f"{size}x{size} s{stride} {channels}->{filters} @{where}"


@dataclass(frozen=True)
class Layer:
    """A convolution as it occurs in the network r50: "same" padding, and a bias."""

    size: int
    stride: int
    channels: int
    filters: int
    maps: tuple[int, ...]
    """Sides of the square maps; more than one is a pyramid, which is one call for us and several for torch."""
    count: int = 1
    """How often the network has it."""

    @property
    def name(self) -> str:
        """For a table."""
        return layer_name(self.size, self.stride, self.channels, self.filters, self.maps)

    @property
    def outputs(self) -> tuple[int, ...]:
        """Sides of the maps that come out."""
        return tuple(-(-side // self.stride) for side in self.maps)

    @property
    def flops(self) -> float:
        """Of one forward pass over one image, by the definition: two for every multiplication."""
        pixels = sum(side**2 for side in self.outputs)
        return 2.0 * pixels * self.size**2 * self.channels * self.filters


PYRAMID = (64, 32, 16, 8, 4)
LAYERS = [
    Layer(7, 2, 3, 64, (512,)),
    Layer(1, 1, 64, 64, (128,)),
    Layer(3, 1, 64, 64, (128,), 3),
    Layer(1, 1, 64, 256, (128,), 4),
    Layer(1, 1, 256, 64, (128,), 2),
    Layer(1, 1, 256, 128, (128,)),
    Layer(3, 2, 128, 128, (128,)),
    Layer(1, 2, 256, 512, (128,)),
    Layer(1, 1, 128, 512, (64,), 4),
    Layer(1, 1, 512, 128, (64,), 3),
    Layer(3, 1, 128, 128, (64,), 3),
    Layer(1, 1, 512, 256, (64,), 2),
    Layer(3, 2, 256, 256, (64,)),
    Layer(1, 2, 512, 1024, (64,)),
    Layer(1, 1, 256, 1024, (32,), 6),
    Layer(1, 1, 1024, 256, (32,), 6),
    Layer(3, 1, 256, 256, (32,), 6),
    Layer(1, 1, 1024, 512, (32,)),
    Layer(3, 2, 512, 512, (32,)),
    Layer(1, 2, 1024, 2048, (32,)),
    Layer(1, 1, 512, 2048, (16,), 3),
    Layer(1, 1, 2048, 512, (16,), 2),
    Layer(3, 1, 512, 512, (16,), 2),
    Layer(1, 1, 2048, 256, (16,)),
    Layer(3, 1, 256, 256, (64,)),
    Layer(3, 1, 256, 256, (16,)),
    Layer(3, 2, 2048, 256, (16,)),
    Layer(3, 2, 256, 256, (8,)),
    Layer(3, 1, 256, 256, PYRAMID, 8),
    Layer(3, 1, 256, 720, PYRAMID),
    Layer(3, 1, 256, 36, PYRAMID),
]


def layer_arrays(layer: Layer, images: int) -> list[np.ndarray]:
    """x (N, S, C), weight (F, k, k, C), bias (F,) and dL/dy (N, S', F); levels one after the other."""
    rng = np.random.default_rng(0)
    inside, outside = (sum(side**2 for side in sides) for sides in (layer.maps, layer.outputs))
    shapes = [
        (images, inside, layer.channels),
        (layer.filters, layer.size, layer.size, layer.channels),
        (layer.filters,),
        (images, outside, layer.filters),
    ]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]
