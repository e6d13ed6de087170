"""Our side on a GPU: a worker whose jobs end when the device is done.  With NumPy the same lines run on the CPU."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np

import minidet as md
from minidet import backend, kernels
from minidet.data.loader import Batch
from minidet.detect import detect_batch
from minidet.detection.criterion import MOVING_START
from minidet.kernels import convolution, only
from minidet.kernels.precision import bfloat16
from minidet.optim import SGD
from minidet.training.step import batch_gradient
from tests.benchmarks.launches import counted
from tests.benchmarks.worker import serve
from tests.tiny import model as tiny_model

VERSIONS = ("shift", "implicit", "im2col", "textbook")
RATE = 1e-8  # weights hardly move: every step costs the same


def wait(xp) -> None:
    """Until the device has done what it was told."""
    if backend.name_of(xp) == "cupy":
        import cupy

        cupy.cuda.get_current_stream().synchronize()


def peak_bytes(xp, *, forget: bool = False) -> int:
    """What CuPy's pool holds; 0 on the CPU.  It keeps what was freed, so it only grows; with `forget` it lets go."""
    if backend.name_of(xp) != "cupy":
        return 0
    import cupy

    pool = cupy.get_default_memory_pool()
    if forget:
        pool.free_all_blocks()
    return pool.total_bytes()


def milliseconds(xp, run: Callable, seconds: float) -> float:
    """Of one call, by the device's own clock where it has one: the median of five windows."""
    run()
    wait(xp)
    began = perf_counter()
    run()
    wait(xp)
    calls = max(1, min(100, round(seconds / 5 / (perf_counter() - began))))
    return float(np.median([_window(xp, run, calls) for _ in range(5)]))


def _window(xp, run: Callable, calls: int) -> float:
    if backend.name_of(xp) != "cupy":
        began = perf_counter()
        for _ in range(calls):
            run()
        return 1e3 * (perf_counter() - began) / calls
    import cupy

    first, last = cupy.cuda.Event(), cupy.cuda.Event()
    first.record()
    for _ in range(calls):
        run()
    last.record()
    last.synchronize()
    return cupy.cuda.get_elapsed_time(first, last) / calls


def set_tf32(precision: str) -> None:
    """Only "tf32" may round float32 factors."""
    backend.use_tf32(precision == "tf32")


def dtype_of(xp, precision: str):
    """What arrays hold for it."""
    return bfloat16(xp) if precision == "bf16" else xp.float32


def numbers(xp, *shape: int, dtype=None, seed: int = 0):
    """Normal ones, drawn on the host."""
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return xp.astype(xp.asarray(values), dtype or xp.float32)


class Measurements:
    """Everything that is not a whole network: each method answers with rows."""

    def __init__(self, tiny: bool) -> None:
        self.xp, self.tiny = backend.default(), tiny
        self.seconds = 0.0 if tiny else 0.2

    def ceilings(self) -> dict:
        """What the device copies and multiplies at most."""
        xp, rows = self.xp, []
        size = 1 << (16 if self.tiny else 28)
        x = xp.ones(size, dtype=xp.float32)
        host = np.ones(size // 4, np.float32)
        for name, run, moved in (
            ("copy on the device", lambda: x + 0, 8 * size),
            ("host to device", lambda: xp.asarray(host, copy=True), 4 * host.size),
            ("device to host", lambda: backend.to_numpy(x[: size // 4]), 4 * host.size),
        ):
            ms = milliseconds(xp, run, self.seconds)
            rows.append({"name": name, "ms": ms, "GB/s": 1e-6 * moved / ms})
        n = 64 if self.tiny else 8192
        for precision in ("fp32", "tf32", "bf16"):
            set_tf32(precision)
            a, b = (numbers(xp, n, n, dtype=dtype_of(xp, precision), seed=s) for s in (0, 1))
            ms = milliseconds(xp, lambda a=a, b=b: a @ b, self.seconds)
            rows.append({"name": f"product of {n} x {n}, {precision}", "ms": ms, "TFLOP/s": 2e-9 * n**3 / ms})
        return {"rows": rows}

    def layers(self, images: int, precision: str) -> dict:
        """The head's 3x3 convolution on P3: each engine, each direction; errors against float64 on one image."""
        xp, rows = self.xp, []
        set_tf32(precision)
        H, W, C = (5, 7, 16) if self.tiny else (100, 168, 256)
        geometry = convolution.geometry_of(((H, W),), (3, 3), padding=(1, 1))
        x, gy = (numbers(xp, images, H * W, C, dtype=dtype_of(xp, precision), seed=s) for s in (0, 1))
        weight = numbers(xp, C, 3, 3, C, dtype=dtype_of(xp, precision), seed=2)
        directions = {
            "forward": (convolution.convolve, lambda x, gy, w: (x, w, None, None, None, False, geometry, {})),
            "dX": (convolution.convolve_input_gradient, lambda x, gy, w: (gy, w, geometry, {})),
            "dW": (convolution.convolve_weight_gradient, lambda x, gy, w: (x, gy, geometry)),
        }
        for direction, (kernel, arguments) in directions.items():
            wide = [xp.astype(a, xp.float64) for a in (x[:1, ...], gy[:1, ...], weight)]
            with only("textbook"):
                exact = kernel(*arguments(*wide))
            for version in (*VERSIONS, None):
                args, one = arguments(x, gy, weight), arguments(x[:1, ...], gy[:1, ...], weight)
                with only(version):
                    chosen = kernel.choose(*args)[0]
                    if version not in (None, "textbook") and not chosen.endswith(f":{version}"):
                        continue  # there is no such version here
                    error = xp.max(xp.abs(xp.astype(kernel(*one), xp.float64) - exact)) / xp.max(xp.abs(exact))
                    ms = milliseconds(xp, lambda kernel=kernel, args=args: kernel(*args), self.seconds)
                name = f"{direction} N={images} {precision} {version or f'by itself: {chosen}'}"
                flops = 2e-9 * images * H * W * C * C * 9
                rows.append({"name": name, "ms": ms, "TFLOP/s": flops / ms, "max_error": float(error)})
        return {"rows": rows}

    def elementwise(self, precision: str) -> dict:
        """Passes over memory, as residual blocks and the loss make them."""
        xp, rows = self.xp, []
        N, S, C, K = (1, 40, 16, 8) if self.tiny else (16, 16_800, 256, 80)
        a, b = (numbers(xp, N, S, C, dtype=dtype_of(xp, precision), seed=s) for s in (0, 1))
        width, scale = a.dtype.itemsize, numbers(xp, C)
        logits = numbers(xp, 1 if self.tiny else 2, 9 * S, K)
        labels = xp.asarray(np.random.default_rng(3).integers(-2, K, logits.shape[:2]))
        for name, run, moved in (
            ("max(a + b, 0)", lambda: kernels.rectify_sum(a, b), 3 * a.size * width),
            ("its gradient", lambda: kernels.rectify_gradient(a, b), 3 * a.size * width),
            ("end of a convolution, backwards", lambda: kernels.epilogue_gradient(a, b, scale), 3 * a.size * width),
            ("column sums", lambda: kernels.column_sums(a), a.size * width),
            ("focal loss, float32", lambda: kernels.focal_loss(logits, labels, 0.25, 2.0), 4 * logits.size),
        ):
            ms = milliseconds(xp, run, self.seconds)
            rows.append({"name": f"{name}, {precision}", "ms": ms, "GB/s": 1e-6 * moved / ms})
        return {"rows": rows}


class NetworkJob:
    """A training step or a detection of one batch, whose images are on the device already."""

    def __init__(self, part: str, images: int, precision: str, tiny: bool, xp=None) -> None:
        self.made = part, images, precision, tiny
        xp = self.xp = xp or backend.default()
        set_tf32(precision)
        classes = [f"class {k}" for k in range(91)]
        model = tiny_model(xp=xp) if tiny else md.RetinaNet(md.presets.torchvision_v1(classes), xp=xp)
        self.model, self.step = model, part == "train"
        model.compute(precision="bfloat16" if precision == "bf16" else "float32")
        H, W = (64, 96) if tiny else (800, 1344)
        classes = len(model.config.classes)
        rng = np.random.default_rng(0)
        boxes = []
        for _ in range(images):
            corner, sides = rng.uniform(0, 0.6, (8, 2)), rng.uniform(0.1, 0.4, (8, 2))
            boxes.append((np.concatenate([corner, corner + sides], axis=1) * [W, H, W, H]).astype(np.float32))
        labels, sizes = [rng.integers(0, classes, 8) for _ in range(images)], np.full((images, 2), (H, W))
        inside = numbers(xp, images, H, W, 3)
        self.batch = Batch(inside, sizes, sizes, boxes, labels, list(range(images)), [""] * images, 0)
        config = md.TrainConfig(rule=SGD(momentum=0.9), weight_decay=1e-4)
        self.optimizer = config.optimizer(model)
        self.anything = replace(model.config.postprocess, score_threshold=0.05)
        model.train() if self.step else model.eval()

    def run(self) -> None:
        """Once, to the end."""
        if self.step:
            batch_gradient(self.model, self.batch, 1, MOVING_START)
            self.optimizer.step(RATE)
            self.optimizer.clear_gradients()
        else:
            b = self.batch
            self.found = detect_batch(self.model, b.images, b.sizes, b.original_sizes, self.anything)
        wait(self.xp)

    def reads(self) -> dict:
        """How often one call copies from the device to the host, which is to wait for it."""
        count, copy = 0, backend.to_numpy

        def counted(x):
            nonlocal count
            count += 1
            return copy(x)

        backend.to_numpy = counted
        try:
            self.run()
        finally:
            backend.to_numpy = copy
        return {"reads": count}

    def launches(self) -> dict:
        """How many kernels one call starts: launches.py says what is counted.  Without a GPU, on a fake one."""
        if backend.name_of(self.xp) == "cupy":
            with counted(self.xp) as counts:
                self.run()
            return counts
        sys.path.append(str(Path(__file__).parents[1]))
        from fake_gpu import fake_gpu

        with fake_gpu():
            pretended = NetworkJob(*self.made, xp=backend.load("cupy"))
            pretended.run()  # anchors are there from now on
            return pretended.launches()

    def memory(self) -> dict:
        """The pool's size after one call that began with an empty one, in MiB."""
        self.release()
        self.run()
        return {"mib": peak_bytes(self.xp) / 2**20}

    def release(self) -> dict:
        """Let go of memory that nothing needs, for the other side's turn."""
        gc.collect()
        peak_bytes(self.xp, forget=True)
        return {}


if __name__ == "__main__":
    serve({"measurements": Measurements, "network": NetworkJob})
