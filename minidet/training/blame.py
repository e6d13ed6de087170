"""When the loss is no number any more: which layer was the first to say so."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from minidet import backend
from minidet.autograd import observe
from minidet.backend import Array
from minidet.nn import Module


class NonFiniteError(RuntimeError):
    """Training stopped because a loss or a gradient was infinite or not a number."""


def first_non_finite(model: Module, batch_images: Array, run: Callable[[], object]) -> str:
    """Where the first infinity or NaN appears when `run()` repeats the step, as a phrase.

    Looks at the input, the parameters, then at every op's output and every gradient, in the order in which
    they are computed.  Slow, since it looks at all of them; the training has stopped anyway.
    """
    if not _finite(backend.namespace(batch_images), batch_images):
        return "the input images"
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if not _finite(parameter.xp, parameter.data):
            return f"the parameter {name}"
    layer, found = "the input", ""

    def watch(phase, node, array):
        nonlocal layer, found
        owned = [names[id(x)].rpartition(".")[0] for x in node.inputs if id(x) in names]
        layer = f"layer {owned[0]}" if owned else layer
        if not found and not _finite(node.inputs[0].xp, array):
            what = "output" if phase == "forward" else "gradient"
            found = f"the {what} of {node.op} {'in' if owned else 'after'} {layer}"

    before = model.state_dict()
    with observe(watch), np.errstate(all="ignore"):
        run()
    model.load_state_dict(before)  # batch norms saw the batch twice
    return found or "nowhere when the step was repeated: only the norm of all gradients overflowed"


def _finite(xp, array) -> bool:
    return bool(xp.all(xp.isfinite(array)))
