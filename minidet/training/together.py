"""What makes one training of many processes: images padded alike, one gradient, one check that all agree."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from time import perf_counter

import numpy as np

from minidet import backend
from minidet.autograd import Tensor
from minidet.data.loader import Batch
from minidet.data.sample import Dataset
from minidet.data.upload import Parts, padded
from minidet.evaluation import Evaluation
from minidet.evaluation.evaluate import detections_of, judge
from minidet.evaluation.inputs import Results
from minidet.models import RetinaNet
from minidet.nn import BatchNorm2d, Module
from minidet.training.communicator import Communicator


def pad_alike(batch: Batch, communicator: Communicator) -> Batch:
    """The batch, padded to the height and width of the largest one of all processes."""
    size = np.array(batch.images.shape[1:3])
    communicator.all_max(size)
    if isinstance(batch.images, Parts):
        batch.images.pad(*size.tolist())
        return batch
    return replace(batch, images=padded(batch.images, *size.tolist()))


def sum_gradients(communicator: Communicator, parameters: Iterable[Tensor]) -> None:
    """Give every process the sum of all gradients: one flat buffer, one sum.

    A process without images has no gradients and takes the others'; where nobody has one, there is none.
    """
    if communicator.size == 1:
        return
    parameters = list(parameters)
    somewhere = np.array([p.grad is not None for p in parameters], np.int64)
    communicator.all_max(somewhere)
    parameters = [p for p, found in zip(parameters, somewhere, strict=True) if found]
    xp, dtype = parameters[0].xp, parameters[0].dtype
    flat = xp.concat([
        xp.zeros(p.data.size, dtype=dtype) if p.grad is None else xp.astype(xp.reshape(p.grad, (-1,)), dtype)
        for p in parameters
    ])  # fmt: skip
    communicator.all_sum(flat)
    start = 0
    for p in parameters:
        total = xp.reshape(flat[start : start + p.data.size], p.shape)
        start += p.data.size
        if p.grad is None:
            p.grad = total
        else:
            p.grad[...] = total


def average_statistics(communicator: Communicator, model: Module) -> None:
    """Give every process the mean of all running statistics of batch norms that are trained.

    A batch norm normalises each process's images by themselves, as it does each part of an accumulated batch;
    so only with other norms are many processes the same training as one.
    """
    if communicator.size == 1:
        return
    norms = [m for _, m in model.named_modules() if isinstance(m, BatchNorm2d) and not m.frozen]
    if not norms:
        return
    places = [(norm, name) for norm in norms for name in ("running_mean", "running_var")]
    xp = model.xp
    flat = xp.concat([getattr(norm, name) for norm, name in places])
    communicator.all_sum(flat)
    start = 0
    for norm, name in places:
        channels = len(getattr(norm, name))
        setattr(norm, name, flat[start : start + channels] / communicator.size)
        start += channels


def check_alike(communicator: Communicator, model: Module, what: str) -> None:
    """Compare every parameter and buffer, bit by bit, and `what` else must be the same, in all processes.

    Raises:
        RuntimeError: in every process, if one differs.
    """
    if communicator.size == 1:
        return
    digest = hashlib.blake2b(what.encode(), digest_size=7)
    arrays = [p.data for p in model.parameters()] + [array for _, array in model.named_buffers()]
    for array in arrays:
        digest.update(np.ascontiguousarray(backend.to_numpy(array)))
    number = int.from_bytes(digest.digest())
    extremes = np.array([number, -number])
    communicator.all_max(extremes)
    if extremes[0] != -extremes[1]:
        raise RuntimeError(
            f"the processes are no longer one training; they differ in their weights or in this: {what[:200]}.  "
            "They need the same command, files, versions of all packages, and kind of CPU or GPU"
        )


def evaluate_together(
    communicator: Communicator,
    model: RetinaNet,
    dataset: Dataset,
    *,
    batch_size: int = 16,
    progress: bool = False,
    check: bool = False,
) -> Evaluation | None:
    """`evaluate`, each process detecting in its share of the images; the numbers are process 0's, else None."""
    began = perf_counter()
    rank, size = communicator.rank, communicator.size
    found = detections_of(model, dataset, batch_size=batch_size, progress=progress and rank == 0, rank=rank, size=size)
    shares = communicator.gather(vars(found))
    if shares is None:
        return None
    results = Results.joined([tuple(share.values()) for share in shares])
    return judge(model, dataset, results, batch_size=batch_size, began=began, check=check)
