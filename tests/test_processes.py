"""Several processes train as one: the same batches, gradients, weights and numbers, and they end together."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ranks

from minidet.data import Loader, shapes
from minidet.data.loader import share
from minidet.models import presets
from minidet.training.communicator import Alone

PREPROCESS = presets.small(shapes().classes).preprocess
MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")

MPI = MPIEXEC is not None and importlib.util.find_spec("mpi4py") is not None
mpi = pytest.mark.skipif(not MPI, reason="needs mpiexec and mpi4py: pip install -e '.[mpi]'")


def start(size: int, *command, **kwargs) -> subprocess.Popen:
    """`mpiexec -n size python COMMAND`, one thread a process unless the environment says otherwise."""
    environment = {"NUMBA_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | os.environ | kwargs.pop("env", {})
    return subprocess.Popen(
        [MPIEXEC, "-n", str(size), sys.executable, *map(str, command)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **kwargs,
    )  # fmt: skip


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def found(request, tmp_path_factory):
    """What everything in ranks.py gives: alone, and in a list of what each process has."""
    if not MPI:
        pytest.skip("needs mpiexec and mpi4py: pip install -e '.[mpi]'")
    out = tmp_path_factory.mktemp("ranks")
    process = start(request.param, ranks.__file__, out)
    try:
        one = ranks.everything(Alone())
        _, said = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, said
    return one, [dict(np.load(out / f"{rank}.npz")) for rank in range(request.param)]


def under(prefix: str, arrays: dict) -> dict:
    """Those of one function of ranks.py."""
    return {name: array for name, array in arrays.items() if name.startswith(prefix)}


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 16])
def test_shares_are_even_and_complete(count, size):
    shares = [share(count, rank, size) for rank in range(size)]
    assert [place for mine in shares for place in mine] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_processes_share_every_batch():
    """Three processes see what one sees, in the last batch of two images as well, where the first has none."""
    data = shapes("train", images=5, size=64)

    def batches(**shard):
        return list(Loader(data, PREPROCESS, batch_size=6, images=14, seed=3, **shard))

    whole, parts = batches(), [batches(rank=rank, size=3) for rank in range(3)]
    for n, batch in enumerate(whole):
        shared = [part[n] for part in parts]
        assert [image_id for b in shared for image_id in b.image_ids] == batch.image_ids
        assert np.array_equal(np.concatenate([b.images for b in shared if len(b)]), batch.images)
        assert np.array_equal(np.concatenate([b.sizes for b in shared]), batch.sizes)
        assert np.array_equal(np.concatenate([b.original_sizes for b in shared]), batch.original_sizes)
        assert [(b.first, b.first + len(b), b.whole) for b in shared] == [
            (mine.start, mine.stop, len(batch)) for mine in (share(len(batch), rank, 3) for rank in range(3))
        ]
    assert [len(part[-1]) for part in parts] == [0, 1, 1]


def test_the_gradient_is_that_of_one_process(found):
    """In float64, to 1e-10 of each array's largest value: uneven shares, one without images, one without objects."""
    one, everybody = under("gradients", found[0]), found[1]
    assert len(one) > 100
    for name, array in one.items():
        assert array.dtype == np.float64
        for mine in everybody:
            np.testing.assert_array_equal(mine[name], everybody[0][name], err_msg=name)
            np.testing.assert_allclose(mine[name], array, rtol=0, atol=1e-10 * np.abs(array).max(), err_msg=name)
    assert any(not np.array_equal(everybody[0][name], array) for name, array in one.items())  # summed in another order


def test_fifty_steps_leave_the_same_weights(found):
    """Bitwise in all processes; and the losses of one process, until rounding has grown."""
    one, everybody = under("fifty_steps", found[0]), found[1]
    losses = one["fifty_steps: loss"], everybody[0]["fifty_steps: loss"]
    assert [len(loss) for loss in losses] == [50, 50]
    np.testing.assert_allclose(losses[1][:10], losses[0][:10], rtol=1e-4)
    assert not np.array_equal(*losses)
    for name in one:
        for mine in everybody:
            np.testing.assert_array_equal(mine[name], everybody[0][name], err_msg=name)


def test_running_statistics_are_averaged(found):
    everybody = [under("statistics", mine) for mine in found[1]]
    for name in under("statistics: own", everybody[0]):
        own = [mine[name] for mine in everybody]
        assert not np.array_equal(own[0], own[1]), name
        for mine in everybody:
            np.testing.assert_allclose(mine[name.replace(": own", ": mean")], np.mean(own, axis=0), rtol=1e-6)
    for name in under("statistics: trained", everybody[0]):
        for mine in everybody:
            np.testing.assert_array_equal(mine[name], everybody[0][name], err_msg=name)


def test_evaluation_gives_the_numbers_of_one_process(found):
    """Seven images in batches of two: every batch is somebody's, whole; the first process has the numbers."""
    one, everybody = found
    numbers = one["evaluation: numbers"]
    assert 0 < numbers.max() < 1
    np.testing.assert_array_equal(everybody[0]["evaluation: numbers"], numbers)
    assert not any(under("evaluation", mine) for mine in everybody[1:])


def test_a_bit_that_differs_is_noticed(found):
    one, everybody = found
    assert "difference: said" not in one
    for mine in everybody:
        assert str(mine["difference: said"]).startswith("the processes are no longer one training; they differ")
        assert "12 images seen" in str(mine["difference: said"])
