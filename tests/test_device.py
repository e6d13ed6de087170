"""Training and detection on a fake GPU: NumPy's numbers, and hardly ever a wait for the device."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import fake_cupy as fake
import numpy as np
import pytest
import tiny
from fake_launches import KERNEL
from fake_streams import ORDERS

import minidet as md
from minidet import backend
from minidet.data import shapes
from minidet.detect import detect_batch
from minidet.detection import MiningConfig
from minidet.kernels.cuda import NUMBERS, OPTIONS
from minidet.kernels.precision import bfloat16
from minidet.ops import convolution, upsample_nearest
from minidet.optim import SGD
from minidet.training import NonFiniteError, TrainConfig
from minidet.training.interrupt import Stopped
from minidet.training.monitor import Monitor

ADDED = ("-ftz=true", "--device-as-default-execution-space")
"""What CuPy adds to the compiler's options; the first means something to nvcc too."""
SOURCES = sorted(path for path in Path(backend.__file__).parent.rglob("*.cu") if "convolution" not in path.parts)
IMAGES = shapes("train", images=8, size=64)
QUICK = TrainConfig(images=16, batch_size=4, workers=0, validations=0, checkpoints=2, warmup=0, milestones=(), ema=None)


@pytest.fixture
def gpu(fake_cupy, monkeypatch):
    """MINIDET_BACKEND=cupy, on the fake."""
    monkeypatch.setenv("MINIDET_BACKEND", "cupy")
    return fake_cupy


# --- what a step and a detection cost ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "normaliser", "accumulate"), [("group", "batch", 1), ("frozen", "moving", 1), ("batch", "image", 2)]
)
def test_a_training_step_waits_once(norm, normaliser, accumulate, gpu):
    config = replace(QUICK, images=8, accumulate=accumulate, clip=1.0)
    md.train(tiny.model(norm, normaliser), IMAGES, config=config, quiet=True)  # anchors are there from now on
    gpu.counts.clear()
    trained = md.train(tiny.model(norm, normaliser), IMAGES, config=config, quiet=True)
    steps = len(trained.history["loss"])
    assert all("training/step.py" in place for place in gpu.counts.waits) and len(gpu.counts.waits) == steps
    sent = [place for place in gpu.counts.uploads if "nn/module" not in place]  # where the model moves to the device
    assert len(sent) == 1 + 3 * accumulate * steps, sent  # what bytes are normalised to; sizes, boxes, classes
    assert [what for _, what, _ in ORDERS].count("copy") == accumulate * steps  # images


def test_mining_waits_once_more(gpu):
    model = tiny.model()
    model.config = replace(model.config, loss=replace(model.config.loss, mining=MiningConfig(batch=8)))
    gpu.counts.clear()
    trained = md.train(model, IMAGES, config=QUICK, quiet=True)
    assert np.isfinite(trained.history["loss"]).all()
    mining = [place for place in gpu.counts.waits if "detection/mining" in place]
    steps = [place for place in gpu.counts.waits if "training/step" in place]
    assert len(mining) == len(steps) == len(trained.history["loss"]), gpu.counts.waits


def test_a_scale_is_compared_without_waiting(fake_cupy):
    xp = backend.load("cupy")
    filters, scale = xp.ones((4, 1, 1, 2), dtype=xp.float32), xp.ones(4, dtype=xp.float32)
    memo = {}
    first = convolution._scaled(filters, scale, memo)[0]
    assert convolution._scaled(filters, scale, memo)[0] is first
    twice = convolution._scaled(filters, 2 * scale, memo)[0]
    assert not fake_cupy.counts.waits
    np.testing.assert_array_equal(twice.get(), 2 * np.ones((4, 1, 1, 2)))


def test_detection_waits_once_for_a_batch(gpu, rng):
    model, images = tiny.model(), rng.normal(size=(3, 64, 96, 3)).astype(np.float32)
    sizes, anything = [(64, 96), (50, 90), (64, 64)], replace(model.config.postprocess, score_threshold=0.0)
    detect_batch(model, images, sizes, sizes, anything)  # anchors are there from now on
    gpu.counts.clear()
    assert all(len(found) for found in detect_batch(model, images, sizes, sizes, anything))
    assert len(gpu.counts.waits) == len(gpu.counts.uploads) == 1


def test_the_progress_tells_the_pools_memory_without_waiting(gpu, monkeypatch, capsys):
    pool = SimpleNamespace(used_bytes=lambda: 3 << 29, total_bytes=lambda: 9 << 28)
    monkeypatch.setattr(backend.cuda(), "get_default_memory_pool", lambda: pool)
    md.train(tiny.model(), IMAGES, config=QUICK)
    assert "update" in (shown := capsys.readouterr().err) and ", GiB: used 1.50 pool 2.25" in shown
    assert all("training/step.py" in place for place in gpu.counts.waits)
    monkeypatch.setenv("MINIDET_BACKEND", "numpy")
    md.train(tiny.model(), IMAGES, config=QUICK)
    assert "update" in (shown := capsys.readouterr().err) and "GiB" not in shown


def test_a_step_in_parts_says_what_is_not_finite(gpu):
    model = tiny.model()
    with pytest.raises(NonFiniteError, match=r"(?s)in layer backbone.*images 4 to 7 of the training"):
        md.train(model, IMAGES, config=replace(QUICK, accumulate=2, lr=1e30), quiet=True)


# --- the same numbers -------------------------------------------------------------------------------


@pytest.mark.no_cover  # the steps above run the same lines
def test_a_training_gives_numpys_numbers_and_goes_on_after_a_stop(gpu, monkeypatch, tmp_path):
    def run(folder: str, library: str, **how):
        monkeypatch.setenv("MINIDET_BACKEND", library)
        model = tiny.model("batch", "moving")
        trained = md.train(model, IMAGES, out=tmp_path / folder, config=config, quiet=True, **how)
        return trained, model

    # Adam steps as far for a gradient that is nothing but rounding as for any other: it would enlarge what differs.
    config = replace(QUICK, ema=8, rule=SGD(), lr=0.02)
    (want, reference), (got, model) = run("numpy", "numpy"), run("cupy", "cupy")
    assert backend.name_of(model.xp) == "cupy" and backend.name_of(reference.xp) == "numpy"
    for column in ("loss", "classification", "box", "positives", "gradient_norm"):
        np.testing.assert_allclose(got.history[column], want.history[column], rtol=1e-3, err_msg=column)
    weights = reference.state_dict()
    for name, array in model.state_dict().items():
        np.testing.assert_allclose(array, weights[name], rtol=1e-3, atol=2e-5, err_msg=name)
    assert type(got.state.moving) is float and got.state.moving == pytest.approx(want.state.moving)

    record = Monitor.record

    def stop(self, row):
        record(self, row)
        if row.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Monitor, "record", stop)
    with pytest.raises(Stopped):
        run("resumed", "cupy")
    _, resumed = run("resumed", "cupy", resume=True)
    for name, array in resumed.state_dict().items():
        np.testing.assert_array_equal(array, model.state_dict()[name], err_msg=name)


def test_detecting_and_evaluating_give_numpys_numbers(gpu, monkeypatch):
    answers = []
    for library in ("numpy", "cupy"):
        monkeypatch.setenv("MINIDET_BACKEND", library)
        model = tiny.model()
        model.head.class_subnet.final.weight.data = 50 * model.head.class_subnet.final.weight.data  # scores far apart
        model.config = replace(model.config, postprocess=replace(model.config.postprocess, score_threshold=0.001))
        found = md.detect(model, [IMAGES[i].image for i in range(3)])
        answers.append(([(f.boxes, f.scores, f.labels) for f in found], md.evaluate(model, IMAGES)))
    (want, evaluation), (got, other) = answers
    for w, g in zip(want, got, strict=True):
        assert len(w[1]) == len(g[1]) > 0
        np.testing.assert_allclose(g[1], w[1], rtol=1e-3)
        np.testing.assert_allclose(g[0], w[0], rtol=1e-3, atol=1e-2)
        np.testing.assert_array_equal(g[2], w[2])
    assert other["AP"] == pytest.approx(evaluation["AP"], abs=1e-6)


def test_bfloat16_trains_where_no_tensor_core_takes_it(gpu, monkeypatch):
    """On a GPU before Ampere, which the fake one is: by products of matrices, and by float32 where CuPy has none."""
    pytest.importorskip("ml_dtypes", reason="needs ml_dtypes")
    losses = []
    for library in ("numpy", "cupy"):
        monkeypatch.setenv("MINIDET_BACKEND", library)
        config = replace(QUICK, images=8, precision="bfloat16", clip=1.0)
        losses.append(md.train(tiny.model("frozen"), IMAGES, config=config, quiet=True).history["loss"])
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)


def test_upsampling_to_another_than_a_multiple_back_in_bfloat16(fake_cupy, rng):
    pytest.importorskip("ml_dtypes", reason="needs ml_dtypes")
    values, gy, gradients = rng.normal(size=(1, 3, 2, 4)), rng.normal(size=(1, 5, 3, 4)), []
    for xp in (np, backend.load("cupy")):
        x = md.Tensor(xp.asarray(values, dtype=bfloat16(xp)), requires_grad=True)
        upsample_nearest(x, (5, 3)).backward(xp.asarray(gy, dtype=bfloat16(xp)))
        gradients.append(backend.to_numpy(x.grad))
    assert gradients[0].dtype.name == "bfloat16"
    np.testing.assert_array_equal(*(gradient.astype(np.float32) for gradient in gradients))


# --- the fake itself --------------------------------------------------------------------------------


def test_the_fake_refuses_what_hides_mistakes(fake_cupy):
    xp = backend.load("cupy")
    x = xp.asarray([1.0, 2.0])
    for mistake in (
        lambda: np.asarray(x), lambda: np.sum(x), lambda: np.add(x, x), lambda: x + np.ones(2), lambda: np.ones(2) + x,
        lambda: x[np.array([0])], lambda: xp.sum(np.ones(2)), lambda: xp.stack([x, np.ones(2)]),
    ):  # fmt: skip
        with pytest.raises(TypeError):
            mistake()
    assert not fake_cupy.counts.waits


def test_the_fake_refuses_what_cupy_lacks(fake_cupy):
    pytest.importorskip("ml_dtypes", reason="needs ml_dtypes")
    xp, core = backend.load("cupy"), backend.cuda()._core
    b = xp.ones((2, 2), dtype=bfloat16(xp))
    assert (b @ b).dtype == b.dtype and (b @ xp.ones((2, 2), dtype=xp.float32)).dtype == xp.float32  # NumPy's: float32
    stack = xp.ones((3, 2, 2), dtype=b.dtype)
    for lacking in (
        lambda: stack @ stack, lambda: xp.matmul(b, stack), lambda: xp.where(b > 0, b, b), lambda: xp.sort(b),
        lambda: xp.add.at(b, xp.asarray([0]), b[:1, :]), lambda: fake_cupy.modules()["cupy"].sort(b, kind="quicksort"),
        lambda: xp.asarray(["text"]), lambda: xp.asarray(np.ones(2, ">f4")),
        lambda: core.set_compute_type("float32", 8),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError)):
            lacking()


def test_the_fake_counts_what_waits(fake_cupy):
    xp = backend.load("cupy")
    x = xp.asarray([1.0, 2.0])
    assert len(fake_cupy.counts.uploads) == 1
    for n, wait in enumerate((
        lambda: x.get(), lambda: float(x[0]), lambda: int(x[0]), lambda: bool(x[0] > 0), lambda: x[x > 1],
        lambda: xp.nonzero(x), lambda: xp.unique_values(x), lambda: x.tolist(), lambda: x[0].item(),
    ), 1):  # fmt: skip
        wait()
        assert len(fake_cupy.counts.waits) == n
    xp.sum(x * 2 + xp.where(x > 1, x, -x))
    assert len(fake_cupy.counts.waits) == n and xp.sum(x).shape == ()


def test_real_cupy_has_what_the_fake_has():
    real = pytest.importorskip("cupy", reason="needs CuPy, to compare the fake with it; a GPU is not needed")
    assert [name for name in fake.NAMES if not hasattr(real, name)] == []
    ours = {name for name in vars(fake.ndarray) if not name.startswith("_")}
    assert {name for name in ours if not hasattr(real.ndarray, name)} == set()
    special = {name for name in vars(fake.ndarray) if name.startswith("__") and name not in vars(object)}
    assert {n for n in special - {"__slots__", "__module__"} if not hasattr(real.ndarray, n)} <= {"__rmatmul__"}
    assert all(hasattr(real.cuda.Device, name) for name in ("__int__", "__enter__", "__exit__"))
    assert all(hasattr(real.RawModule, name) for name in ("get_function",))
    assert all(hasattr(real.cuda.MemoryPool, name) for name in ("used_bytes", "total_bytes"))
    assert all(hasattr(real.cuda.Stream, name) for name in ("null", "wait_event"))
    assert all(hasattr(real.cuda.Event, name) for name in ("done", "record", "synchronize"))
    assert all(callable(getattr(real.cuda, name)) for name in ("alloc_pinned_memory", "get_current_stream"))


# --- the sources ------------------------------------------------------------------------------------


def compilations(path: Path):
    """Numbers and devices: bfloat16 where sums are wider than what is stored."""
    narrow = "Wide" in path.read_text()
    return ("float", "sm_80"), ("double", "sm_90"), *[("Bfloat16", arch) for arch in ("sm_80", "sm_90") if narrow]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nvcc_compiles(path, tmp_path):
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc, to compile for a GPU")
    for real, arch in compilations(path):
        flags = f"-arch={arch}", "-cubin", f"-DREAL={real}", *OPTIONS, ADDED[0]
        command = ["nvcc", *flags, "-include", NUMBERS, "-o", tmp_path / "x", path]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nvrtc_compiles(path):
    """The compiler that CuPy calls: it has no headers of the host's."""
    package = next((Path(p) for p in getattr(find_spec("nvidia"), "submodule_search_locations", ())), Path())
    library = next(iter(sorted(package.rglob("libnvrtc.so.*"))), None)
    if library is None:
        pytest.skip("needs NVRTC, to compile as CuPy does: pip install nvidia-cuda-nvrtc")
    nvrtc, program = ctypes.CDLL(str(library)), ctypes.c_void_p()
    for real, arch in compilations(path):
        flags = [flag.encode() for flag in (f"-arch={arch}", f"-DREAL={real}", *OPTIONS, *ADDED)]
        source = NUMBERS.read_bytes() + path.read_bytes()
        assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kernels.cu", 0, None, None) == 0
        status = nvrtc.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
        log = ctypes.create_string_buffer(1 << 16)
        nvrtc.nvrtcGetProgramLog(program, log)
        assert status == 0, log.value.decode()


def test_kernels_are_found_by_their_launchers():
    """A kernel that the loader on the CPU cannot see would not be tested."""
    for path in SOURCES:
        text = path.read_text()
        assert text.count("__global__") == len(KERNEL.findall(text)) > 0, path
