"""How parameters move: update rules, the optimizer that applies them, clipping, schedules."""

from minidet.optim.adamw import AdamW
from minidet.optim.clip import clip_grad_norm, gradient_norm
from minidet.optim.optimizer import Optimizer, ParameterGroup
from minidet.optim.schedule import Schedule, linear_rule
from minidet.optim.sgd import SGD

__all__ = [
    "SGD", "AdamW", "Optimizer", "ParameterGroup", "Schedule", "clip_grad_norm", "gradient_norm", "linear_rule",
]  # fmt: skip
