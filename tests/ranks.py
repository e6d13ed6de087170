"""What tests/test_processes.py lets one process do, and several, which mpiexec starts and which write RANK.npz."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import tiny

from minidet.data import Loader, Sample, shapes
from minidet.training import SHAPES, NonFiniteError, train
from minidet.training.communicator import Communicator, find_communicator
from minidet.training.step import batch_gradient
from minidet.training.together import average_statistics, check_alike, evaluate_together, pad_alike, sum_gradients

MOVING = 20.0
CASES = {
    f"{norm}, {normaliser}, {images} images in {parts} parts": (norm, normaliser, images, parts)
    for norm, normaliser, images, parts in (
        ("group", "batch", 8, 1),
        ("frozen", "image", 7, 1),  # three and four
        ("group", "moving", 7, 2),
        ("group", "image", 1, 1),  # none and one
        ("frozen", "batch", 2, 1),  # the second process has no object
        ("group", "moving", 2, 2),
    )
}


class Sizes:
    """The built-in images, cut to eight sizes; the second of every batch of two has no object left."""

    def __init__(self, images: int) -> None:
        self.inner, self.images = shapes("train", images=8, size=96), images
        self.classes, self.category_ids = self.inner.classes, self.inner.category_ids

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> Sample:
        sample = self.inner[index]
        height, width = 96 - 8 * index, 64 + 8 * (index % 3)
        kept = np.all(sample.boxes[:, 2:] <= (width, height), axis=1)
        if index == 1 and self.images == 2:
            kept[:] = False
        return replace(
            sample, image=sample.image[:height, :width], boxes=sample.boxes[kept], labels=sample.labels[kept]
        )


def gradient(case: tuple, communicator: Communicator) -> dict[str, np.ndarray]:
    """The gradient of one batch in float64, and what was measured on the way."""
    norm, normaliser, images, parts = case
    model = tiny.model(norm, normaliser)
    for parameter in model.parameters():
        parameter.data = parameter.data.astype(np.float64)
    (batch,) = Loader(
        Sizes(images), model.config.preprocess, batch_size=images, shuffle=False,
        rank=communicator.rank, size=communicator.size,
    )  # fmt: skip
    batch = pad_alike(replace(batch, images=batch.images.astype(np.float64)), communicator)
    measured = batch_gradient(model, batch, parts, MOVING, communicator)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sum_gradients(communicator, trained.values())
    numbers = [measured.classification, measured.box, measured.positives, measured.moving, measured.dropped]
    return {"measured": np.array(numbers)} | {name: p.grad for name, p in trained.items()}


def gradients(communicator: Communicator) -> dict[str, np.ndarray]:
    """Of every case."""
    return {
        f"{title}: {name}": array
        for title, case in CASES.items()
        for name, array in gradient(case, communicator).items()
    }


def fifty_steps(communicator: Communicator) -> dict[str, np.ndarray]:
    """The weights after 50 steps of three images, of which the last has one."""
    model, data = tiny.model(), shapes("train", images=20, size=64)
    config = replace(SHAPES, images=148, batch_size=3, validations=0, checkpoints=5, samples=0)
    done = train(model, data, config=config, quiet=True, communicator=communicator)
    return model.state_dict() | {"loss": np.array(done.history["loss"])}


def statistics(communicator: Communicator) -> dict[str, np.ndarray]:
    """Of batch norms after one step, before and after they are averaged; and those of a training."""
    model, data = tiny.model("batch"), shapes("train", images=20, size=64)
    (batch,) = Loader(
        data, model.config.preprocess, batch_size=6, images=6, rank=communicator.rank, size=communicator.size
    )
    batch_gradient(model, batch, 1, MOVING, communicator)
    found = {f"own {name}": array.copy() for name, array in model.named_buffers()}
    average_statistics(communicator, model)
    found |= {f"mean {name}": array for name, array in model.named_buffers()}
    config = replace(SHAPES, images=9, batch_size=2, validations=0)
    train(model, data, config=config, quiet=True, communicator=communicator)
    return found | {f"trained {name}": array for name, array in model.state_dict().items()}


def evaluation(communicator: Communicator) -> dict[str, np.ndarray]:
    """The numbers of an evaluation of seven images in batches of two."""
    data, model = shapes("val", images=7, size=64), tiny.model()
    anything = replace(model.config.postprocess, score_threshold=0.0)  # it has learned nothing
    model.config = replace(model.config, postprocess=anything)
    found = evaluate_together(communicator, model, data, batch_size=2)
    return {} if found is None else {"numbers": np.array(list(found.numbers.values()))}


def difference(communicator: Communicator) -> dict[str, np.ndarray]:
    """What is said if one weight of one process is off by one bit."""
    model = tiny.model()
    check_alike(communicator, model, "the same")
    weight = model.parameters()[0]
    if communicator.rank == 1:
        weight.data.reshape(-1).view(np.int32)[3] ^= 1
    try:
        check_alike(communicator, model, "12 images seen")
    except RuntimeError as error:
        return {"said": np.array(str(error))}
    return {}


def explosion(communicator: Communicator) -> dict[str, np.ndarray]:
    """What is said of a loss that is no number any more."""
    config = replace(SHAPES, images=60, batch_size=3, lr=1e25, clip=1e9, validations=0)
    try:
        train(tiny.model(), shapes("train", images=20, size=64), config=config, quiet=True, communicator=communicator)
    except NonFiniteError as error:
        return {"said": np.array(str(error))}
    return {}


def everything(communicator: Communicator) -> dict[str, np.ndarray]:
    """All of the above, "NAME OF THE FUNCTION: NAME" each."""
    return {
        f"{function.__name__}: {name}": array
        for function in (gradients, fifty_steps, statistics, evaluation, difference, explosion)
        for name, array in function(communicator).items()
    }


def memory(communicator: Communicator) -> dict[str, np.ndarray]:
    """Resident bytes after every hundredth of 1,000 steps."""
    data, resident = shapes("train", images=20, size=64), []

    class Watched(Sizes):
        def __getitem__(self, index: int) -> Sample:
            if self.taken % 100 == 0:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                resident.append(pages * os.sysconf("SC_PAGE_SIZE"))
            self.taken += 1
            return data[index]

    watched = Watched(20)
    watched.taken = 0
    config = replace(SHAPES, images=2_000, batch_size=2, validations=0, checkpoints=5)
    train(tiny.model(), watched, config=config, quiet=True, communicator=communicator)
    return {"bytes": np.array(resident)}


if __name__ == "__main__":
    communicator = find_communicator()
    found = globals()[sys.argv[2]](communicator)
    np.savez(Path(sys.argv[1]) / f"{communicator.rank}.npz", **found)
