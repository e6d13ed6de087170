"""The tape: a Tensor remembers how it was made, and `backward` walks that memory in reverse.

An op computes its value with arrays, and hands `record` a closure that turns the gradient of its output
into the gradients of its inputs.  Nothing else is needed: the graph is the chain of closures.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from minidet import backend
from minidet.backend import Array

_recording: ContextVar[bool] = ContextVar("recording", default=True)
_observer: ContextVar[Callable | None] = ContextVar("observer", default=None)


@contextmanager
def no_grad():
    """Inside, ops compute values only: nothing is kept for a backward pass."""
    token = _recording.set(False)
    try:
        yield
    finally:
        _recording.reset(token)


def recording() -> bool:
    """Whether ops are kept for a backward pass: not inside of `no_grad`."""
    return _recording.get()


@contextmanager
def observe(callback: Callable[[str, Node, Array], None]):
    """Inside, `callback(phase, node, array)` sees every op's output as it is made ("forward")
    and every gradient as it arrives at an op's input ("backward")."""
    token = _observer.set(callback)
    try:
        yield
    finally:
        _observer.reset(token)


@dataclass(eq=False, slots=True)
class Node:
    """How a tensor was made: enough to push its gradient one step back."""

    op: str
    inputs: tuple[Tensor, ...]
    backward: Callable[..., tuple[Array | None, ...]] | None
    geometry: Any = None
    """Which pixels its windows read, where it has windows (`kernels.convolution.Geometry`): for whoever looks on."""
    fresh: bool = False
    """Whether `backward` makes every gradient anew, keeps none and hands none out twice: it may then be written to."""
    adds: bool = False
    """Whether `backward` also takes the gradient its first input has so far, or None, and gives the sum of both."""


class Tensor:
    """An array, the gradient of the loss with respect to it, and where it came from.

    `memo` holds what kernels derive from the values (packed weights); assigning `.data`, or calling
    `touch()` after writing into it, empties it.
    """

    __array_ufunc__ = None  # `array + tensor` asks Tensor.__radd__ instead of looping over elements
    __slots__ = ("__weakref__", "_data", "grad", "memo", "node", "requires_grad")

    def __init__(self, data: Array, *, requires_grad: bool = False, node: Node | None = None):
        backend.library(data)  # a list or a float would fail far from here
        self._data = data
        self.grad: Array | None = None
        self.requires_grad = requires_grad
        self.node = node
        self.memo: dict = {}

    @property
    def data(self) -> Array:
        """The values; assigning them forgets whatever was derived from the old ones."""
        return self._data

    @data.setter
    def data(self, values: Array) -> None:
        self._data = values
        self.memo = {}  # a new one: a closure that still holds the old weights keeps the old memo

    def touch(self) -> None:
        """Say that `.data` was written in place."""
        self.memo = {}

    @property
    def xp(self):
        """The Array API namespace of the values."""
        return backend.namespace(self._data)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of all axes."""
        return self._data.shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self._data.ndim

    @property
    def dtype(self):
        """Element type, as the array's library names it."""
        return self._data.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __float__(self) -> float:
        return float(self._data)

    def __repr__(self) -> str:
        made = f", from {self.node.op}" if self.node else ", requires_grad" if self.requires_grad else ""
        values = backend.to_numpy(self._data)
        text = str(values).replace("\n", "\n       ")
        return f"Tensor({text}, shape={self.shape}, dtype={values.dtype}{made})"

    def detach(self) -> Tensor:
        """The same values, cut off from the tape."""
        return Tensor(self._data)

    def backward(self, grad: Array | None = None) -> None:
        """Add d(loss)/d(leaf) to `.grad` of every leaf this tensor was made from.

        Consumes the tape: each step is released as soon as it was used, so memory falls while the
        pass runs.  A leaf owns its `.grad`.

        Raises:
            RuntimeError: if nothing trainable is behind this tensor, if (part of) the graph was already
                run backwards, or if an op returned a gradient of the wrong shape.
            ValueError: if no `grad` is given for a tensor that is not a scalar, or its shape differs.
        """
        if not self.requires_grad:
            raise RuntimeError("backward() on a tensor that depends on nothing trainable")
        if grad is None:
            if self.shape != ():
                raise ValueError(f"backward() without a gradient needs a scalar, got shape {self.shape}")
            grad = self.xp.ones_like(self.data)
        elif grad.shape != self.shape:
            raise ValueError(f"backward(): the gradient has shape {grad.shape}, the tensor {self.shape}")
        observer = _observer.get()
        pending = {id(self): (grad, False)}  # a gradient, and whether nobody else holds it
        tape = inputs_first(self)
        while tape:
            tensor = tape.pop()
            grad, ours = pending.pop(id(tensor))  # complete: all that use this tensor came before
            if tensor.node is None:
                # `+ 0` copies: an op may hand out its own buffer, and a leaf owns its gradient.
                grad = grad if ours else grad + 0
                tensor.grad = grad if tensor.grad is None else tensor.grad + grad
                continue
            node, backward = tensor.node, tensor.node.backward
            if backward is None:
                raise RuntimeError(f"{node.op}: this part of the graph was already run backwards")
            so_far = ()
            if node.adds and not observer:  # who looks on is shown this op's share alone
                so_far = (pending.pop(id(node.inputs[0]), (None, False))[0],)
            for source, g in zip(node.inputs, backward(grad, *so_far), strict=True):
                if not source.requires_grad:
                    continue
                if g is None:
                    raise RuntimeError(f"{node.op}: backward gave no gradient for an input that needs one")
                if g.shape != source.shape:
                    raise RuntimeError(
                        f"{node.op}: gradient has shape {g.shape}, input has {source.shape}"
                    )
                if g.dtype != source.dtype:  # float32 parameters used in a float64 computation
                    g = source.xp.astype(g, source.dtype)
                if observer:
                    observer("backward", node, g)
                before = pending.get(id(source))
                pending[id(source)] = (g, node.fresh) if before is None else (_sum(before, (g, node.fresh)), True)
            node.backward, node.inputs = None, ()  # what the closure captured dies here


def record(
    op: str,
    data: Array,
    inputs: tuple[Tensor, ...],
    backward: Callable,
    *,
    geometry: Any = None,
    fresh: bool = False,
    adds: bool = False,
) -> Tensor:
    """Wrap the result of an op.

    `backward` takes dL/d(output) and returns one gradient per input, None for an input that asked for
    none.  It closes over arrays, never over Tensors: no reference cycle, so memory goes with the loss.
    """
    node, observer = Node(op, inputs, backward, geometry, fresh, adds), _observer.get()
    if observer:
        observer("forward", node, data)
    if not _recording.get() or not any(x.requires_grad for x in inputs):
        return Tensor(data)
    return Tensor(data, requires_grad=True, node=node)


def _sum(first: tuple[Array, bool], second: tuple[Array, bool]) -> Array:
    """Of two gradients; in place only where nobody else holds one, for an op may hand the same to two inputs."""
    (a, ours), (b, theirs) = first, second
    if ours:
        a += b
        return a
    if theirs:
        b += a
        return b
    return a + b


def checkpoint(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function(*inputs)`, keeping nothing of its inside: the backward pass computes it again.

    Trades one more forward pass for the memory of everything between inputs and output.  `function` may
    use parameters of its own (they receive their gradients), but must reach every other tensor through
    `inputs`, and must give the same values when it runs again.

    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174, section 3.
    """
    with no_grad():
        y = function(*inputs)
    if not _recording.get():
        return y
    arrays = tuple(x.data for x in inputs)
    needed = tuple(x.requires_grad for x in inputs)

    def backward(gy):
        again = [Tensor(a, requires_grad=n) for a, n in zip(arrays, needed, strict=True)]
        token = _recording.set(True)  # whatever holds where backward() was called
        try:
            result = function(*again)
        finally:
            _recording.reset(token)
        if result.requires_grad:
            result.backward(gy)
        return tuple(
            (x.xp.zeros_like(x.data) if x.grad is None else x.grad) if x.requires_grad else None
            for x in again
        )

    # Recorded even if no input needs a gradient: a parameter inside `function` may.
    return Tensor(y.data, requires_grad=True, node=Node("checkpoint", inputs, backward))


def inputs_first(root: Tensor, *, constants: bool = False) -> list[Tensor]:
    """Every tensor that feeds `root`, as far as it was recorded, each before all tensors that use it.

    What needs no gradient is left out, unless `constants` are asked for too.
    """
    order, seen, stack = [], set(), [(root, False)]
    while stack:  # a loop, not recursion: a ResNet is deeper than Python's stack
        tensor, expanded = stack.pop()
        if expanded:
            order.append(tensor)
        elif id(tensor) not in seen:
            seen.add(id(tensor))
            stack.append((tensor, True))
            inputs = tensor.node.inputs if tensor.node else ()
            stack.extend((x, False) for x in reversed(inputs) if constants or x.requires_grad)
    return order
