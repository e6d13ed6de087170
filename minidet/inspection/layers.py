"""What a model consists of, measured by running it once: a line for each layer with parameters."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from minidet.autograd import Node, Tensor, no_grad, observe
from minidet.backend import Array
from minidet.inspection.findings import aligned
from minidet.kernels.convolution import Geometry
from minidet.nn import Module

Pair = tuple[float, float]

VIEWS = ("reshape", "permute", "getitem", "broadcast_to")
"""Ops whose output lies in the memory of their input."""

HEADER = ("layer", "op", "output", "stride", "field", "parameters", "MFLOPs", "KiB")


@dataclass(frozen=True)
class Sight:
    """How the pixels of a map look at the image, along height and width, in pixels of the image."""

    stride: Pair = (1, 1)
    """From one pixel's centre to the next one's."""
    field: Pair = (1, 1)
    """The sides of the rectangle that a pixel depends on: its receptive field."""

    def through(self, geometry: Geometry) -> Sight:
        """After windows of a convolution or a pooling."""
        stride = [a * b for a, b in zip(self.stride, geometry.stride, strict=True)]
        steps = zip(self.field, self.stride, geometry.size, geometry.dilation, strict=True)
        return Sight(tuple(stride), tuple(seen + (k - 1) * apart * step for seen, step, k, apart in steps))

    def stretched(self, old: Sequence[int], new: Sequence[int]) -> Sight:
        """After upsampling, by the nearest whole factor: maps of odd sizes do not double exactly."""
        factors = (max(1, round(q / p)) for p, q in zip(old, new, strict=True))
        return Sight(tuple(step / factor for step, factor in zip(self.stride, factors, strict=True)), self.field)

    def merged(self, other: Sight) -> Sight:
        """Where two branches meet."""
        return Sight(tuple(map(min, self.stride, other.stride)), tuple(map(max, self.field, other.field)))


@dataclass
class Layer:
    """What one op with parameters does, once."""

    name: str
    op: str = ""
    shape: tuple[int, ...] = ()
    sights: tuple[Sight, ...] = ()
    """One for each pyramid level in the output."""
    parameters: int = 0
    """Numbers in the parameters that no layer before it has used."""
    flops: int = 0
    """Two per multiply-add of convolutions and matrix products; nothing else is counted."""
    memory: int = 0
    """Bytes of the output."""


def measure_layers(model: Module, image_size: tuple[int, int]) -> list[Layer]:
    """The layers in order of execution for one empty image (height, width); the last item is everything else.

    The model runs once, as in `eval`, without recording.
    """
    trace = _Trace({id(parameter): name for name, parameter in model.named_parameters()})
    images = Tensor(model.xp.zeros((1, *image_size, 3), dtype=model.xp.float32))
    trace.remember(images.data, (Sight(),))
    with evaluating(model), no_grad(), observe(trace):
        model(images)
    return [*trace.layers, trace.rest]


def layer_table(model: Module, image_size: tuple[int, int]) -> str:
    """`measure_layers` in columns, with totals.

    stride and field (the receptive field; where branches meet, the largest) are in pixels of the image, and
    ranges where a layer runs over a whole pyramid.  FLOPs are two per multiply-add of convolutions and matrix
    products.  KiB are those of the layer's output for this one image.
    """
    layers = measure_layers(model, image_size)
    rows = [
        (
            layer.name,
            layer.op,
            str(layer.shape) if layer.shape else "",
            _range([sight.stride for sight in layer.sights]),
            _range([sight.field for sight in layer.sights]),
            *_numbers(layer.parameters, layer.flops, layer.memory),
        )
        for layer in layers
    ]
    sums = (sum(getattr(layer, what) for layer in layers) for what in ("parameters", "flops", "memory"))
    rows.append((f"all, for {image_size[0]} x {image_size[1]}", "", "", "", "", *_numbers(*sums)))
    frozen = sum(math.prod(p.shape) for p in model.parameters() if not p.requires_grad)
    table = aligned(HEADER, rows, left=3)
    return f"{table}\n{frozen:,} of the parameters are frozen" if frozen else table


class _Trace:
    """Sees every op as it runs, and follows what its maps see of the image.

    Maps are known by their arrays; a weak reference tells whether an array is still the one it was.
    """

    def __init__(self, names: dict[int, str]):
        self.names, self.layers, self.rest = names, [], Layer("everything else")
        self.counted: set[int] = set()
        self.sights: dict[int, tuple[weakref.ref, tuple[Sight, ...]]] = {}

    def __call__(self, phase: str, node: Node, array: Array) -> None:
        sights = self._sights_after(node, array)
        self.remember(array, sights)
        used = [x for x in node.inputs if id(x) in self.names]
        layer = self.rest
        if used:
            name = self.names[id(used[0])]
            layer = Layer(name.rpartition(".")[0] or name, node.op, array.shape, sights)
            self.layers.append(layer)
        layer.parameters += sum(math.prod(x.shape) for x in used if id(x) not in self.counted)
        layer.flops += _flops(node, array)
        layer.memory += 0 if node.op in VIEWS else math.prod(array.shape) * _bytes_each(array)
        self.counted |= set(map(id, used))

    def remember(self, array: Array, sights: tuple[Sight, ...]) -> None:
        if array.ndim:  # NumPy makes a sum a scalar, which is no map and takes no weak reference
            self.sights[id(array)] = (weakref.ref(array), sights)

    def _sights_after(self, node: Node, array: Array) -> tuple[Sight, ...]:
        """None if the array does not come from the image."""
        known = [(x, sights) for x in node.inputs if (sights := self._sights_of(x))]
        if not known:
            return ()
        first, sights = known[0]
        if node.geometry is not None:
            return tuple(sight.through(node.geometry) for sight in sights)
        if node.op == "upsample_nearest":
            return tuple(sight.stretched(first.shape[1:3], array.shape[1:3]) for sight in sights)
        if node.op == "concat" and array.ndim == 3 and array.shape[1] != first.shape[1]:
            return tuple(sight for _, level in known for sight in level)  # (N, S, C): levels one after the other
        for _, others in known[1:]:
            sights = tuple(map(Sight.merged, sights, others))
        return sights

    def _sights_of(self, tensor: Tensor) -> tuple[Sight, ...]:
        alive, sights = self.sights.get(id(tensor.data), (lambda: None, ()))
        return sights if alive() is tensor.data else ()


def _flops(node: Node, array: Array) -> int:
    """Two per multiply-add: every output of a convolution sums one filter, of a matrix product one row."""
    if node.op in ("conv2d", "conv2d_levels"):
        return 2 * math.prod(array.shape) * math.prod(node.inputs[1].shape[1:])
    return 2 * math.prod(array.shape) * node.inputs[0].shape[-1] if node.op == "matmul" else 0


def _bytes_each(array: Array) -> int:
    return Tensor(array).xp.finfo(array.dtype).bits // 8


@contextmanager
def evaluating(model: Module) -> Iterator[None]:
    """The model as in `eval`, and afterwards every module as it was."""
    modes = [(module, module.training) for _, module in model.named_modules() if hasattr(module, "training")]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _range(pairs: Sequence[Pair]) -> str:
    """8, or 8-128 over levels, or 8x4 where height and width differ."""
    axes = []
    for values in zip(*pairs, strict=True):
        low, high = min(values), max(values)
        axes.append(f"{low:g}" if low == high else f"{low:g}-{high:g}")
    return "x".join(axes if len(set(axes)) > 1 else axes[:1])


def _numbers(parameters: int, flops: int, memory: int) -> tuple[str, str, str]:
    """Nothing where there is none: a layer that runs again has no parameters of its own."""
    return (
        f"{parameters:,}" if parameters else "",
        f"{flops / 1e6:,.1f}" if flops else "",
        f"{memory / 1024:,.1f}" if memory else "",
    )
