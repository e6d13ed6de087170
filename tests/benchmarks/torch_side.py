"""torch's side of the measurements: eager, float32, in either memory layout."""

from __future__ import annotations

import os
import time
import warnings

import numpy as np
import torch
from torch.nn import functional

from tests.benchmarks.problem import (
    LAYERS,
    LEARNING_RATE,
    PARTS,
    PYRAMID,
    WEIGHT_DECAY,
    Network,
    batch,
    layer_arrays,
    part_arrays,
)
from tests.benchmarks.torch_retinanet import RetinaNet, load, losses
from tests.benchmarks.turns import THREADS
from tests.benchmarks.worker import Each, serve

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


class NetworkJob:
    """A forward pass or a training step."""

    def __init__(self, network: dict, weights: str, layout: str) -> None:
        self.network = network = Network(**network)
        format = {"memory_format": LAYOUTS[layout]}
        self.model = RetinaNet(network.preset)
        state = dict(np.load(weights))
        self.factors = load(self.model, state)
        self.model = self.model.to(**format).train(network.step)
        images, boxes, labels = batch(network)
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(**format)
        self.boxes, self.labels = [[torch.from_numpy(a) for a in arrays] for arrays in (boxes, labels)]
        self.anchors = torch.from_numpy(state["anchors"])
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        rates = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "fused": True}  # the fastest it has
        if network.preset == "r50":
            self.optimizer = torch.optim.SGD(parameters, momentum=0.9, **rates)
        else:
            self.optimizer = torch.optim.AdamW(parameters, **rates)

    def run(self) -> None:
        """Once."""
        if self.network.step:
            self._gradient()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        else:
            with torch.no_grad():
                self.outputs = self.model(self.images)

    def _gradient(self) -> list[float]:
        outputs = self.model(self.images)
        low_quality = self.network.preset == "small"
        both = losses(*outputs, self.anchors, self.boxes, self.labels, low_quality)
        sum(both).backward()
        return [loss.item() for loss in both]

    def results(self) -> dict[str, np.ndarray]:
        """What minidet's side calls by the same names, in its layout."""
        if not self.network.step:
            self.run()
            return {name: y.numpy() for name, y in zip(("logits", "deltas"), self.outputs, strict=True)}
        found = {"losses": np.asarray(self._gradient())}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                g = parameter.grad.numpy() * self.factors.get(name, 1)
                found[name] = g.transpose(0, 2, 3, 1) if g.ndim == 4 else g
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def compiled(self, calls: int) -> dict:
        """Milliseconds of the forward pass after torch.compile, or why there are none."""
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = (
            "1"  # no helper processes, which would share our standard input
        )
        try:
            clock = time.perf_counter()
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = torch.compile(self.model)
                model(self.images)
                compiling = time.perf_counter() - clock
                clock = time.perf_counter()
                for _ in range(calls):
                    model(self.images)
            return {"ms": 1e3 * (time.perf_counter() - clock) / calls, "compiling_s": compiling}
        except Exception as error:  # a compiler is missing, or torch does not like it
            return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}


def write_again(tensors: list[torch.Tensor]) -> None:
    """The same numbers, every thread its part of them."""
    for tensor in tensors:
        tensor.detach().add_(0)


class LayerJob:
    """One convolution with its end: forward, or forward and everything backward."""

    def __init__(self, index: int, images: int, backward: bool, layout: str) -> None:
        self.layer, self.backward = LAYERS[index], backward
        format = {"memory_format": LAYOUTS[layout]}
        x, weight, bias, gy, *shortcut = layer_arrays(self.layer, images)
        self.x, self.gy = _levels(x, self.layer.maps, format), _levels(gy, self.layer.outputs, format)
        inside = [side // 2 for side in self.layer.outputs] if self.layer.end == "above" else self.layer.outputs
        self.shortcut = _levels(shortcut[0], inside, format) if shortcut else []
        self.weight = torch.from_numpy(weight).permute(0, 3, 1, 2).contiguous(**format)
        self.bias = torch.from_numpy(bias)
        for tensor in (self.weight, self.bias, *self.shortcut, *(self.x if self.layer.channels > 3 else ())):
            tensor.requires_grad_(backward)

    def write_inputs(self) -> None:
        """What the layer before has made."""
        write_again(self.x)

    def run(self) -> None:
        """Once."""
        layer = self.layer
        with torch.set_grad_enabled(self.backward):
            self.y = [functional.conv2d(x, self.weight, self.bias, layer.stride, layer.size // 2) for x in self.x]
            for i, shortcut in enumerate(self.shortcut):
                if layer.end == "above":
                    shortcut = functional.interpolate(shortcut, size=self.y[i].shape[-2:], mode="nearest")
                self.y[i] = shortcut + self.y[i]
            if layer.end in ("relu", "join"):
                self.y = [functional.relu(y, inplace=True) for y in self.y]
        if self.backward:
            torch.autograd.backward(self.y, self.gy)
            self.found = {"gweight": self.weight.grad.permute(0, 2, 3, 1), "gbias": self.bias.grad}
            if self.layer.channels > 3:
                self.found["gx"] = [x.grad for x in self.x]
            for tensor in (*self.x, *self.shortcut, self.weight, self.bias):
                tensor.grad = None

    def results(self) -> dict[str, np.ndarray]:
        """What minidet's side calls by the same names, in its layout."""
        self.run()
        found = {"y": _joined(self.y)}
        if self.backward:
            found |= {name: _joined(g) if name == "gx" else g.numpy() for name, g in self.found.items()}
        return found


class PartJob:
    """What an r50 has beside convolutions: forward, or forward and backward, or the update."""

    def __init__(self, index: int, network: dict, weights: str, layout: str) -> None:
        part, self.network, self.found = PARTS[index], NetworkJob(network, weights, layout), {}
        self.run, self.step = getattr(self, part.what), self.network.network.step
        self.tensors = [torch.from_numpy(array) for array in part_arrays(part, self.network.network.images)]
        format = {"memory_format": LAYOUTS[layout]}
        if part.what == "pool":
            self.tensors = [x.permute(0, 3, 1, 2).contiguous(**format) for x in self.tensors]
        if part.what == "join":
            self.tensors = [level for x in self.tensors for level in _levels(x.numpy(), PYRAMID, format)]
        for tensor in self.tensors:
            tensor.requires_grad_(self.step)
        if part.what == "update":
            for parameter in self.network.model.parameters():
                parameter.data.fill_(1)
                parameter.grad = torch.full_like(parameter, 1e-3) if parameter.requires_grad else None

    def write_inputs(self) -> None:
        """What the layer before has made."""
        write_again(self.tensors)

    def pool(self) -> None:
        """The maximum of every window."""
        (x,) = self.tensors
        y = functional.max_pool2d(x, 3, 2, 1)
        self.found = {"y": y.detach().permute(0, 2, 3, 1).numpy()}
        if self.step:
            y.backward(torch.ones_like(y))
            self.found["gx"], x.grad = x.grad.permute(0, 2, 3, 1).numpy(), None

    def join(self) -> None:
        """Logits and deltas of all levels, a row per anchor."""
        self.found, half = {}, len(PYRAMID)
        for n, (levels, numbers) in enumerate(((self.tensors[:half], 80), (self.tensors[half:], 4))):
            rows = [x.permute(0, 2, 3, 1).reshape(len(x), -1, numbers) for x in levels]
            y = torch.cat(rows, dim=1)
            self.found[f"y{n}"] = y.detach().numpy()
            if self.step:
                y.backward(y.detach())
                self.found[f"g{n}"] = [x.grad for x in levels]
                for x in levels:
                    x.grad = None

    def losses(self) -> None:
        """Everything between the network's outputs and their gradients."""
        network = self.network
        both = losses(*self.tensors, network.anchors, network.boxes, network.labels, False)
        sum(both).backward()
        self.found = {"losses": np.asarray([loss.item() for loss in both])}
        for name, tensor in zip(("logits", "deltas"), self.tensors, strict=True):
            self.found[name], tensor.grad = tensor.grad.numpy(), None

    def update(self) -> None:
        """A step of the optimizer, of all parameters."""
        self.network.optimizer.step()

    def results(self) -> dict[str, np.ndarray]:
        """What minidet's side calls by the same names, in its layout."""
        self.run()
        for n in (0, 1) if "g0" in self.found else ():
            self.found[f"g{n}"] = _joined(self.found[f"g{n}"]).reshape(self.found[f"y{n}"].shape)
        return self.found or {
            name: (p.detach().permute(0, 2, 3, 1) if p.ndim == 4 else p.detach()).numpy()
            for name, p in self.network.model.named_parameters()
            if p.requires_grad
        }


def _levels(flat, sides, format) -> list[torch.Tensor]:
    N, _, C = flat.shape
    parts = np.split(flat, np.cumsum([side**2 for side in sides])[:-1], axis=1)
    maps = [torch.from_numpy(p.reshape(N, s, s, C)) for p, s in zip(parts, sides, strict=True)]
    return [m.permute(0, 3, 1, 2).contiguous(**format) for m in maps]


def _joined(levels) -> np.ndarray:
    return np.concatenate([y.detach().permute(0, 2, 3, 1).flatten(1, 2).numpy() for y in levels], axis=1)


def layers(network: dict, weights: str, layout: str) -> Each:
    """All layers of the r50, and what else it has."""
    images, step = network["images"], network["step"]
    convolutions = [LayerJob(index, images, step, layout) for index in range(len(LAYERS))]
    parts = [PartJob(index, network, weights, layout) for index, part in enumerate(PARTS) if step or not part.step]
    return Each([*convolutions, *parts])


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    serve({"network": NetworkJob, "layers": layers})
