"""Our side of the measurements: a worker that uses minidet as anybody would."""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numba
import numpy as np

import minidet as md
from minidet.data.loader import Batch
from minidet.detection.criterion import MOVING_START
from minidet.kernels import Kernel
from minidet.kernels.convolution import Geometry
from minidet.models.resnet import RESNET50
from minidet.ops import conv2d, conv2d_levels
from minidet.optim import SGD, AdamW
from minidet.training.step import batch_gradient
from tests.benchmarks.peak import peak_gflops
from tests.benchmarks.problem import (
    CLASSES,
    LAYERS,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Network,
    batch,
    layer_arrays,
    layer_name,
)
from tests.benchmarks.worker import serve


def build(preset: str) -> md.RetinaNet:
    """The network, with frozen norms that are no identity and keep activations of order one."""
    classes = [f"class {k}" for k in range(CLASSES[preset])]
    if preset == "small":
        return md.RetinaNet(md.presets.small(classes), seed=0)
    model = md.RetinaNet(replace(md.presets.paper(classes), backbone=RESNET50), seed=0)
    rng = np.random.default_rng(1)
    for name, values in model.named_buffers():
        last = 0.2 if "conv3" in name else 1.0  # a branch adds a little to its shortcut
        if name.endswith(("norm.weight", "running_var")):
            values[...] = last * rng.uniform(0.8, 1.2, values.shape)
        else:
            values[...] = rng.normal(0, 0.1, values.shape)
    return model


class NetworkJob:
    """A forward pass or a training step."""

    def __init__(self, network: dict, weights: str) -> None:
        self.network = Network(**network)
        self.model = model = build(self.network.preset)
        size, N = self.network.size, self.network.images
        np.savez(weights, anchors=model.anchors(size, size), **model.state_dict())
        images, boxes, labels = batch(self.network)
        sizes = np.full((N, 2), size)
        self.batch = Batch(images, sizes, sizes, boxes, labels, list(range(N)), [""] * N, 0)
        rule = SGD() if self.network.preset == "r50" else AdamW()
        self.optimizer = md.TrainConfig(rule=rule, weight_decay=WEIGHT_DECAY).optimizer(model)
        model.train() if self.network.step else model.eval()

    def run(self) -> None:
        """Once."""
        if self.network.step:
            batch_gradient(self.model, self.batch, 1, MOVING_START)
            self.optimizer.step(LEARNING_RATE)
            self.optimizer.clear_gradients()
        else:
            with md.no_grad():
                self.outputs = self.model(md.Tensor(self.batch.images))

    def results(self) -> dict[str, np.ndarray]:
        """Logits and deltas; or both losses and every parameter's gradient."""
        if not self.network.step:
            self.run()
            return {name: tensor.data for name, tensor in zip(("logits", "deltas"), self.outputs, strict=True)}
        measured = batch_gradient(self.model, self.batch, 1, MOVING_START)
        gradients = {name: p.grad for name, p in self.model.named_parameters()}
        self.optimizer.clear_gradients()
        return gradients | {"losses": np.asarray([measured.classification, measured.box])}

    def compiled_bytes(self) -> dict:
        """Size of the compiled code on disk: it grows when something had to be compiled."""
        return {
            "bytes": sum(file.stat().st_size for file in Path(numba.config.CACHE_DIR).rglob("*") if file.is_file())
        }

    def watch(self) -> dict:
        """Note every kernel from now on."""
        self.seen: list[tuple[str, str, float, float]] = []
        # By its type: a weak reference whose object is gone would be asked for its class, and raise.
        kernels = [found for found in gc.get_objects() if type(found) is Kernel]
        self.unwatched = [(kernel, kernel.fast, kernel.many, kernel.textbook) for kernel in kernels]
        depth = [0]

        def timed(name, run):
            def timed_run(*args):
                depth[0] += 1
                begin = time.perf_counter()
                try:
                    return run(*args)
                finally:
                    end = time.perf_counter()
                    depth[0] -= 1
                    if not depth[0]:  # a kernel inside a kernel is part of it
                        self.seen.append((name, _layer_of(name, args), begin, end))

            return timed_run

        for kernel in kernels:
            name = kernel.__name__
            kernel.fast = {
                version: (owner, when, timed(f"{name} {version}", run))
                for version, (owner, when, run) in kernel.fast.items()
            }
            kernel.many = {version: timed(f"{name} {version}", run) for version, run in kernel.many.items()}
            kernel.textbook = timed(f"{name} textbook", kernel.textbook)
        return {}

    def events(self) -> dict:
        """What was noted since: of each kernel its name, of a convolution the layer, begin and end in seconds."""
        for kernel, fast, many, textbook in self.unwatched:
            kernel.fast, kernel.many, kernel.textbook = fast, many, textbook
        return {"events": self.seen}


def _layer_of(kernel: str, args) -> str:
    """Which convolution a kernel was called for, if for one."""
    geometry = next((arg for arg in args if isinstance(arg, Geometry)), None)
    if geometry is None:
        return ""
    if "weight" in kernel:
        channels, filters = (maps.shape[2] for maps in args[:2])
    else:
        filters, _, _, channels = next(arg.shape for arg in args if np.ndim(arg) == 4)
    return _name(geometry, channels, filters)


@cache
def _name(geometry: Geometry, channels: int, filters: int) -> str:
    return layer_name(geometry.size[0], geometry.stride[0], channels, filters, [H for H, _ in geometry.maps])


class LayerJob:
    """One convolution through the public op: forward, or forward and everything backward."""

    def __init__(self, index: int, images: int, backward: bool) -> None:
        self.layer, self.backward = LAYERS[index], backward
        x, weight, bias, self.gy = layer_arrays(self.layer, images)
        side = self.layer.maps[0]
        shape = (images, side, side, -1) if len(self.layer.maps) == 1 else x.shape
        self.x, self.weight, self.bias = (
            md.Tensor(array, requires_grad=backward) for array in (x.reshape(shape), weight, bias)
        )

    def results(self) -> dict[str, np.ndarray]:
        """Output and gradients, positions in one axis."""
        layer = self.layer
        if len(layer.maps) > 1:
            y = conv2d_levels(self.x, tuple((side, side) for side in layer.maps), self.weight, self.bias)
        else:
            y = conv2d(self.x, self.weight, self.bias, stride=layer.stride, padding=layer.size // 2)
        found = {"y": y.data.reshape(self.gy.shape)}
        if self.backward:
            y.backward(self.gy.reshape(y.shape))
            found |= {"gweight": self.weight.grad, "gbias": self.bias.grad}
            found["gx"] = self.x.grad.reshape(len(self.gy), -1, layer.channels)
        return found


class PeakJob:
    """How fast the machine multiplies."""

    def measure(self) -> dict:
        """GFLOP/s."""
        return {"gflops": peak_gflops()}


if __name__ == "__main__":
    serve({"network": NetworkJob, "layer": LayerJob, "peak": PeakJob})
