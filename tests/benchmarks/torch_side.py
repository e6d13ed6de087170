"""torch's side of the measurements: eager, float32, in either memory layout."""

from __future__ import annotations

import os
import time
import warnings

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from tests.benchmarks.problem import (
    LAYERS,
    LEARNING_RATE,
    PYRAMID,
    WEIGHT_DECAY,
    Network,
    batch,
    layer_arrays,
    layer_name,
)
from tests.benchmarks.torch_retinanet import RetinaNet, load, losses
from tests.benchmarks.turns import THREADS
from tests.benchmarks.worker import serve

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


class Watch(TorchDispatchMode):
    """Notes every operation, and as little as can be: what is done while it watches, it slows down."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        begin = time.perf_counter()
        result = operation(*args, **(kwargs or {}))
        end = time.perf_counter()
        first = CONVOLUTIONS.get(operation)
        convolution = None if first is None else (args[first].shape, args[first + 1].data_ptr())
        self.seen.append((operation, convolution, begin, end))
        return result


CONVOLUTIONS = {torch.ops.aten.convolution.default: 0, torch.ops.aten.convolution_backward.default: 1}
"""Where among their arguments the maps are that they read; weights come next."""


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

    def watch(self) -> dict:
        """Note every operation from now on."""
        self.watched = Watch()
        self.watched.__enter__()
        return {}

    def events(self) -> dict:
        """What was noted since: of each operation its name, of a convolution the layer, begin and end in seconds."""
        self.watched.__exit__(None, None, None)
        layers = {m.weight.data_ptr(): m for m in self.model.modules() if isinstance(m, nn.Conv2d)}
        pyramids = {p.data_ptr() for p in self.model.head.parameters()}
        events = []
        for operation, convolution, begin, end in self.watched.seen:
            layer = ""
            if convolution:
                shape, weight = convolution
                conv = layers[weight]
                where = PYRAMID if weight in pyramids else shape[2:3]
                layer = layer_name(
                    conv.kernel_size[0], conv.stride[0], conv.in_channels, conv.out_channels, where
                )
            events.append((operation.overloadpacket.__name__, layer, begin, end))
        return {"events": events}

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


class LayerJob:
    """One convolution: forward, or forward and everything backward."""

    def __init__(self, index: int, images: int, backward: bool, layout: str) -> None:
        self.layer, self.backward = LAYERS[index], backward
        format = {"memory_format": LAYOUTS[layout]}
        x, weight, bias, gy = layer_arrays(self.layer, images)
        self.x, self.gy = _levels(x, self.layer.maps, format), _levels(gy, self.layer.outputs, format)
        self.weight = torch.from_numpy(weight).permute(0, 3, 1, 2).contiguous(**format)
        self.bias = torch.from_numpy(bias)
        for tensor in (self.weight, self.bias, *self.x):
            tensor.requires_grad_(backward)

    def results(self) -> dict[str, np.ndarray]:
        """What minidet's side calls by the same names, in its layout."""
        layer = self.layer
        levels = [functional.conv2d(x, self.weight, self.bias, layer.stride, layer.size // 2) for x in self.x]
        found = {"y": _joined(levels)}
        if self.backward:
            torch.autograd.backward(levels, self.gy)
            found |= {"gweight": self.weight.grad.permute(0, 2, 3, 1).numpy(), "gbias": self.bias.grad.numpy()}
            found["gx"] = _joined([x.grad for x in self.x])
        return found


def _levels(flat, sides, format) -> list[torch.Tensor]:
    N, _, C = flat.shape
    parts = np.split(flat, np.cumsum([side**2 for side in sides])[:-1], axis=1)
    maps = [torch.from_numpy(p.reshape(N, s, s, C)) for p, s in zip(parts, sides, strict=True)]
    return [m.permute(0, 3, 1, 2).contiguous(**format) for m in maps]


def _joined(levels) -> np.ndarray:
    return np.concatenate([y.detach().permute(0, 2, 3, 1).flatten(1, 2).numpy() for y in levels], axis=1)


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    serve({"network": NetworkJob, "layer": LayerJob})
