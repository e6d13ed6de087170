"""Our side of the measurements: a worker that uses minidet as anybody would."""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
from numba import get_num_threads

import minidet as md
from minidet.data.loader import Batch
from minidet.detection.criterion import MOVING_START
from minidet.kernels import Kernel
from minidet.kernels.parallel import parallel
from minidet.models.resnet import RESNET50
from minidet.ops import conv2d, conv2d_levels, max_pool2d, reshape, upsample_nearest
from minidet.optim import SGD, AdamW
from minidet.training.step import batch_gradient
from tests.benchmarks.peak import peak_gflops
from tests.benchmarks.problem import (
    CLASSES,
    LAYERS,
    LEARNING_RATE,
    PARTS,
    WEIGHT_DECAY,
    Network,
    batch,
    layer_arrays,
    part_arrays,
)
from tests.benchmarks.worker import Each, serve


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

    def profile(self, calls: int) -> dict:
        """Milliseconds of a call, and of every kernel's versions in it."""
        seconds, depth = defaultdict(float), [0]
        kernels = [found for found in gc.get_objects() if isinstance(found, Kernel)]
        untimed = [(kernel.fast, kernel.textbook) for kernel in kernels]

        def timed(name, run):
            def timed_run(*args):
                depth[0] += 1
                clock = time.perf_counter()
                try:
                    return run(*args)
                finally:
                    depth[0] -= 1
                    if not depth[0]:  # a kernel inside a kernel is part of it
                        seconds[name] += time.perf_counter() - clock

            return timed_run

        for kernel in kernels:
            name = kernel.__name__
            kernel.fast = {
                version: (owner, when, timed(f"{name} {version}", run))
                for version, (owner, when, run) in kernel.fast.items()
            }
            kernel.textbook = timed(f"{name} textbook", kernel.textbook)
        clock = time.perf_counter()
        for _ in range(calls):
            self.run()
        whole = time.perf_counter() - clock
        for kernel, (fast, textbook) in zip(kernels, untimed, strict=True):
            kernel.fast, kernel.textbook = fast, textbook
        return {"ms": 1e3 * whole / calls, "kernels": {name: 1e3 * s / calls for name, s in seconds.items()}}


def write_again(tensors: list[md.Tensor]) -> None:
    """The same numbers, every thread its part of them."""
    threads = get_num_threads()
    for tensor in tensors:
        _add(threads, threads, tensor.data.reshape(-1), np.float32(0))


@parallel
def _add(part, parts, numbers, more):
    for j in range(part * len(numbers) // parts, (part + 1) * len(numbers) // parts):
        numbers[j] += more


class LayerJob:
    """One convolution through the public op: forward, or forward and everything backward."""

    def __init__(self, index: int, images: int, backward: bool) -> None:
        self.layer, self.backward = LAYERS[index], backward
        x, weight, bias, self.gy, *shortcut = layer_arrays(self.layer, images)
        side = self.layer.maps[0]
        shape = (images, side, side, -1) if len(self.layer.maps) == 1 else x.shape
        # Nobody asks for the gradient of the photo.
        self.x = md.Tensor(x.reshape(shape), requires_grad=backward and self.layer.channels > 3)
        self.weight = md.Tensor(weight, requires_grad=backward)
        self.bias = md.Tensor(bias, requires_grad=backward)
        self.end, side, self.shortcut = {"relu": self.layer.end in ("relu", "join")}, self.layer.outputs[0], None
        if shortcut:
            side //= 2 if self.layer.end == "above" else 1
            self.shortcut = md.Tensor(shortcut[0].reshape(images, side, side, -1), requires_grad=backward)

    def write_inputs(self) -> None:
        """What the layer before has made."""
        write_again([self.x])

    def run(self) -> None:
        """Once; backward belongs to training, where the weights have just changed."""
        layer = self.layer
        if self.backward:
            self.weight.touch()
        if len(layer.maps) > 1:
            y = conv2d_levels(self.x, tuple((side, side) for side in layer.maps), self.weight, self.bias, **self.end)
        else:
            shortcut, side = self.shortcut, layer.outputs[0]
            shortcut = upsample_nearest(shortcut, (side, side)) if layer.end == "above" else shortcut
            shape = {"stride": layer.stride, "padding": layer.size // 2}
            y = conv2d(self.x, self.weight, self.bias, shortcut=shortcut, **shape, **self.end)
        self.y = y.data
        if self.backward:
            y.backward(self.gy.reshape(y.shape))
            self.found = {"gweight": self.weight.grad, "gbias": self.bias.grad}
            self.found |= {} if self.x.grad is None else {"gx": self.x.grad}
            self.x.grad = self.weight.grad = self.bias.grad = None
            if self.shortcut is not None:
                self.shortcut.grad = None

    def results(self) -> dict[str, np.ndarray]:
        """Output and gradients, positions in one axis."""
        self.run()
        N, C, F = len(self.gy), self.layer.channels, self.layer.filters
        shapes = {"gx": (N, -1, C), "gweight": self.weight.shape, "gbias": (F,)}
        return {"y": self.y.reshape(self.gy.shape)} | (
            {name: g.reshape(shapes[name]) for name, g in self.found.items()} if self.backward else {}
        )


class PartJob:
    """What an r50 has beside convolutions: forward, or forward and backward, or the update."""

    def __init__(self, index: int, network: dict, weights: str) -> None:
        part, self.network, self.found = PARTS[index], NetworkJob(network, weights), {}
        self.run, self.step = getattr(self, part.what), self.network.network.step
        arrays = part_arrays(part, self.network.network.images)
        self.tensors = [md.Tensor(array, requires_grad=self.step) for array in arrays]
        if part.what == "update":
            for parameter in self.network.optimizer.parameters.values():
                parameter.data = np.ones(parameter.shape, np.float32)
                parameter.grad = np.full(parameter.shape, 1e-3, np.float32)

    def write_inputs(self) -> None:
        """What the layer before has made."""
        write_again(self.tensors)

    def pool(self) -> None:
        """The maximum of every window."""
        (x,) = self.tensors
        y = max_pool2d(x, 3, stride=2, padding=1)
        self.found = {"y": y.data}
        if self.step:
            y.backward(np.ones(y.shape, np.float32))
            self.found["gx"], x.grad = x.grad, None

    def join(self) -> None:
        """Logits and deltas of all levels, a row per anchor: they lie like that already."""
        outputs = [reshape(x, (len(x.data), -1, numbers)) for x, numbers in zip(self.tensors, (80, 4), strict=True)]
        self.found = {f"y{n}": y.data for n, y in enumerate(outputs)}
        for n, (x, y) in enumerate(zip(self.tensors, outputs, strict=True) if self.step else ()):
            y.backward(y.data)
            self.found[f"g{n}"], x.grad = x.grad.reshape(y.shape), None

    def losses(self) -> None:
        """Everything between the network's outputs and their gradients."""
        model, outputs = self.network.model, tuple(self.tensors)

        class Known:
            """A network whose outputs are known."""

            config, xp, anchors = model.config, model.xp, model.anchors
            __call__ = staticmethod(lambda images: outputs)

        measured = batch_gradient(Known(), self.network.batch, 1, MOVING_START)
        self.found = {"losses": np.asarray([measured.classification, measured.box])}
        for name, tensor in zip(("logits", "deltas"), outputs, strict=True):
            self.found[name], tensor.grad = tensor.grad, None

    def update(self) -> None:
        """A step of the optimizer, of all parameters."""
        self.network.optimizer.step(LEARNING_RATE)

    def results(self) -> dict[str, np.ndarray]:
        """Output, losses, gradients: what there is; or parameters that were ones."""
        self.run()
        return self.found or {name: p.data for name, p in self.network.optimizer.parameters.items()}


class PeakJob:
    """How fast the machine multiplies."""

    def measure(self) -> dict:
        """GFLOP/s."""
        return {"gflops": peak_gflops()}


def layers(network: dict, weights: str) -> Each:
    """All layers of the r50, and what else it has."""
    images, step = network["images"], network["step"]
    convolutions = [LayerJob(index, images, step) for index in range(len(LAYERS))]
    parts = [PartJob(index, network, weights) for index, part in enumerate(PARTS) if step or not part.step]
    return Each([*convolutions, *parts])


if __name__ == "__main__":
    serve({"network": NetworkJob, "layers": layers, "peak": PeakJob})
