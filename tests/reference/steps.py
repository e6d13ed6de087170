"""Checks of optimizers, clipping and learning rates."""

from __future__ import annotations

import math

import numpy as np
from compare import close, there

from minidet.autograd import Tensor
from minidet.optim import SGD, AdamW, Optimizer, ParameterGroup, Schedule, clip_grad_norm

TORCH_DECAY = {"SGD": 0.0, "AdamW": 0.01}
"""What torch takes where a case does not say."""


def optimizer(case: dict, a: dict[str, np.ndarray]) -> None:
    """A trajectory under given gradients; a row of NaN is a step in which that parameter has none."""
    if case["optimizer"] == "clip_grad_norm_":
        clipping(case, a)
        return
    args = dict(case["args"])
    lr, decay = args.pop("lr"), args.pop("weight_decay", TORCH_DECAY.get(case["optimizer"]))
    if case["optimizer"] == "SGD":
        rule = SGD(momentum=args.pop("momentum", 0.0), nesterov=args.pop("nesterov", False))
    elif case["optimizer"] == "AdamW":
        beta1, beta2 = args.pop("betas", (0.9, 0.999))
        rule = AdamW(beta1, beta2, args.pop("eps", 1e-8))
    else:
        raise NotImplementedError(f"no check for the optimizer {case['optimizer']!r}")
    assert not args, f"arguments that nothing here has: {args}"
    count = sum(name.startswith("init") for name in a)
    parameters = [Tensor(there(a[f"init{i}"].copy()), requires_grad=True) for i in range(count)]
    group = ParameterGroup({str(i): p for i, p in enumerate(parameters)}, weight_decay=decay)
    optimizer = Optimizer(rule, [group])
    lr_drop = int(case["note"].partition("before step index ")[2].split()[0])
    for t in range(len(a["grads0"])):
        for i, parameter in enumerate(parameters):
            gradient = a[f"grads{i}"][t]
            parameter.grad = None if np.isnan(gradient).any() else there(gradient.copy())
        optimizer.step(lr * 0.1 if t >= lr_drop else lr)
        for i, parameter in enumerate(parameters):
            close(parameter.data, a[f"values{i}"][t], f"parameter {i} after step {t}")


def clipping(case: dict, a: dict[str, np.ndarray]) -> None:
    count = sum(name.startswith("clipped") for name in a)
    parameters = [Tensor(there(a[f"grad{i}"]), requires_grad=True) for i in range(count)]
    for i, parameter in enumerate(parameters):
        parameter.grad = there(a[f"grad{i}"].copy())
    close(clip_grad_norm(parameters, case["max_norm"]), a["total_norm"], "norm")
    for i, parameter in enumerate(parameters):
        close(parameter.grad, a[f"clipped{i}"], f"gradient {i}")


def schedule(case: dict, a: dict[str, np.ndarray]) -> None:
    """A learning rate by step; our schedules count images, here one a step."""
    kind, lr, steps = case["kind"], case["lr"], len(a["lr"])
    if kind.startswith("torch MultiStepLR"):
        ours = Schedule(lr, steps, milestones=tuple(case["milestones"]), factor=case["gamma"])
    elif kind.startswith("torch LinearLR"):
        ours = Schedule(lr, steps, warmup=case["total_iters"], warmup_start=case["start_factor"])
    elif kind.startswith("detectron2 WarmupMultiStepLR") and case["method"] == "linear":
        ours = Schedule(
            lr,
            steps,
            warmup=case["warmup_iters"],
            warmup_start=case["warmup_factor"],
            milestones=tuple(case["steps"]),
            factor=case["gamma"],
        )
    elif kind.startswith("torch CosineAnnealingLR"):
        ours = Schedule(lr, case["T_max"], cosine=True)
    else:
        raise NotImplementedError(f"no check for the schedule {kind!r}")
    got = [ours.lr(t) for t in range(steps)]
    close(got, a["lr"], kind)
    assert not math.isnan(sum(got))
