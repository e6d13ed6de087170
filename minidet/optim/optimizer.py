"""The optimizer: applies one update rule to every parameter, and remembers what the rule needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from minidet import backend
from minidet.autograd import Tensor


class Rule(Protocol):
    """How parameters move: hyperparameters and a formula, no state (SGD and AdamW are rules).

    `state` names the arrays the rule keeps for every parameter, each as large as the parameter.
    """

    state: ClassVar[tuple[str, ...]]

    def update(self, moves: Sequence[tuple], *, steps: Sequence[int], lr: float, weight_decay: float) -> None:
        """Write the new values into `p` and its state, for every (p, g, *state); their steps count from 1."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters by name that share a weight decay and a multiple of the learning rate."""

    parameters: dict[str, Tensor]
    lr_scale: float = 1.0
    weight_decay: float = 0.0


class Optimizer:
    """One rule, several groups of parameters, and the rule's memory of each parameter.

    A parameter without a gradient (`grad is None`) is skipped entirely: no weight decay, no momentum, and
    its own step count stands still, as in torch.
    """

    def __init__(self, rule: Rule, groups: Sequence[ParameterGroup]):
        self.rule = rule
        self.groups = tuple(groups)
        self.parameters: dict[str, Tensor] = {}
        for group in self.groups:
            for name, parameter in group.parameters.items():
                if name in self.parameters:
                    raise ValueError(f"optimizer: parameter {name!r} is in two groups")
                self.parameters[name] = parameter
        if not self.parameters:
            raise ValueError("optimizer: no parameters (is everything frozen?)")
        self.steps = dict.fromkeys(self.parameters, 0)
        self.state = {
            name: tuple(p.xp.zeros_like(p.data) for _ in rule.state) for name, p in self.parameters.items()
        }

    def step(self, lr: float) -> None:
        """Move every parameter that has a gradient, in place, at `lr` times its group's `lr_scale`."""
        for group in self.groups:
            moving = {name: p for name, p in group.parameters.items() if p.grad is not None}
            moves = [(p.data, p.grad, *self.state[name]) for name, p in moving.items()]
            self.steps.update({name: self.steps[name] + 1 for name in moving})
            steps = [self.steps[name] for name in moving]
            self.rule.update(moves, steps=steps, lr=lr * group.lr_scale, weight_decay=group.weight_decay)
            for parameter in moving.values():
                parameter.touch()

    def clear_gradients(self) -> None:
        """Forget all gradients, as before the next step."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, np.ndarray]:
        """Everything the next step depends on besides the parameters: "step.NAME" and "STATE.NAME"."""
        saved = {f"step.{name}": np.asarray(count, dtype=np.int64) for name, count in self.steps.items()}
        for name, arrays in self.state.items():
            for kind, array in zip(self.rule.state, arrays, strict=True):
                saved[f"{kind}.{name}"] = backend.to_numpy(array).copy()
        return saved

    def load_state_dict(self, saved: dict[str, np.ndarray]) -> None:
        """Continue where `state_dict` was taken; nothing changes unless everything fits.

        Raises:
            ValueError: if a name is missing or unknown, or a shape differs.
        """
        expected = {f"step.{name}": () for name in self.parameters} | {
            f"{kind}.{name}": p.shape for name, p in self.parameters.items() for kind in self.rule.state
        }
        missing, unknown = expected.keys() - saved.keys(), saved.keys() - expected.keys()
        if missing or unknown:
            raise ValueError(
                f"optimizer state does not fit {type(self.rule).__name__} and these parameters: "
                f"missing {_some(missing)}; unknown {_some(unknown)}"
            )
        for name, shape in expected.items():
            if saved[name].shape != shape:
                raise ValueError(f"optimizer state {name!r} has shape {saved[name].shape}, expected {shape}")
        for name, arrays in self.state.items():
            self.steps[name] = int(saved[f"step.{name}"])
            for kind, array in zip(self.rule.state, arrays, strict=True):
                xp = backend.namespace(array)
                array[...] = xp.asarray(saved[f"{kind}.{name}"], dtype=array.dtype)


def _some(names: set[str]) -> str:
    """The first three of `names`, and how many more there are."""
    if not names:
        return "none"
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
