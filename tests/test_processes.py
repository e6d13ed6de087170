"""Several processes train as one: the same batches, gradients, weights and numbers, and they end together."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import tiny
from processes import MPI, mpi, start

from minidet import backend
from minidet.autograd import Tensor
from minidet.cli import command
from minidet.data import Loader, shapes
from minidet.data.loader import share
from minidet.launcher import SIZES, share_machine
from minidet.models import presets
from minidet.nn import BatchNorm2d, Module
from minidet.training import read_checkpoint
from minidet.training.communicator import IDENTITY, Alone, find_communicator
from minidet.training.monitor import read_metrics
from minidet.training.together import average_statistics, check_alike, pad_alike, sum_gradients

PREPROCESS = presets.small(shapes().classes).preprocess


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def found(request, tmp_path_factory):
    """What everything in ranks.py gives: alone, and in a list of what each process has."""
    if not MPI:
        pytest.skip("needs mpiexec and mpi4py: pip install -e '.[mpi]'")
    with running(request.param, "everything", tmp_path_factory.mktemp("ranks")) as everybody:
        one = ranks.everything(Alone())
    return one, everybody


@contextmanager
def running(size: int, what: str, out: Path) -> Iterator[list[dict[str, np.ndarray]]]:
    """While so many processes run `ranks.WHAT`; afterwards the list holds what each of them found."""
    process, everybody = start(size, ranks.__file__, out, what), []
    try:
        yield everybody
        _, said = process.communicate(timeout=1800)
    finally:
        process.kill()
    assert process.returncode == 0, said
    everybody += [dict(np.load(out / f"{rank}.npz")) for rank in range(size)]


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


def test_an_explosion_is_explained_by_the_process_that_saw_it(found):
    one, everybody = found
    steps = [str(mine["explosion: said"]).partition(":")[0] for mine in (one, *everybody)]
    assert len(set(steps)) == 1 and steps[0].startswith("step ")
    said = str(everybody[0]["explosion: said"])
    assert "The first value that is not finite: " in said and "nowhere" not in said and "a lower learning rate" in said


@mpi
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_does_not_grow_over_a_thousand_steps(tmp_path):
    with running(2, "memory", tmp_path) as everybody:
        pass
    for rank, mine in enumerate(everybody):
        MiB = mine["bytes"] / 2**20
        print(f"process {rank}: {MiB[2]:.1f} MiB after 200 steps, {MiB[-1]:.1f} MiB after 900")
        assert len(MiB) == 10 and MiB[-1] - MiB[2] < 2


# The same in threads, where there is no MPI.


class Thread:
    """One of several threads that stand for processes."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, table: dict):
        self.rank, self.size, self.barrier, self.table = rank, size, barrier, table

    def exchange(self, value) -> list:
        self.table[self.rank] = value
        self.barrier.wait(timeout=60)
        everybody = [self.table[rank] for rank in range(self.size)]
        self.barrier.wait(timeout=60)
        return everybody

    def all_sum(self, values) -> None:
        values[...] = np.sum(self.exchange(values.copy()), axis=0)

    def all_max(self, values) -> None:
        values[...] = np.max(self.exchange(values.copy()), axis=0)


def in_threads(size: int, function) -> list:
    """What `function(communicator)` returns, or raises, in each."""
    barrier, table = threading.Barrier(size), {}

    def one(rank: int):
        try:
            return function(Thread(rank, size, barrier, table))
        except RuntimeError as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def test_gradients_are_summed_where_anybody_has_one():
    def summed(communicator):
        both, second, nobody = (Tensor(np.zeros((2, 3), np.float32), requires_grad=True) for _ in range(3))
        both.grad = np.full((2, 3), 1.0 + communicator.rank)
        own = both.grad
        if communicator.rank == 1:
            second.grad = np.full((2, 3), 5.0)
        sum_gradients(communicator, [both, nobody, second])
        assert both.grad is own  # written into where it was
        return both.grad, second.grad, nobody.grad

    for both, second, nobody in in_threads(3, summed):
        assert np.array_equal(both, np.full((2, 3), 6.0)) and np.array_equal(second, np.full((2, 3), 5.0))
        assert nobody is None


def test_images_are_padded_to_the_largest_of_all():
    data = ranks.Sizes(8)  # the last four, of 64 x 72 pixels and less, would need less room

    def padded(communicator):
        (batch,) = Loader(data, PREPROCESS, batch_size=8, shuffle=False, rank=communicator.rank, size=2)
        return batch.images, pad_alike(batch, communicator).images

    (whole,) = Loader(data, PREPROCESS, batch_size=8, shuffle=False)
    (kept, first), (small, second) = in_threads(2, padded)
    assert kept is first and small.shape < second.shape
    np.testing.assert_array_equal(np.concatenate([first, second]), whole.images)


def test_only_statistics_that_are_trained_are_averaged():
    def norms(communicator):
        trained, frozen = BatchNorm2d(2), BatchNorm2d(2).freeze()
        for norm in (trained, frozen):
            norm.running_mean[...] = 1 + communicator.rank
        model = Module()
        model.layers = [trained, frozen]
        average_statistics(communicator, model)
        return trained.running_mean.tolist(), trained.running_var.tolist(), frozen.running_mean.tolist()

    assert in_threads(2, norms) == [([1.5, 1.5], [1, 1], [1, 1]), ([1.5, 1.5], [1, 1], [2, 2])]


def test_any_difference_is_noticed_by_all():
    def differing(communicator):
        norm = BatchNorm2d(2)
        check_alike(communicator, norm, "the same")
        if communicator.rank == 2:
            norm.running_var[1] = np.nextafter(np.float32(1), np.float32(2))
        check_alike(communicator, norm, "24 images seen")

    for error in in_threads(3, differing):
        assert re.search("the processes are no longer one training; .* in this: 24 images seen", str(error))
    for error in in_threads(2, lambda c: check_alike(c, BatchNorm2d(2), f"settings {c.rank}")):
        assert "in this: settings" in str(error)


# What processes are told, and what they take.


def test_each_process_takes_its_part_of_the_machine():
    def share(cores, **environment):
        share_machine(environment, cores)
        return environment

    hydra = {"MPI_LOCALNRANKS": "4", "MPI_LOCALRANKID": "2"}
    threads = dict.fromkeys(("NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "4")
    assert share(16) == {}
    assert share(16, MPI_LOCALNRANKS="1") == {"MPI_LOCALNRANKS": "1"}
    assert share(16, **hydra) == hydra | threads | {"CUDA_VISIBLE_DEVICES": "2"}
    assert share(2, **hydra)["NUMBA_NUM_THREADS"] == "1"
    chosen = share(16, **hydra, NUMBA_NUM_THREADS="7", CUDA_VISIBLE_DEVICES="9,8,5,4")
    assert (chosen["NUMBA_NUM_THREADS"], chosen["CUDA_VISIBLE_DEVICES"]) == ("7", "5")
    open_mpi = {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    assert share(4, **open_mpi, CUDA_VISIBLE_DEVICES="0")["CUDA_VISIBLE_DEVICES"] == "0"  # one for both
    assert share(4, **open_mpi)["NUMBA_NUM_THREADS"] == "2"


def test_one_process_never_imports_mpi4py(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # importing it fails
    for environment in ({}, {"PMI_SIZE": "1"}, {"OMPI_COMM_WORLD_SIZE": "1"}):
        assert isinstance(found_in(environment, monkeypatch), Alone)
    with pytest.raises(RuntimeError, match=r"mpi4py cannot be used .*pip install 'minidet\[mpi\]', or run without"):
        found_in({"PMI_SIZE": "2"}, monkeypatch)
    assert command.main(["detect", "run", "picture", "--out", "found"]) == 2


def found_in(environment, monkeypatch):
    """What `find_communicator` finds there."""
    for name in SIZES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    find_communicator.cache_clear()
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back afterwards
    return find_communicator()


@pytest.fixture
def fake_mpi(monkeypatch):
    """mpi4py for one process, which counts what it is asked."""
    world = SimpleNamespace(rank=0, size=2, asked=[])
    world.Allreduce = lambda *arguments: world.asked.append(arguments)
    world.Abort = lambda status: world.asked.append(status)
    MPI = SimpleNamespace(COMM_WORLD=world, IN_PLACE="in place", MAX="max", Get_library_version=lambda: "MPI 0\nx")
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=MPI))
    yield world
    find_communicator.cache_clear()


def test_another_mpi_than_the_launchers_is_noticed(fake_mpi, monkeypatch):
    with pytest.raises(RuntimeError, match=r"mpiexec started 3 processes, but mpi4py sees 2: .*\(MPI 0\)"):
        found_in({"OMPI_COMM_WORLD_SIZE": "3"}, monkeypatch)


class FakeNccl:
    """What minidet asks of `cupy.cuda.nccl`."""

    available, NCCL_FLOAT32, NCCL_FLOAT64, NCCL_INT64, NCCL_SUM = True, 7, 8, 4, 0

    def __init__(self):
        self.asked = []

    def get_unique_id(self):
        return bytes(range(IDENTITY))

    def NcclCommunicator(self, size, identity, rank):  # noqa: N802  CuPy's name
        self.asked.append((size, identity, rank))
        return SimpleNamespace(allReduce=lambda *arguments: self.asked.append(arguments))


def test_arrays_on_a_gpu_are_summed_by_nccl(fake_mpi, monkeypatch):
    """As far as that can be seen without one: who is told whose identity, and what NCCL is asked to sum where."""
    nccl, stream = FakeNccl(), SimpleNamespace(ptr=77)
    monkeypatch.setitem(sys.modules, "cupy.cuda.nccl", nccl)
    monkeypatch.setattr(backend, "library", lambda x: "cupy")
    monkeypatch.setattr(
        backend, "cuda", lambda: SimpleNamespace(cuda=SimpleNamespace(get_current_stream=lambda: stream))
    )
    fake_mpi.Bcast = fake_mpi.asked.append
    communicator = found_in({"PMI_SIZE": "2"}, monkeypatch)
    kinds = {"float32": 7, "float64": 8, "int64": 4}  # gradients, losses, and how many anchors have objects
    for dtype in kinds:
        x = SimpleNamespace(data=SimpleNamespace(ptr=1234), size=5, dtype=np.dtype(dtype))
        communicator.all_sum(x)
    assert fake_mpi.asked == [bytes(range(IDENTITY))]
    sums = [(1234, 1234, 5, kind, 0, 77) for kind in kinds.values()]
    assert nccl.asked == [(2, bytes(range(IDENTITY)), 0), *sums]


def test_without_nccl_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy.cuda.nccl", SimpleNamespace(available=False))  # as CuPy leaves it
    for use in (backend.nccl_identity, lambda: backend.sums_over_gpus(2, 0, bytes(IDENTITY))):
        with pytest.raises(RuntimeError, match="pip install nvidia-nccl-cu13"):
            use()


def test_the_other_processes_learn_the_identity(fake_mpi, monkeypatch):
    nccl = FakeNccl()
    monkeypatch.setitem(sys.modules, "cupy.cuda.nccl", nccl)
    monkeypatch.setattr(backend, "library", lambda x: "cupy")
    monkeypatch.setattr(backend, "sums_over_gpus", lambda *arguments: nccl.asked.append(arguments) or (lambda x: None))

    def receive(identity):
        identity[:] = bytes(range(IDENTITY))

    fake_mpi.rank, fake_mpi.Bcast = 1, receive
    found_in({"PMI_SIZE": "2"}, monkeypatch).all_sum(np.ones(3))
    assert nccl.asked == [(2, 1, bytes(range(IDENTITY)))]


@pytest.mark.gpu
def test_nccl_sums_over_one_gpu():
    try:
        xp, identity = backend.load("cupy"), backend.nccl_identity()
    except (RuntimeError, ImportError) as error:
        pytest.skip(f"no GPU, or no NCCL: {error}")
    assert len(identity) == IDENTITY
    x = xp.arange(5, dtype=xp.float32)
    backend.sums_over_gpus(1, 0, identity)(x)
    np.testing.assert_array_equal(backend.to_numpy(x), np.arange(5))


def test_an_exception_that_nobody_catches_ends_all(fake_mpi, monkeypatch, capsys):
    found_in({"PMI_SIZE": "2"}, monkeypatch)
    error = ValueError("the cause")
    sys.excepthook(ValueError, error, None)
    said = capsys.readouterr().err
    assert "ValueError: the cause" in said and "(process 0 of 2; it ends the others)" in said
    assert fake_mpi.asked == [1]


# The command.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.coco_folder(tmp_path_factory.mktemp("pictures"))


@mpi
def test_an_error_in_one_process_ends_all_with_its_cause(folder, tmp_path):
    """A picture that only the second process opens cannot be read."""
    data = shutil.copytree(folder, tmp_path / "data")
    broken = sorted(data.rglob("*.png"))[0]
    flags = ["--out", tmp_path / "run", "--images", "80", "--batch-size", "8", *tiny.NETWORK]
    broken.write_bytes(b"no picture")
    process = start(2, "-m", "minidet", "train", "--data", data, *flags)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 2
    assert said.count(broken.name) == 1 and said.count("it ends the others") == 1
    assert "Traceback" not in said


@mpi
@pytest.mark.slow
def test_an_error_of_all_processes_is_told_once(folder, tmp_path):
    process = start(2, "-m", "minidet", "train", "--data", folder, "--out", tmp_path, "--resume")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 2
    assert said.count(f"minidet: {tmp_path}/last.safetensors: no such checkpoint") == 1


@mpi
@pytest.mark.slow
def test_an_uncaught_error_in_a_program_of_ones_own(tmp_path):
    """Without care the first process would wait for the second one forever."""
    program = """
import numpy as np
from minidet.training.communicator import find_communicator
communicator = find_communicator()
assert communicator.rank == 0, "the cause"
communicator.all_sum(np.ones(3))
"""
    process = start(2, "-c", program)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "AssertionError: the cause" in said and "(process 1 of 2; it ends the others)" in said


@mpi
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_interrupting_mpiexec_saves_and_goes_on(number, folder, tmp_path):
    """Both processes finish the same step; what was saved goes on to the weights of a training never stopped."""
    flags = ["--images", "400", "--batch-size", "2", "--set", "validations=0", "--set", "samples=0", *tiny.NETWORK]
    train = ["-m", "minidet", "train", "--data", folder, "--out"]
    whole = start(2, *train, tmp_path / "whole", *flags, "--quiet")
    out = tmp_path / "parts"
    process = start(2, *train, out, *flags)
    while len(read_metrics(out / "metrics.csv")) < 2 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.count("stopping after this step") == said.count("of 400 images: saved in") == 1
    assert read_checkpoint(out).training["state"]["position"] < 400
    on = start(2, *train, out, "--resume", "--quiet")
    for one in (on, whole):
        assert one.communicate(timeout=300) and one.returncode == 0
    expected = read_checkpoint(tmp_path / "whole" / "last.safetensors").weights
    for name, array in read_checkpoint(out / "last.safetensors").weights.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@mpi
@pytest.mark.slow
def test_two_processes_leave_one_run(folder, tmp_path):
    """The first process writes and speaks; and evaluation by two has the numbers of one."""
    out, numbers = tmp_path / "run", []
    flags = ["--images", "24", "--batch-size", "4", "--set", "validations=2", *tiny.NETWORK]
    train = start(2, "-m", "minidet", "train", "--data", folder, "--out", out, *flags)
    printed, _ = train.communicate(timeout=1800)
    assert train.returncode == 0
    for line in ("2 processes share every batch; threads in each: 1", "12 images: AP", "24 images: AP", f"in {out}: "):
        assert printed.count(line) == 1
    rows = read_metrics(out / "metrics.csv")
    assert [(row.position, row.AP is None) for row in rows] == [(4 * n, n not in (3, 6)) for n in range(1, 7)]
    for size in (1, 2):
        judged = start(size, "-m", "minidet", "eval", out, "--data", folder, "--out", tmp_path / str(size))
        assert judged.communicate(timeout=1800)[0].count("3 images, ") == 1
        numbers.append(json.loads((tmp_path / str(size) / "metrics.json").read_text()))
        del numbers[-1]["seconds"]
    assert numbers[0] == numbers[1] and numbers[0]["AR100"] > 0
