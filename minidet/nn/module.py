"""A module is an object with tensors in it; what they are called is where they are found."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Self

import numpy as np

from minidet import backend
from minidet.autograd import Tensor
from minidet.backend import Array


class Module:
    """Base of everything with parameters.

    Nothing is registered: attributes are walked, and the lists, tuples and dicts in them.  A Tensor is a
    parameter (trained unless its `requires_grad` is off), a bare array is a buffer (kept in checkpoints, never
    trained), a Module is a child.  The path of attributes is the name in the state dict:
    `class_subnet.tower.0.conv.weight`.
    """

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """The modules directly inside, in the order of assignment."""
        for name, value, _, _ in _walk(vars(self)):
            if isinstance(value, Module):
                yield name, value

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all inside it, each before its own children."""
        yield prefix, self
        for name, child in self.named_children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter, frozen ones included, with its name; one that is shared comes once, or it would be
        stepped twice."""
        seen = set()
        for prefix, module in self.named_modules():
            for name, value, _, _ in _walk(vars(module)):
                if isinstance(value, Tensor) and id(value) not in seen:
                    seen.add(id(value))
                    yield f"{prefix}.{name}" if prefix else name, value

    def parameters(self) -> list[Tensor]:
        """Every parameter, frozen ones included."""
        return [parameter for _, parameter in self.named_parameters()]

    def named_buffers(self) -> Iterator[tuple[str, Array]]:
        """Every array that is kept but not trained, with its name."""
        for holder, key, path in self._buffer_places():
            yield path, holder[key]

    def _buffer_places(self) -> Iterator[tuple[dict | list, str | int, str]]:
        """What each buffer is in, at which key, and its name."""
        for prefix, module in self.named_modules():
            for name, value, holder, key in _walk(vars(module)):
                if _is_array(value):
                    yield holder, key, f"{prefix}.{name}" if prefix else name

    @property
    def xp(self):
        """The Array API namespace of the parameters, or of the buffers where there are none."""
        for _, parameter in self.named_parameters():
            return parameter.xp
        return backend.namespace(next(array for _, array in self.named_buffers()))

    def to(self, xp) -> Self:
        """Move every parameter and buffer to the library `xp`; gradients are dropped.

        Returns this module.
        """
        for parameter in self.parameters():
            parameter.data = xp.asarray(backend.to_numpy(parameter.data))
            parameter.grad = None
        for holder, key, _ in list(self._buffer_places()):
            holder[key] = xp.asarray(backend.to_numpy(holder[key]))
        return self

    def freeze(self) -> Self:
        """Stop training every parameter inside, and batch norms from remembering.  Returns this module."""
        for parameter in self.parameters():
            parameter.requires_grad = False
        for _, module in self.named_modules():
            if hasattr(module, "frozen"):
                module.frozen = True
        return self

    def train(self, mode: bool = True) -> Self:
        """Let batch norms use the batch's statistics (True) or the running ones (False).

        Nothing else behaves differently in training.  Returns this module.
        """
        for _, module in self.named_modules():
            if hasattr(module, "training"):
                module.training = mode
        return self

    def eval(self) -> Self:
        """`train(False)`."""
        return self.train(False)

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters."""
        for parameter in self.parameters():
            parameter.grad = None

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of all parameters and buffers, on the host, by name."""
        arrays = {name: parameter.data for name, parameter in self.named_parameters()}
        arrays |= dict(self.named_buffers())
        return {name: np.array(backend.to_numpy(array)) for name, array in arrays.items()}

    def load_state_dict(self, state: Mapping[str, np.ndarray], *, strict: bool = True) -> list[str]:
        """Take over values by name, each in the dtype this module already has.

        Returns the names that differ (missing here, missing there, other shape), which is empty if strict.

        Raises:
            ValueError: if strict, with a line for each name that is missing, unexpected or of another shape.
        """
        mine = {name: (None, parameter) for name, parameter in self.named_parameters()}
        mine |= {path: (holder, key) for holder, key, path in self._buffer_places()}
        shapes = {name: array.shape for name, array in self.state_dict().items()}
        problems = {}
        for name in sorted(shapes.keys() | state.keys()):
            if name not in state:
                near = difflib.get_close_matches(name, state.keys() - shapes.keys(), 1)
                problems[name] = "missing" + (f" (did the file call it {near[0]}?)" if near else "")
            elif name not in shapes:
                problems[name] = f"unexpected, shape {tuple(state[name].shape)}"
            elif tuple(state[name].shape) != tuple(shapes[name]):
                problems[name] = f"has shape {tuple(state[name].shape)}, the model needs {tuple(shapes[name])}"
        if strict and problems:
            lines = [f"  {name}: {what}" for name, what in problems.items()]
            shown = lines[:20] + ([f"  ... and {len(lines) - 20} more"] if len(lines) > 20 else [])
            raise ValueError(
                f"the state dict does not fit: {len(problems)} of {len(shapes.keys() | state.keys())} names differ\n"
                + "\n".join(shown)
            )
        for name in shapes.keys() & state.keys() - problems.keys():
            holder, place = mine[name]
            old = place.data if holder is None else holder[place]
            values = backend.namespace(old).asarray(np.array(state[name]), dtype=old.dtype)
            if holder is None:
                place.data = values
            else:
                holder[place] = values
        return list(problems)


def _walk(holder: dict | list | tuple, path: str = "") -> Iterator[tuple[str, object, dict | list | tuple, str | int]]:
    """(name, value, what it is in, at which key) of all Modules, Tensors and arrays, not into other Modules."""
    for key, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict | list | tuple):
            yield from _walk(value, name)
        elif isinstance(value, set | frozenset) and any(isinstance(item, Module | Tensor) for item in value):
            raise TypeError(f"Module: {name} is a set of modules or tensors, which has no order: use a list or a dict")
        elif _is_array(value) and isinstance(holder, tuple):
            raise TypeError(f"Module: {name} is an array in a tuple, which cannot take new values: use a list")
        elif isinstance(value, Module | Tensor) or _is_array(value):
            yield name, value, holder, key


def _is_array(value) -> bool:
    return type(value).__module__.partition(".")[0] in backend.LIBRARIES and hasattr(value, "shape")
