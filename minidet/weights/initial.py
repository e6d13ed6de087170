"""Starting from weights that somebody trained: read a file, recognise whose names it uses, load what fits."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from minidet.models import RetinaNet
from minidet.weights.detectron2 import from_detectron2
from minidet.weights.folding import adapt_norms
from minidet.weights.torchvision import from_torchvision

State = Mapping[str, np.ndarray]

CHECKPOINT_PREFIX = "weights."  # what the arrays of a model are called in a checkpoint of a training
SHOWN = 20


class WeightsError(ValueError):
    """A file whose weights cannot be used; the message names it and says why."""


@dataclass(frozen=True)
class Layout:
    """Whose state dict it is."""

    name: str
    markers: tuple[str, ...]
    """Names that begin so are found in this system's files, and in none of the ones listed later."""
    bgr: bool
    """The channel order its first filters expect."""
    translate: Callable[[State], dict[str, np.ndarray]]


LAYOUTS = (
    Layout("detectron2 RetinaNet", ("backbone.bottom_up.", "backbone.fpn_", "head.cls_subnet."), True, from_detectron2),
    Layout("torchvision RetinaNet", ("backbone.body.", "backbone.fpn."), False, from_torchvision),
    Layout("torchvision ResNet", ("conv1.weight", "layer1."), False, from_torchvision),
)


@dataclass(frozen=True)
class Initialization:
    """What a file gave a model.

    Attributes:
        path, layout: the file, and whose names it uses.
        loaded: names of the model's tensors that were filled.
        skipped: tensors of the file that were not used, each with the reason.
        untouched: names of the model's tensors that keep the values they had.
    """

    path: Path
    layout: str
    loaded: tuple[str, ...]
    skipped: dict[str, str]
    untouched: tuple[str, ...]

    def table(self) -> str:
        """A line for each part of the model, and for each tensor that was not used."""
        parts = dict.fromkeys(name.partition(".")[0] for name in (*self.loaded, *self.untouched))
        lines = [f"{self.path.name} ({self.layout}): {len(self.loaded)} tensors loaded"]
        for part in parts:
            loaded, rest = (sum(n.partition(".")[0] == part for n in names) for names in (self.loaded, self.untouched))
            lines.append(f"  {part:<10} {loaded:>4} of {loaded + rest:>4} loaded" + ("" if loaded else ", starts anew"))
        lines += [f"  skipped {name}: {reason}" for name, reason in list(self.skipped.items())[:SHOWN]]
        if len(self.skipped) > SHOWN:
            lines.append(f"  ... and {len(self.skipped) - SHOWN} more skipped")
        return "\n".join(lines)


def load_initial(model: RetinaNet, path: str | Path) -> Initialization:
    """Fill `model` with whatever of the file fits it by name and shape; the rest keeps its values.

    Takes .npz and .safetensors with a torchvision ResNet or RetinaNet, a detectron2 RetinaNet, or a model or
    checkpoint of ours.  Batch norms are folded into the convolutions or out of them as the model needs it.

    Raises:
        WeightsError: if the file cannot be read, holds pickles or numbers that are not finite, has names of
            no known system, expects the other channel order, or if nothing in it fits.
    """
    path = Path(path)
    state = read_arrays(path)
    layout, state = _recognised(state, model, path)
    state = adapt_norms(state, model)
    shapes = {name: array.shape for name, array in model.state_dict().items()}
    fitting, skipped = {}, {}
    for name, array in state.items():
        if name not in shapes:
            skipped[name] = "the model has no such tensor"
        elif array.shape != shapes[name]:
            skipped[name] = f"has shape {array.shape}, the model needs {shapes[name]}"
        elif array.dtype.kind != "f":
            skipped[name] = f"has type {array.dtype}, weights are floating-point numbers"
        elif not np.isfinite(array).all():
            raise WeightsError(f"{path}: {name} holds numbers that are not finite; the file is of a failed training")
        else:
            fitting[name] = array
    if not fitting:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise WeightsError(
            f"{path}: {layout}, but none of its {len(state)} tensors fits this model; "
            f"choose the preset it was made for\n{reasons}"
        )
    model.load_state_dict(fitting, strict=False)
    untouched = tuple(name for name in shapes if name not in fitting)
    return Initialization(path, layout, tuple(fitting), skipped, untouched)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz or .safetensors file by name; nothing in it is ever executed."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    if path.suffix == ".npz":
        if not zipfile.is_zipfile(path):
            raise WeightsError(f"{path}: not an .npz archive, or a truncated one")
        try:
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            if "pickle" in str(error):
                raise WeightsError(
                    f"{path}: holds pickled objects, which can run any program; save plain arrays with numpy.savez"
                ) from error
            raise WeightsError(f"{path}: damaged: {error}") from error
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="np") as file:
                return file.get_tensors()
        except (SafetensorError, TypeError) as error:  # TypeError: a type that NumPy lacks, as bfloat16
            raise WeightsError(f"{path}: cannot be read: {error}") from error
    raise WeightsError(f"{path}: weights are read from .npz or .safetensors, not from {path.suffix or 'such a file'}")


def _recognised(state: State, model: RetinaNet, path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """Whose names these are, and the arrays under ours."""
    for layout in LAYOUTS:
        if any(name.startswith(layout.markers) for name in state):
            if layout.bgr != model.config.preprocess.bgr:
                theirs, ours = ("BGR", "RGB") if layout.bgr else ("RGB", "BGR")
                raise WeightsError(
                    f"{path}: {layout.name}, whose first filters expect {theirs}, but this preset feeds {ours}"
                )
            return layout.name, layout.translate(state)
    if any(name.startswith(CHECKPOINT_PREFIX) for name in state):
        prefixed = {name: array for name, array in state.items() if name.startswith(CHECKPOINT_PREFIX)}
        return "minidet checkpoint", {name.removeprefix(CHECKPOINT_PREFIX): a for name, a in prefixed.items()}
    if state.keys() & model.state_dict().keys():
        return "minidet", dict(state)
    known = ", ".join(layout.name for layout in LAYOUTS)
    first = ", ".join(list(state)[:3]) or "none"
    raise WeightsError(f"{path}: names of no known system (first: {first}); known are {known} and minidet's own")
