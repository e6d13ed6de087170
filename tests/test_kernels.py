"""Every fast version against its definition, every definition on the standard alone, and the rules at ties."""

from __future__ import annotations

import sys

import numba
import numpy as np
import pytest

from minidet import backend, kernels
from minidet.kernels import Kernel, focal, only
from minidet.kernels.parallel import Parallel

numpy, strict = backend.load("numpy"), backend.load("array_api_strict")


def random_boxes(rng, count, dtype=np.float64, size=100):
    """Boxes whose coordinates are multiples of 1/4: equal overlaps and touching sides do occur."""
    corner = rng.integers(0, 4 * size, (count, 2)) / 4
    return np.concatenate([corner, corner + rng.integers(1, 2 * size, (count, 2)) / 4], axis=1).astype(dtype)


def box_pairs(rng):
    for dtype in (np.float32, np.float64):
        for R, G in ((1, 1), (127, 3), (128, 1), (300, 20)):
            yield random_boxes(rng, R, dtype), random_boxes(rng, G, dtype)
        square = np.asarray([[0, 0, 4, 4]], dtype)
        yield square + np.arange(9, dtype=dtype)[:, None], np.concatenate([square, square, square + 50])
        yield np.zeros((5, 4), dtype), np.zeros((2, 4), dtype)  # no area: 0 / 0
    yield random_boxes(rng, 40, np.float32), random_boxes(rng, 3, np.float64)  # only the textbook takes these


def claims(rng):
    for anchors, gt in box_pairs(rng):
        yield anchors, gt, kernels.best_matches.textbook(anchors, gt)[2]


def scored_boxes(rng):
    for dtype in (np.float32, np.float64):
        for count in (0, 1, 60, 140):
            boxes = random_boxes(rng, count, dtype)
            for scores in (rng.random(count), rng.integers(0, 5, count) / 5, np.zeros(count)):
                yield boxes, scores.astype(dtype)
        yield np.zeros((6, 4), dtype), np.arange(6).astype(dtype)


def suppressions(rng):
    for boxes, scores in scored_boxes(rng):
        for threshold in (0.0, 0.3, 0.5):
            yield boxes, scores, threshold


def suppressions_by_class(rng):
    for boxes, scores, threshold in suppressions(rng):
        yield boxes, scores, rng.integers(0, 7, len(boxes)), threshold


def focal_elements(rng):
    for dtype in (np.float32, np.float64):
        logits = np.concatenate([rng.normal(0, 4, 90), [0.0, -100.0, 100.0, 88.0, -88.0]]).astype(dtype)
        targets = rng.integers(0, 2, logits.shape)
        for alpha, gamma in ((0.25, 2.0), (None, 0.0), (0.9, 0.5), (0.0, 5.0)):
            yield logits, targets.astype(dtype), alpha, gamma
            yield logits, targets.astype(bool), alpha, gamma


def focal_images(rng):
    for dtype in (np.float32, np.float64):
        for N, R, K in ((1, 1, 1), (2, 37, 5), (3, 700, 8), (1, 4, 3000), (2, 0, 3), (1, 5, 0)):
            logits = rng.normal(-3, 4, (N, R, K)).astype(dtype)
            labels = rng.integers(focal.IGNORE, K, (N, R))
            for alpha, gamma in ((0.25, 2.0), (None, 0.0), (0.75, 0.5)):
                yield logits, labels, alpha, gamma
        extreme = np.asarray([-100.0, 100.0, 0.0, -88.0, 88.0, 17.0, -17.0], dtype)
        labels = np.asarray([[0, 1, 2, 3, focal.BACKGROUND, focal.IGNORE, 6]])
        yield np.tile(extreme, (1, 7, 1)), labels, 0.25, 2.0
        yield np.zeros((1, 2, 3), dtype), np.asarray([[3, 9]]), 0.25, 2.0  # no such class: background


def rows_of_logits(rng):
    for dtype in (np.float32, np.float64):
        for N, P, count in ((1, 1, 1), (2, 300, 20), (3, 4000, 70), (2, 40, 100)):
            logits = np.round(rng.normal(-2, 2, (N, P)) * 8).astype(dtype) / 8  # many ties
            for threshold in (0.05, 0.0, 0.9):
                yield logits, threshold, count
        yield np.full((2, 9), -3, dtype), 0.01, 4  # all alike, as of a network that has learned nothing
        yield np.full((2, 9), -80, dtype), 0.0, 4  # a probability of nearly 0


def scatters(rng):
    for dtype in (np.float32, np.float64):
        for shape, count in (((4,), 9), ((5, 3), 12), ((6, 2, 3), 0)):
            x, rows = rng.normal(size=shape), rng.normal(size=(count, *shape[1:]))
            yield x.astype(dtype), rng.integers(0, shape[0], count), rows.astype(dtype)


def windows(rng):
    for shape, size, stride, dilation in (
        ((2, 7, 8, 3), (3, 3), (2, 2), (1, 1)),
        ((1, 5, 9, 2), (1, 2), (1, 3), (1, 2)),
        ((1, 1, 1, 1), (1, 1), (1, 1), (1, 1)),
        ((2, 6, 5, 2), (2, 2), (3, 3), (1, 1)),  # pixels that no window reads
        ((1, 2, 4, 1), (3, 3), (1, 1), (1, 1)),  # a map too low for any window
    ):
        yield rng.normal(size=shape), size, stride, dilation


def patches(rng):
    for x, size, stride, dilation in windows(rng):
        read = kernels.gather_windows.textbook(x, size, stride, dilation)
        yield rng.normal(size=read.shape), *x.shape[1:3], stride, dilation


def pools(rng):
    for shape, rule in (((2, 7, 6, 3), (3, 2, 1)), ((1, 4, 4, 2), (2, 2, 0)), ((1, 9, 7, 2), (7, 1, 3))):
        yield rng.normal(size=shape), *rule
        yield rng.integers(0, 3, shape).astype(np.float32), *rule
    yield np.zeros((1, 5, 5, 1)), 3, 2, 1  # every tap ties
    x = rng.normal(size=(1, 5, 5, 2)).astype(np.float32)
    x[0, 1, 1, 0] = np.nan
    yield x, 3, 2, 1


def pool_gradients(rng):
    for x, *rule in pools(rng):
        values, winners = kernels.max_pool.textbook(x, *rule)
        yield rng.normal(size=values.shape), winners, *x.shape[1:3], *rule


def numbers(rng):
    for dtype in (np.float32, np.float64):
        for size in (7, 20_000):  # one below and one above the block from which the compiled loop takes over
            x = rng.normal(size=size).astype(dtype)
            x[:3] = 0, np.nan, -0.0
            yield (x,)


def number_pairs(rng):
    for (x,) in numbers(rng):
        yield rng.normal(size=x.shape).astype(x.dtype), x


def filters(rng):
    for dtype in (np.float32, np.float64):
        for shape in ((3, 2, 2, 4), (33, 3, 3, 70)):
            yield rng.normal(size=shape).astype(dtype), rng.normal(size=shape[0]).astype(dtype)


def maps_with_gradients(rng):
    for dtype in (np.float32, np.float64):
        for shape in ((2, 9, 5), (3, 700, 11), (1, 30, 1000)):  # one below and two above the block
            yield rng.normal(size=shape).astype(dtype), rng.normal(size=shape).astype(dtype)


def epilogues(rng):
    for gy, y in maps_with_gradients(rng):
        y[0, 0, 0] = 0
        yield gy, y, None
        yield gy, y, rng.normal(size=gy.shape[-1]).astype(gy.dtype)


MAPS = ((4, 3), (3, 2), (2, 1))


def groups(rng):
    S = sum(h * w for h, w in MAPS)
    for dtype in (np.float32, np.float64):
        for C, count in ((8, 2), (6, 3), (5, 1)):
            x = rng.normal(1, 2, size=(2, S, C)).astype(dtype)
            weight, bias = rng.normal(size=(2, C)).astype(dtype)
            yield x, weight, bias, None, count, 1e-5, MAPS, False
            yield x[:1].repeat(7, axis=1), weight, bias, None, count, 1e-5, ((7 * S, 1),), True
            yield x, weight, bias, None, count, 1e-5, MAPS, True
            shortcut = rng.normal(size=(C, 2, S)).astype(dtype).transpose(1, 2, 0)  # not contiguous
            for relu in (False, True):
                yield x, weight, bias, shortcut, count, 1e-5, MAPS, relu


def group_gradients(rng):
    for x, weight, bias, shortcut, *rule in groups(rng):
        y, statistics = kernels.normalize_groups.textbook(x, weight, bias, shortcut, *rule)
        gy = rng.normal(size=y.shape).astype(x.dtype)
        yield x, gy, weight, statistics, 1e-5, rule[2], y if rule[-1] else None


def norms(rng):
    for dtype in (np.float32, np.float64):
        for C in (1, 7, 64, 300):
            weight, bias, mean = rng.normal(size=(3, C)).astype(dtype)
            for eps in (0.0, 1e-5, 0.3):
                yield weight, bias, mean, rng.uniform(0.01, 4, C).astype(dtype), eps


def images(rng):
    for dtype in (np.float32, np.float64):
        levels = rng.normal(size=(256, 3)).astype(dtype)
        for size, new in (((5, 7), (5, 7)), ((5, 7), (8, 20)), ((9, 4), (3, 4)), ((1, 1), (2, 3))):
            yield rng.integers(0, 256, (*size, 3), np.uint8), levels, *new


CASES = {
    kernels.best_matches: box_pairs,
    kernels.claimed_anchors: claims,
    kernels.best_pairs: rows_of_logits,
    kernels.nms: suppressions,
    kernels.batched_nms: suppressions_by_class,
    kernels.focal_terms: focal_elements,
    kernels.focal_loss: focal_images,
    kernels.scatter_add: scatters,
    kernels.gather_windows: windows,
    kernels.scatter_windows: patches,
    kernels.max_pool: pools,
    kernels.max_pool_gradient: pool_gradients,
    kernels.norm_to_affine: norms,
    kernels.normalize_groups: groups,
    kernels.normalize_groups_gradient: group_gradients,
    kernels.rectify: numbers,
    kernels.rectify_gradient: number_pairs,
    kernels.rectify_sum: number_pairs,
    kernels.scale_rows: filters,
    kernels.column_sums: lambda rng: ((gy,) for gy, _ in maps_with_gradients(rng)),
    kernels.epilogue_gradient: epilogues,
    kernels.resample: images,
}
"""For every kernel, argument lists that reach its definition and all its versions."""

IN_TEST_CONVOLUTION = {
    kernels.add_input_gradient,
    kernels.convolve,
    kernels.convolve_input_gradient,
    kernels.convolve_weight_gradient,
}

FLOAT32_BOUND = {
    kernels.focal_loss: {"rtol": 5e-6, "atol": 1e-7},
    kernels.best_pairs: {"rtol": 1e-6, "atol": 0},
    kernels.column_sums: {"rtol": 1e-5, "atol": 1e-5},
    kernels.epilogue_gradient: {"rtol": 1e-5, "atol": 1e-5},
    kernels.normalize_groups: {"rtol": 1e-5, "atol": 1e-5},
    kernels.normalize_groups_gradient: {"rtol": 1e-4, "atol": 1e-4},
    kernels.resample: {"rtol": 1e-5, "atol": 1e-6},
}
"""Versions that compute float32 in their own way are held to the definition in float64 on the same inputs, within
this.  All others round exactly as their definition does."""


def call(function, case, xp):
    """The results as NumPy arrays, of arguments moved to `xp`."""
    results = function(*(xp.asarray(a) if isinstance(a, np.ndarray) else a for a in case))
    results = results if isinstance(results, tuple) else (results,)
    return [backend.to_numpy(result) for result in results]


def assert_same(got, want, **bound):
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        if not bound:
            assert g.dtype == w.dtype
        if not np.issubdtype(w.dtype, np.floating):
            np.testing.assert_array_equal(g, w)  # decisions: exactly equal
        else:
            np.testing.assert_allclose(g, w, **(bound or {"rtol": 1e-12, "atol": 1e-12}))


def assert_held(kernel, fast, case, xp):
    """`fast` gives what the definition gives."""
    narrow = any(isinstance(a, np.ndarray) and a.dtype == np.float32 for a in case)
    got = call(fast, case, xp)
    if narrow and kernel in FLOAT32_BOUND:
        assert all(g.dtype != np.float64 for g in got)
        wide = [a.astype(np.float64) if getattr(a, "dtype", None) == np.float32 else a for a in case]
        assert_same(got, call(kernel.textbook, wide, numpy), **FLOAT32_BOUND[kernel])
    else:
        assert_same(got, call(kernel.textbook, case, numpy))


def test_every_kernel_has_cases():
    assert set(CASES) | IN_TEST_CONVOLUTION == set(kernels.ALL)


def versions():
    for kernel in CASES:
        for version, (library, _, _) in kernel.fast.items():
            if library != "cupy":  # test_parity.py has those
                yield pytest.param(kernel, version, id=f"{kernel.__name__}-{version}")


@pytest.mark.parametrize(("kernel", "version"), list(versions()))
def test_fast_equals_textbook(kernel, version, rng):
    library, when, fast = kernel.fast[version]
    cases = [case for case in CASES[kernel](rng) if when(*case)]
    assert cases, "no case reaches this version: the comparison would be empty"
    for case in cases:
        assert_held(kernel, fast, case, backend.load(library))


@pytest.mark.parametrize("kernel", CASES, ids=lambda k: k.__name__)
def test_textbook_is_standard(kernel, rng):
    for case in CASES[kernel](rng):
        with only("textbook"):
            assert_same(call(kernel.textbook, case, strict), call(kernel.textbook, case, numpy))


COMPILED = ("boxes", "suppression", "focal", "normalization", "pooling", "resample")


@pytest.mark.parametrize(
    "kernel",
    [k for k in CASES if k.__module__.rpartition(".")[2] in COMPILED and k is not kernels.claimed_anchors],
    ids=lambda k: k.__name__,
)
def test_compiled_loops_are_right_as_python(kernel, rng, monkeypatch):
    """The source that Numba compiles means the same to Python: what a debugger shows is what runs."""
    for name in COMPILED:
        module = sys.modules[f"minidet.kernels.{name}"]
        for attribute, value in vars(module).copy().items():
            if isinstance(value, Parallel):
                monkeypatch.setattr(module, attribute, value.one_by_one)
            elif hasattr(value, "py_func"):
                monkeypatch.setattr(module, attribute, value.py_func)
    for library, when, fast in kernel.fast.values():
        if library != "numpy":
            continue
        cases = [case for case in CASES[kernel](rng) if when(*case) and np.asarray(case[0]).size < 500]
        assert cases
        for case in cases:
            with np.errstate(all="ignore"):  # compiled code does not report a square that underflows
                assert_held(kernel, fast, case, numpy)


# --- the registry -------------------------------------------------------------------------------


def test_a_kernel_runs_the_first_version_that_accepts():
    @Kernel
    def double(x):
        return x + x

    @double.faster_on("numpy", "small", when=lambda x: x.size < 3)
    def _small(x):
        return 2 * x

    double.faster_on("numpy", "any")(lambda x: x * 2)
    few, many = np.ones(2), np.ones(9)
    assert double.choose(few)[0] == "numpy:small"
    assert double.choose(many)[0] == "numpy:any"
    assert double.choose(strict.asarray(few))[0] == "textbook"
    with only("textbook"):
        assert double.choose(few)[0] == "textbook"
    with only("any"):
        assert double.choose(few)[0] == "numpy:any"
    assert double(many).tolist() == [2.0] * 9


def test_a_version_has_a_name_of_its_own():
    kernel = Kernel(lambda x: x)
    kernel.__name__ = "identity"
    kernel.faster_on("numpy")(abs)
    with pytest.raises(ValueError, match="identity already has a version 'numpy:fast'"):
        kernel.faster_on("numpy")(abs)


# --- rules at ties ------------------------------------------------------------------------------

both = pytest.mark.parametrize("version", ["fast", "textbook"])


@both
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nms_drops_only_what_overlaps_more_than_the_threshold(version, dtype):
    boxes = np.asarray([[0, 0, 4, 4], [0, 0, 4, 2], [0, 0, 4, 2.25]], dtype)  # IoU 1/2 and 9/16 with the first
    with only(version):
        assert kernels.nms(boxes, np.asarray([0.9, 0.8, 0.7], dtype), 0.5).tolist() == [0, 1]


@both
def test_nms_compares_a_float32_overlap_with_a_float64_threshold(version):
    boxes = np.asarray([[0, 0, 10, 10], [0, 0, 10, 3.0]])
    scores = np.asarray([0.9, 0.8])
    singles = boxes.astype(np.float32), scores.astype(np.float32)
    with only(version):
        assert kernels.nms(boxes, scores, 0.3).tolist() == [0, 1]
        assert kernels.nms(*singles, 0.3).tolist() == [0]  # float32(0.3) is above 0.3
        for threshold, kept in ((np.float32(0.3), [0, 1]), (np.nextafter(np.float32(0.3), 0), [0])):
            assert kernels.nms(*singles, float(threshold)).tolist() == kept


@both
def test_nms_of_boxes_that_overlap_nothing_keeps_them_all(version):
    place = np.arange(40.0)[:, None] * [3, 0, 3, 0] + [0, 0, 2, 2]
    labels = np.arange(40) % 3 // 2  # 27 boxes of one class and 13 of the other
    with only(version):
        assert kernels.batched_nms(place, -np.arange(40.0), labels, 0.0).tolist() == list(range(40))
        twice = np.concatenate([place, place]), -np.arange(80.0), np.concatenate([labels, labels])
        assert kernels.batched_nms(*twice, 0.5).tolist() == list(range(40))


@both
def test_nms_takes_the_lower_index_of_equal_scores_first(version):
    boxes = np.asarray([[0, 0, 4, 4], [9, 9, 12, 12], [0, 0, 4, 4], [9, 9, 12, 12.0]])
    with only(version):
        assert kernels.nms(boxes, np.asarray([0.5, 0.7, 0.5, 0.7]), 0.5).tolist() == [1, 0]
        labels = np.asarray([1, 0, 0, 1])
        assert kernels.batched_nms(boxes, np.full(4, 0.5), labels, 0.5).tolist() == [0, 1, 2, 3]


@both
def test_nms_below_a_threshold_of_zero_keeps_one_box(version):
    boxes = np.asarray([[0, 0, 1, 1], [5, 5, 6, 6], [8, 8, 9, 9.0]])
    with only(version):
        assert kernels.nms(boxes, np.asarray([0.7, 0.9, 0.8]), -0.5).tolist() == [1]


@both
def test_nms_never_drops_a_box_without_area(version):
    boxes = np.asarray([[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 2, 2.0]])
    with only(version):
        assert kernels.nms(boxes, np.asarray([0.9, 0.8, 0.7]), 0.0).tolist() == [0, 1, 2]


@both
def test_nms_keeps_the_best_and_explains_every_drop(version, rng):
    boxes, scores = random_boxes(rng, 150), rng.random(150)
    with only(version):
        keep = kernels.nms(boxes, scores, 0.4)
    iou = kernels.pairwise_iou(boxes, boxes)
    assert (np.diff(scores[keep]) <= 0).all()
    assert (iou[np.ix_(keep, keep)] - np.eye(len(keep)) <= 0.4).all()
    for dropped in set(range(150)) - set(keep.tolist()):
        assert (iou[dropped, keep[scores[keep] > scores[dropped]]] > 0.4).any()


@both
def test_the_first_of_equally_overlapped_objects_wins(version):
    anchors = np.asarray([[0, 0, 4, 4], [50, 50, 60, 60.0]])
    gt = np.asarray([[0, 0, 4, 2], [0, 2, 4, 4.0]])
    with only(version):
        best_iou, best_gt, gt_best = kernels.best_matches(anchors, gt)
    assert (best_iou.tolist(), best_gt.tolist(), gt_best.tolist()) == ([0.5, 0.0], [0, 0], [0.5, 0.5])


def test_an_object_claims_all_anchors_that_tie():
    anchors = np.asarray([[0, 0, 4, 4], [2, 0, 6, 4], [0, 0, 4, 3.0]])
    gt = np.asarray([[1, 0, 5, 4.0]])
    assert kernels.claimed_anchors(anchors, gt, np.asarray([0.6])).tolist() == [True, True, False]


# --- the focal loss ------------------------------------------------------------------------------


def test_focal_loss_of_easy_examples_is_what_the_paper_says():
    """Section 3.2: with gamma 2, p_t = 0.9 weighs 100 times less, p_t = 0.968 1000 times, p_t <= .5 at most 4."""
    p = np.asarray([0.9, 0.968, 0.5, 0.2])
    logits = np.log(p / (1 - p))
    plain, _ = kernels.focal_terms(logits, np.ones(4), None, 0.0)
    muted, _ = kernels.focal_terms(logits, np.ones(4), None, 2.0)
    np.testing.assert_allclose(plain, -np.log(p), rtol=1e-12)
    ratio = plain / muted
    np.testing.assert_allclose(ratio[:2], [100, 1000], rtol=0.03)
    assert (ratio[2:] <= 4 * (1 + 1e-12)).all()


@both
def test_a_diverged_logit_is_not_hidden(version):
    logits = np.zeros((2, 3, 8), np.float32)
    logits[1, 2, 3] = np.nan
    with only(version), np.errstate(invalid="ignore"):
        loss, gradient = kernels.focal_loss(logits, np.full((2, 3), focal.BACKGROUND), 0.25, 2.0)
    assert np.isfinite(loss).tolist() == [True, False]
    assert np.argwhere(np.isnan(gradient)).tolist() == [[1, 2, 3]]


@both
def test_an_ignored_anchor_has_no_say_whatever_it_holds(version):
    logits = np.full((1, 2, 8), np.nan, np.float32)
    logits[0, 0] = 0
    with only(version), np.errstate(invalid="ignore"):
        loss, gradient = kernels.focal_loss(logits, np.asarray([[focal.BACKGROUND, focal.IGNORE]]), None, 0.0)
    np.testing.assert_allclose(loss, 8 * np.log(2), rtol=1e-6)
    assert (gradient[0, 1] == 0).all()


@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="sixteen million turns of a Python loop")
def test_large_sums_keep_their_digits():
    """A sum in float32, one term after the other, would be off by percents here."""
    logits = np.full((1, 200_000, 80), -4.59512, np.float32)
    loss, _ = kernels.focal_loss(logits, np.full((1, 200_000), focal.BACKGROUND), 0.25, 2.0)
    one, _ = kernels.focal_terms(np.float64(logits[0, :1, 0]), np.zeros(1), 0.25, 2.0)
    np.testing.assert_allclose(loss, 16_000_000 * one, rtol=1e-6)


@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="the error is that of fused products, compiled")
def test_polynomials_keep_their_digits():
    x = np.linspace(-87, 0, 5_001, dtype=np.float32)
    found = [focal._exp_of_negative(value) for value in x]
    np.testing.assert_allclose(found, np.exp(x.astype(float)), rtol=2e-7)
    x = np.concatenate([np.logspace(-30, 0, 5_001), np.linspace(0, 1, 5_001)]).astype(np.float32)
    found = [focal._log1p(value) for value in x]
    np.testing.assert_allclose(found, np.log1p(x.astype(float)), rtol=2.5e-7)


# --- transposes -----------------------------------------------------------------------------------


def test_scatter_add_is_the_transpose_of_take(rng):
    x, index, rows = rng.normal(size=(6, 3)), rng.integers(0, 6, 20), rng.normal(size=(20, 3))
    left, right = np.sum(x[index] * rows), np.sum(x * kernels.scatter_add(np.zeros_like(x), index, rows))
    np.testing.assert_allclose(left, right, rtol=1e-12)


def test_scatter_windows_is_the_transpose_of_gather_windows(rng):
    for x, *rule in windows(rng):
        read = kernels.gather_windows(x, *rule)
        c = rng.normal(size=read.shape)
        back = kernels.scatter_windows(c, *x.shape[1:3], *rule[1:])
        np.testing.assert_allclose(np.sum(read * c), np.sum(x * back), rtol=1e-12)
