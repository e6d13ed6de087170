"""Starting from weights that somebody trained: what fits is loaded, the rest starts anew, and both are said."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minidet.models import ResNet, RetinaNet, presets
from minidet.weights.files import State
from minidet.weights.folding import adapt_norms, adapt_pixels
from minidet.weights.recognition import CLASS_OUTPUT, COUNT, STAND_IN, Found, find_weights
from minidet.weights.tensors import WeightsError

SHOWN = 20


@dataclass(frozen=True)
class Initialization:
    """What a file gave a model.

    Attributes:
        path, layout: the file, and whose names it uses.
        loaded: names of the model's tensors that were filled.
        skipped: tensors of the file that were not used, each with the reason.
        untouched: names of the model's tensors that keep the values they had.
        copied: classes whose rows of the class output were filled, where the other rows start anew.
    """

    path: Path
    layout: str
    loaded: tuple[str, ...]
    skipped: dict[str, str]
    untouched: tuple[str, ...]
    copied: tuple[str, ...] = ()

    def table(self) -> str:
        """A line for each part of the model, and for each tensor that was not used."""
        parts = dict.fromkeys(name.partition(".")[0] for name in (*self.loaded, *self.untouched))
        lines = [f"{self.path.name} ({self.layout}): {len(self.loaded)} tensors loaded"]
        for part in parts:
            loaded, rest = (sum(n.partition(".")[0] == part for n in names) for names in (self.loaded, self.untouched))
            lines.append(f"  {part:<10} {loaded:>4} of {loaded + rest:>4} loaded" + ("" if loaded else ", starts anew"))
        if any(name.startswith(CLASS_OUTPUT) for name in self.untouched):
            rest = f", but for {', '.join(self.copied)}" if self.copied else ""
            lines.append(f"  every class starts at its prior probability{rest}")
        lines += [f"  skipped {name}: {reason}" for name, reason in list(self.skipped.items())[:SHOWN]]
        if len(self.skipped) > SHOWN:
            lines.append(f"  ... and {len(self.skipped) - SHOWN} more skipped")
        return "\n".join(lines)


def load_initial(model: RetinaNet, source: str | Path | Found, *, copy_classes: bool = False) -> Initialization:
    """Fill `model` with whatever of the file fits it by name and shape; the rest keeps its values.

    Takes every file that `find_weights` recognises.  Batch norms are folded into the convolutions or out of
    them as the model needs it, first filters turned to its order and scale of channels.  The class output is
    taken over only if the classes are the same.  Otherwise each class starts at the model's prior probability,
    or, with `copy_classes`, from the class of that name.

    Source: the prior, pi, is of RetinaNet, arXiv:1708.02002, section 4.1 "Initialization".
    Raises:
        WeightsError: if the file cannot be read, holds numbers that are not finite, has names of no known
            system, expects other pixels or another place of the stride, or if nothing in it fits.
        ValueError: if classes are to be copied from a network with other channels or anchors.
    """
    found = source if isinstance(source, Found) else find_weights(source)
    path, layout = found.path, found.layout.name
    state = adapt_norms(_in_our_conventions(found, model), model)
    shapes = {name: array.shape for name, array in model.state_dict().items()}
    fitting, skipped = {}, {}
    for name, array in state.items():
        if name.endswith(COUNT):
            continue
        if name not in shapes:
            skipped[name] = "the model has no such tensor"
        elif array.dtype.kind != "f":
            skipped[name] = f"has type {array.dtype}, weights are floating-point numbers"
        elif not np.isfinite(array).all():
            raise WeightsError(f"{path}: {name} holds numbers that are not finite; the file is of a failed training")
        elif name.startswith(CLASS_OUTPUT) and found.classes not in (None, model.config.classes):
            skipped[name] = f"its {len(found.classes)} classes are others than the model's {len(model.config.classes)}"
        elif array.shape != shapes[name]:
            skipped[name] = f"has shape {array.shape}, the model needs {shapes[name]}"
        else:
            fitting[name] = array
    if not fitting:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise WeightsError(
            f"{path}: {layout}, but none of its {len(state)} tensors fits this model; "
            f"choose the preset it was made for\n{reasons}"
        )
    untouched = tuple(name for name in shapes if name not in fitting)
    loaded, copied = tuple(fitting), ()
    if any(name.startswith(CLASS_OUTPUT) for name in skipped):
        output, copied = _class_output(model, state, (copy_classes and found.classes) or ())
        fitting |= output
    model.load_state_dict(fitting, strict=False)
    return Initialization(path, layout, loaded, skipped, untouched, copied)


def _in_our_conventions(found: Found, model: RetinaNet) -> State:
    """The arrays, for what no shape tells apart and would be wrong without a word: the stride, and the pixels."""
    layout, config = found.layout, model.config
    if not found.foreign:
        return found.state
    in_1x1 = layout.stride_in_1x1 and config.backbone.groups == 1
    bottlenecks = isinstance(model.backbone, ResNet) and config.backbone.bottleneck
    if bottlenecks and config.backbone.stride_in_1x1 != in_1x1:
        theirs, ours = ("1x1", "3x3") if in_1x1 else ("3x3", "1x1")
        raise WeightsError(
            f"{found.path}: {layout.name}, whose bottlenecks have their stride in the {theirs} convolution, this "
            f"preset in the {ours}: set backbone.stride_in_1x1 to {str(in_1x1).lower()}"
        )
    first, state = "backbone.stem.conv.weight", dict(found.state)
    if first in state:
        theirs = presets.with_backbone(layout.preset(STAND_IN), config.backbone).preprocess
        try:
            state[first] = adapt_pixels(state[first], theirs, config.preprocess)
        except ValueError as error:
            raise WeightsError(
                f"{found.path}: {layout.name} expects other pixels: {error}; set model.preprocess as it was there"
            ) from error
    return state


def _class_output(model: RetinaNet, state: State, theirs: Sequence[str]) -> tuple[State, tuple[str, ...]]:
    """The last layer of the class subnet: prior probability everywhere, and what `state` has for equal names."""
    weight, bias = (model.state_dict()[f"{CLASS_OUTPUT}{leaf}"] for leaf in ("weight", "bias"))
    prior, ours = model.config.head.prior, model.config.classes
    bias[...] = -math.log((1 - prior) / prior)
    same = [name for name in ours if name in theirs]
    for new, leaf in ((weight, "weight"), (bias, "bias")):
        if same:  # filter a * K + k is class k at anchor a of the cell
            old = state[f"{CLASS_OUTPUT}{leaf}"]
            old = old.reshape(-1, len(theirs), *old.shape[1:])[:, [theirs.index(name) for name in same]]
            new.reshape(-1, len(ours), *new.shape[1:])[:, [ours.index(name) for name in same]] = old
    return {f"{CLASS_OUTPUT}weight": weight, f"{CLASS_OUTPUT}bias": bias}, tuple(same)
