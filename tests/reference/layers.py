"""Checks of ops and elementwise losses against vectors in NCHW."""

from __future__ import annotations

import numpy as np
from compare import close, here, there

from minidet import backend, ops
from minidet.autograd import Tensor
from minidet.models import ResNetConfig
from minidet.models.resnet import Bottleneck
from minidet.nn import BatchNorm2d, FrozenBatchNorm2d, Norm
from minidet.weights import from_torchvision, to_torchvision

BLOCK = "backbone.stages.0.blocks.0."


def nhwc(array: np.ndarray) -> np.ndarray:
    """Channels last, as all our maps and filters have them."""
    return np.ascontiguousarray(np.moveaxis(array, 1, -1)) if array.ndim == 4 else array


def nchw(array: np.ndarray) -> np.ndarray:
    """Channels second, as all reference maps and filters have them."""
    array = here(array)
    return np.moveaxis(array, -1, 1) if array.ndim == 4 else array


def layer(case: dict, a: dict[str, np.ndarray]) -> None:
    """One op of `unit_nnops`: its output, and the gradient of <up, out> by everything that has one."""
    inputs = {n: Tensor(there(nhwc(a[n])), requires_grad=True) for n in ("x", "weight", "bias") if n in a}
    op = case["op"]
    if op == "bottleneck_eval":
        bottleneck(case, a)
        return
    if op not in FORWARD:
        raise NotImplementedError(f"no check for the op {op!r}")
    out = FORWARD[op](case, a, **inputs)
    close(nchw(out.data), a["out"], f"{op}: out")
    out.backward(there(nhwc(a["up"])))
    for name, tensor in inputs.items():
        if f"grad_{name}" in a:
            close(nchw(tensor.grad), a[f"grad_{name}"], f"{op}: grad_{name}")


def _conv2d(case, a, x, weight, bias=None):
    sizes = {
        key: case[key] if isinstance(case[key], int) else tuple(case[key])
        for key in ("stride", "padding", "dilation", "groups")
    }
    return ops.conv2d(x, weight, bias, **sizes)


def _batch_norm(case, a, x, weight, bias):
    norm = BatchNorm2d(x.shape[-1], eps=case["eps"], momentum=case["momentum"]).train(case["training"])
    norm.weight, norm.bias = weight, bias
    norm.running_mean, norm.running_var = there(a["running_mean"]), there(a["running_var"])
    y = norm(x)
    if case["training"]:
        close(norm.running_mean, a["new_running_mean"], "running mean")
        close(norm.running_var, a["new_running_var"], "running variance")
    return y


def _frozen_batch_norm(case, a, x, weight, bias):
    norm = FrozenBatchNorm2d(x.shape[-1], eps=case["eps"])
    norm.weight, norm.bias = weight.data, bias.data
    norm.running_mean, norm.running_var = there(a["running_mean"]), there(a["running_var"])
    return norm(x)


def _cross_entropy(case, a, x):
    chosen = there(np.eye(x.shape[1])[a["target"]])
    return -ops.sum(ops.log(ops.softmax(x)) * chosen) / x.shape[0]


FORWARD = {
    "conv2d": _conv2d,
    "max_pool2d": lambda case, a, x: ops.max_pool2d(
        x, case["k"], stride=case["stride"], padding=case["padding"]
    ),
    "batch_norm": _batch_norm,
    "frozen_batch_norm": _frozen_batch_norm,
    "group_norm": lambda case, a, x, weight, bias: ops.group_norm(
        x, weight, bias, groups=case["groups"], eps=case["eps"]
    ),
    "interpolate_nearest": lambda case, a, x: ops.upsample_nearest(x, tuple(case["size"])),
    "relu": lambda case, a, x: ops.relu(x),
    "sigmoid": lambda case, a, x: ops.sigmoid(x),
    "bce_with_logits": lambda case, a, x: ops.bce_with_logits(x, there(a["target"])),
    "linear": lambda case, a, x, weight, bias: x @ ops.permute(weight, (1, 0)) + bias,
    "cross_entropy": _cross_entropy,
    "global_avg_pool": lambda case, a, x: ops.mean(x, axis=(1, 2), keepdims=True),
}


def bottleneck(case: dict, a: dict[str, np.ndarray]) -> None:
    """A residual block with batch norm at its running statistics, under torchvision's names."""
    given = {name.removeprefix("param:"): array for name, array in a.items() if name.startswith("param:")}
    given = from_torchvision({f"layer1.0.{name}": array for name, array in given.items()})
    config = ResNetConfig(norm=Norm("batch"))
    width, channels = a["param:conv1.weight"].shape[:2]
    block = Bottleneck(channels, width, case["stride"], config, np.random.default_rng(0)).eval().to(backend.default())
    in_float64(block)
    block.load_state_dict({name.removeprefix(BLOCK): array for name, array in given.items()})
    x = Tensor(there(nhwc(a["x"])), requires_grad=True)
    y = block(x)
    close(nchw(y.data), a["out"], "bottleneck: out")
    y.backward(there(nhwc(a["up"])))
    close(nchw(x.grad), a["grad_x"], "bottleneck: grad_x")
    gradients = to_torchvision({BLOCK + name: here(p.grad) for name, p in block.named_parameters()})
    for name, gradient in gradients.items():
        name = name.removeprefix("backbone.body.layer1.0.")
        close(gradient, a[f"grad:{name}"], f"bottleneck: grad:{name}")


def in_float64(module) -> None:
    """Parameters and buffers in double precision, so that gradients and statistics are not rounded either."""
    xp = module.xp
    for parameter in module.parameters():
        parameter.data = xp.astype(parameter.data, xp.float64)
    places = {id(array) for _, array in module.named_buffers()}
    for owner in (m for _, m in module.named_modules()):
        for name, value in vars(owner).items():
            if id(value) in places:
                setattr(owner, name, xp.astype(value, xp.float64))


def focal(case: dict, a: dict[str, np.ndarray]) -> None:
    """Focal loss, its sum and its mean; alpha -1 means none."""
    alpha = None if case["alpha"] is None or case["alpha"] < 0 else case["alpha"]
    for up in ("sum", "up"):
        if f"grad_{up}" not in a:
            continue
        logits = Tensor(there(a["logits"]), requires_grad=True)
        loss = ops.sigmoid_focal_loss(logits, there(a["targets"]), alpha=alpha, gamma=case["gamma"])
        close(loss.data, a["loss"], "loss")
        close(ops.sum(loss).data, a["sum"], "sum")
        close(ops.mean(loss).data, a["mean"], "mean")
        loss.backward(there(np.ones_like(a["logits"]) if up == "sum" else a["up"]))
        close(logits.grad, a[f"grad_{up}"], f"grad_{up}")


def l1_losses(case: dict, a: dict[str, np.ndarray]) -> None:
    """Absolute error, and smooth L1 with any beta."""
    x, target = Tensor(there(a["input"]), requires_grad=True), there(a["target"])
    if case["kind"] == "l1":
        loss = ops.l1(x, target)
    elif case["kind"] == "smooth_l1":
        loss = ops.smooth_l1(x, target, beta=case["beta"])
    else:
        raise NotImplementedError(f"no check for the loss {case['kind']!r}")
    close(loss.data, a["loss"], "loss")
    total = ops.sum(loss)
    close(total.data, a["sum"], "sum")
    total.backward()
    close(x.grad, a["grad"], "grad")
