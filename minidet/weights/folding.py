"""What is linear before or after a convolution goes into its filters: a fixed batch norm, the scale of pixels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from minidet.images import Preprocess
from minidet.nn import FrozenBatchNorm2d, Module

EPS = 1e-5  # of every batch norm that torchvision trains on ImageNet


def adapt_norms(state: Mapping[str, np.ndarray], model: Module) -> dict[str, np.ndarray]:
    """`state` with batch norms folded where `model` has none, and unfolded where it has them frozen.

    Without this the filters alone would fit, and what normalized their outputs would be lost without a word.
    """
    state, needed = dict(state), set(model.state_dict())
    frozen = {name: norm for name, norm in model.named_modules() if isinstance(norm, FrozenBatchNorm2d)}
    for name in [name for name in state if name.endswith(".conv.weight")]:
        path = name.removesuffix(".conv.weight")
        if f"{path}.norm.running_var" in state and f"{path}.conv.bias" in needed:
            _fold(state, path)
        elif f"{path}.conv.bias" in state and f"{path}.norm" in frozen:
            _unfold(state, path, frozen[f"{path}.norm"].eps)
    return state


def adapt_pixels(filters: np.ndarray, theirs: Preprocess, ours: Preprocess) -> np.ndarray:
    """First filters (F, k, k, 3) for pixels prepared in another way: order and scale of channels, not their mean.

    Raises:
        ValueError: if another pixel value becomes zero, which no filter can make up for at the borders.
    """
    order = [slice(None, None, -1 if rule.bgr else 1) for rule in (theirs, ours)]  # to RGB
    gains = [np.divide(r.scale, r.std)[o] for r, o in zip((theirs, ours), order, strict=True)]
    zeros = [np.divide(r.mean, r.scale)[o] for r, o in zip((theirs, ours), order, strict=True)]
    if not np.allclose(*zeros, atol=1e-3):
        raise ValueError(f"pixels that become zero are {zeros[0]} there and {zeros[1]} here")
    if theirs.bgr == ours.bgr and np.array_equal(*gains):
        return filters
    rgb = filters[..., order[0]] * (gains[0] / gains[1])
    return np.ascontiguousarray(rgb[..., order[1]], dtype=filters.dtype)


def _fold(state: dict[str, np.ndarray], path: str) -> None:
    """norm(conv(x)) as a convolution with a bias; in float64, rounded once."""
    weight, bias, mean, variance = (
        state.pop(f"{path}.norm.{leaf}").astype(np.float64)
        for leaf in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight / np.sqrt(variance + EPS)
    filters = state[f"{path}.conv.weight"]
    state[f"{path}.conv.weight"] = (filters * scale[:, None, None, None]).astype(filters.dtype)
    state[f"{path}.conv.bias"] = (bias - mean * scale).astype(filters.dtype)


def _unfold(state: dict[str, np.ndarray], path: str, eps: float) -> None:
    """A convolution with a bias as norm(conv(x)): the norm divides by sqrt(1 + eps), so its weight is that."""
    bias = state.pop(f"{path}.conv.bias")
    state[f"{path}.norm.weight"] = np.full_like(bias, np.sqrt(1 + eps))
    state[f"{path}.norm.bias"] = bias
    state[f"{path}.norm.running_mean"] = np.zeros_like(bias)
    state[f"{path}.norm.running_var"] = np.ones_like(bias)
