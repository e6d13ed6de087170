"""Every op, kernel, loss and whole small network on CuPy, against NumPy: on a fake GPU, with -m gpu on a real one.

On NumPy and array-api-strict the same cases run where they are at home: test_ops.py, test_kernels.py, test_models.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import test_kernels
import test_models
from op_cases import CASES

from minidet import backend, kernels
from minidet.autograd import Tensor
from minidet.detection import CoderConfig, LossConfig, build_targets, image_weights, loss, postprocess
from minidet.kernels import normalization_gpu, only
from minidet.optim import SGD, AdamW, Optimizer, ParameterGroup

TOLERANCE = {
    "op": {np.float32: 2e-5, np.float64: 1e-11},
    "loss": {np.float32: 2e-5, np.float64: 1e-11},
    "network": {np.float32: 1e-3, np.float64: 1e-9},
}
"""Largest difference relative to the largest value.  Kernels have their own, in test_kernels.py."""

FLOATS = (np.float32, np.float64)
BY_SUMS = (kernels.normalize_groups, kernels.normalize_groups_gradient)
each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])


def assert_near(got, want, what: str, dtype, name: str = "") -> None:
    got, scale = backend.to_numpy(got), np.abs(want).max(initial=0)
    assert got.dtype == want.dtype and got.shape == want.shape, name
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[what][dtype] * max(scale, 1e-30), err_msg=name)


# --- ops --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_op(case, cupy, rng):
    drawn = case.inputs(rng)
    for dtype in (np.float32, np.float64):
        arrays, cotangent, results = [np.asarray(a, dtype) for a in drawn], None, []
        for xp in (np, cupy):
            inputs = [Tensor(xp.asarray(a), requires_grad=True) for a in arrays]
            y = case.call(*inputs)
            cotangent = np.asarray(rng.normal(size=y.shape), dtype) if cotangent is None else cotangent
            y.backward(xp.asarray(cotangent))
            results.append([y.data, *(x.grad for x in inputs)])
        for want, got in zip(*results, strict=True):
            assert_near(got, np.asarray(want), "op", dtype)


# --- kernels ----------------------------------------------------------------------------------------


def versions():
    for kernel in test_kernels.CASES:
        for version, (library, _, _) in kernel.fast.items():
            if library == "cupy":
                yield pytest.param(kernel, version, id=f"{kernel.__name__}-{version}")


@pytest.mark.parametrize(("kernel", "version"), list(versions()))
def test_kernel(kernel, version, cupy, rng):
    _, when, fast = kernel.fast[version]
    reached = 0
    for case in test_kernels.CASES[kernel](rng):
        if when(*(cupy.asarray(a) if isinstance(a, np.ndarray) else a for a in case)):
            test_kernels.assert_held(kernel, fast, case, cupy)
            reached += 1
    assert reached, "no case reaches this version: the comparison would be empty"


@pytest.mark.parametrize("kernel", [k for k in test_kernels.CASES if k.narrow], ids=lambda k: k.__name__)
def test_kernel_in_bfloat16(kernel, cupy, rng):
    """What float32 makes of the same numbers, rounded once, to the bit; sums over maps stay float32.

    Numbers that follow from such a sum may be rounded to the next one.
    """
    narrow = pytest.importorskip("ml_dtypes").bfloat16
    for case in test_kernels.CASES[kernel](rng):
        axes = case[0].ndim

        def moved(a, dtype, axes=axes):
            return a.astype(dtype if a.ndim == axes else np.float32) if getattr(a, "dtype", 0) in FLOATS else a

        rounded = [moved(a, narrow) for a in case]
        version, run = kernel.choose(*(cupy.asarray(a) if isinstance(a, np.ndarray) else a for a in rounded))
        assert version in kernel.narrow
        wide = [moved(a.astype(np.float32) if getattr(a, "dtype", 0) == narrow else a, np.float32) for a in rounded]
        results = zip(test_kernels.call(run, rounded, cupy), test_kernels.call(kernel.textbook, wide, np), strict=True)
        for got, want in results:
            if got.dtype == narrow and kernel in BY_SUMS:
                np.testing.assert_allclose(got.astype(np.float32), want, rtol=2.0**-8 + 1e-5, atol=1e-5)
            elif got.dtype == narrow:
                assert want.ndim == axes
                np.testing.assert_array_equal(got.astype(np.float32), want.astype(narrow).astype(np.float32))
            else:
                assert got.dtype == want.dtype and (want.ndim != axes or want.dtype == np.uint8)
                np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize(
    ("threads", "shortest", "shares"), [(1 << 19, 16, 64), (1, 1, 64), (1 << 19, 1, 2)],
    ids=["as it is", "a run per level", "a pixel per run"],
)  # fmt: skip
def test_norms_share_out_their_sums(threads, shortest, shares, relu, cupy, rng, monkeypatch):
    """However many pixels a thread has, and however many sums: levels of one pixel, channels of one group."""
    for name, value in (("_THREADS", threads), ("_SHORTEST", shortest), ("_SHARES", shares)):
        monkeypatch.setattr(normalization_gpu, name, value)
    monkeypatch.setattr(normalization_gpu, "_plan", normalization_gpu._plan.__wrapped__)
    maps = ((1, 1), (9, 7), (3, 2), (1, 1))
    for N, C, groups in ((3, 5, 5), (1, 6, 1), (2, 12, 4), (1, 1, 1), (2, 300, 50)):
        x, gy = np.swapaxes(rng.normal(2, 1, size=(2, 71, N, C)), 1, 2)  # not contiguous
        weight, bias = rng.normal(size=(2, C))
        case = x, weight, bias, gy if relu else None, groups, 1e-3, maps, relu
        y, statistics = kernels.normalize_groups.textbook(*case)
        slopes = x, gy, weight, statistics, 1e-3, maps, np.swapaxes(y.swapaxes(0, 1).copy(), 0, 1) if relu else None
        for kernel, arguments in ((kernels.normalize_groups, case), (kernels.normalize_groups_gradient, slopes)):
            test_kernels.assert_held(kernel, kernel.fast["cupy:fast"][2], arguments, cupy)


@pytest.mark.parametrize(("dtype", "mean", "bound"), [(np.float64, 1e6, 1e-9), (np.float32, 1e4, 1e-6)])
def test_variances_beside_a_large_mean(dtype, mean, bound, cupy, rng):
    x, ones, maps = rng.normal(mean, 1, size=(2, 500, 8)).astype(dtype), np.ones(8, dtype), ((250, 1), (25, 10))
    for first in (mean, 0):  # a first pixel like the others, or unlike them all
        x[:, ::250] = first
        _, got = test_kernels.call(kernels.normalize_groups, (x, ones, ones, None, 2, 1e-5, maps, False), cupy)
        exact = x.astype(np.float64), ones, ones, None, 2, 1e-5, maps, False
        np.testing.assert_allclose(got, kernels.normalize_groups.textbook(*exact)[1], rtol=bound)


def test_bfloat16_is_rounded_to_the_nearest(cupy):
    """Every bfloat16, and what lies halfway to the next one: of two equally near ones, the even."""

    def flushed(x):  # as kernels do: kernels/cuda.py
        return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)

    narrow = pytest.importorskip("ml_dtypes").bfloat16
    bits = np.arange(1 << 16, dtype=np.uint16)
    a = bits.view(narrow)
    half = np.where(bits & 0x7F80 > 0x0400, (bits & 0xFF80) - 0x0400, 0).astype(np.uint16).view(narrow)
    for first, second in ((a, 0 * half), (a, half), (a, np.roll(a, 7777))):
        got = backend.to_numpy(kernels.rectify_sum(cupy.asarray(first), cupy.asarray(second)))
        with np.errstate(all="ignore"):
            total = flushed(first.astype(np.float32)) + flushed(second.astype(np.float32))
            want = flushed(np.maximum(total, 0)).astype(narrow)
        np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))
    one, nan = np.ones((1, 1, 1), narrow), np.asarray([0x7FFFFFFF], np.uint32).view(np.float32)  # the NaN of GPUs
    assert np.isnan(backend.to_numpy(kernels.epilogue_gradient(*map(cupy.asarray, (one, one, nan)))[0])).all()


@pytest.mark.parametrize("kernel", test_kernels.CASES, ids=lambda k: k.__name__)
def test_definition(kernel, cupy, rng):
    """What runs where no version for a GPU accepts the arguments."""
    with only("textbook"):
        for case in test_kernels.CASES[kernel](rng):
            want = test_kernels.call(kernel.textbook, case, np)
            test_kernels.assert_same(test_kernels.call(kernel.textbook, case, cupy), want, rtol=1e-5, atol=1e-5)


@each_dtype
@pytest.mark.parametrize("rule", ["sgd", "nesterov", "adamw"])
def test_optimizer(rule, dtype, cupy, rng):
    rule = {"sgd": SGD(), "nesterov": SGD(nesterov=True), "adamw": AdamW()}[rule]
    start, gradients = rng.normal(size=(9, 4)).astype(dtype), rng.normal(size=(3, 4, 9)).astype(dtype)
    results = []
    for xp in (np, cupy):
        p = Tensor(xp.asarray(start.copy()), requires_grad=True)
        optimizer = Optimizer(rule, [ParameterGroup({"p": p}, weight_decay=0.1)])
        for g in gradients:
            p.grad = xp.matrix_transpose(xp.asarray(g))  # not contiguous
            optimizer.step(0.1)
        results.append(backend.to_numpy(p.data))
    assert_near(results[1], results[0], "op", dtype)


# --- the loss and the detections --------------------------------------------------------------------

LOSSES = [
    LossConfig(box="smooth_l1", normaliser="batch"),
    LossConfig(box="l1", normaliser="image", box_weight=2.0),
    LossConfig(box="giou", normaliser="moving", alpha=None),
]


@each_dtype
@pytest.mark.parametrize("objects", [(3, 0, 5), (0, 0)], ids=["objects", "none"])
@pytest.mark.parametrize("config", LOSSES, ids=lambda c: f"{c.box}-{c.normaliser}")
@pytest.mark.parametrize("library", ["array_api_strict", "cupy"])
def test_targets_of_all_anchors_give_the_loss_of_the_positive_ones(library, config, objects, dtype, cupy, rng):
    """A device makes targets of all anchors, NumPy picks the positive ones: one loss, and one gradient."""
    anchors = test_kernels.random_boxes(rng, 300, dtype)
    boxes = [anchors[rng.integers(0, 300, G)] + rng.normal(size=(G, 4)).astype(dtype) / 9 for G in objects]
    labels = [rng.integers(0, 4, G) for G in objects]
    logits, deltas = (rng.normal(-1, 1, (len(objects), 300, n)).astype(dtype) for n in (4, 4))
    matcher, results = test_models.presets.small(["a"]).matcher, []
    for xp in (np, cupy if library == "cupy" else backend.load(library)):
        targets = build_targets(xp.asarray(anchors), boxes, labels, matcher)
        assert (targets.rows is None) == (xp is not np)
        weights, moving = image_weights(config, targets.positives)
        x, d = (Tensor(xp.asarray(a), requires_grad=True) for a in (logits, deltas))
        found = loss(x, d, targets, weights, config, CoderConfig(weights=(1.0, 1.0, 2.0, 2.0)))
        found.total.backward()
        numbers = np.array(backend.read([found.classification, found.box, moving, *targets.positives]))
        results.append([targets.labels, numbers, x.grad, d.grad])
    for want, got in zip(*results, strict=True):
        assert_near(got, backend.to_numpy(want), "loss", dtype)
    assert results[0][1][3:].sum() > 0 or sum(objects) == 0


@each_dtype
@pytest.mark.parametrize("clip", ["before_nms", "after_nms"])
def test_detections(clip, dtype, cupy, rng):
    anchors, counts = test_kernels.random_boxes(rng, 500, dtype), [380, 100, 20]
    logits = (np.round(rng.normal(-2, 2, (3, 500, 3)) * 8) / 8).astype(dtype)  # many ties
    deltas = (rng.normal(0, 0.5, (3, 500, 4))).astype(dtype)
    config = test_models.replace(test_models.presets.small(["a"]).postprocess, clip=clip, top_k=90, drop_empty=True)
    sizes = [(90, 100), (80, 50), (100, 100)]
    want, got = (
        postprocess(*map(xp.asarray, (logits, deltas, anchors)), counts, sizes, config, CoderConfig())
        for xp in (np, cupy)
    )
    for w, g in zip(want, got, strict=True):
        assert len(w) > 10
        np.testing.assert_array_equal(g.labels, w.labels)
        np.testing.assert_allclose(g.scores, w.scores, rtol=1e-6)
        np.testing.assert_allclose(g.boxes, w.boxes, rtol=1e-5, atol=1e-4)


# --- whole networks ---------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("config", test_models.VARIANTS.values(), ids=test_models.VARIANTS)
def test_network(config, dtype, cupy):
    results = []
    for xp in (np, cupy):
        model, run = test_models.problem(config, xp, np.random.default_rng(0), dtype)
        results.append(test_models.loss_and_gradients(model, run))
    (want, gradients), (got, others) = results
    assert abs(got - want) <= TOLERANCE["network"][dtype] * want
    for name, gradient in gradients.items():
        assert_near(others[name], gradient, "network", dtype, name)


def test_kernels_for_a_gpu_run_on_it(cupy):
    """`choose`, for arguments as a training has them."""
    x = cupy.zeros((2, 40, 8), dtype=cupy.float32)
    labels = cupy.zeros((2, 40), dtype=cupy.int64)
    boxes = cupy.zeros((40, 4), dtype=cupy.float32)
    for kernel, *args in (
        (kernels.focal_loss, x, labels, 0.25, 2.0),
        (kernels.best_matches, boxes, boxes),
        (kernels.rectify_sum, x, x),
        (kernels.epilogue_gradient, x, x, None),
        (kernels.norm_to_affine, *[x[0, 0, :]] * 4, 1e-5),
        (kernels.normalize_groups, x, x[0, 0, :], x[0, 0, :], x, 2, 1e-5, ((40, 1),), True),
        (kernels.best_pairs, x[0, ...], 0.05, 10),
    ):
        assert kernel.choose(*args)[0] == "cupy:fast", kernel.__name__
