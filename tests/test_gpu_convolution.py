"""The convolutions for GPUs, held to the definition: their algebra on NumPy, their CUDA on an emulator.

`cuda.launch` and `cuda.multiply` are all that they ask of a GPU.  Here NumPy and the emulator stand in for them, and
everything else runs as it is.  Tests marked `gpu` run the engines on a device.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import emulated
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from stand_ins import ends_of_shift, multiply, wide

from minidet import backend
from minidet.kernels import convolve, convolve_input_gradient, convolve_weight_gradient, only
from minidet.kernels.convolution import Geometry, definition

cuda = pytest.importorskip(
    "minidet.kernels.convolution.gpu.cuda", reason="the convolutions for GPUs are not installed"
)
from minidet.kernels.convolution.gpu import im2col, implicit, shift  # noqa: E402

REAL_MULTIPLY = cuda.multiply
KERNELS = (convolve, convolve_input_gradient, convolve_weight_gradient)
BOUND = {"float32": 1e-5, "tf32": 4e-3, "bfloat16": 2e-2}
"""Largest error against float64 of the same numbers, over sqrt(terms in a sum) * rms of both factors.  TF32 rounds
factors by 5e-4 of their size at most, or cuts off 1e-3; errors of random sign grow as the sum does, and the largest of
many is six times what is common.  Factors that are bfloat16 are exact, but the result is rounded by 1/512 of its size
at most, and again the largest of many is six times as large as is common."""

FORWARD, SAME = Geometry(((7, 5),), (3, 3), (1, 1), (1, 1)), ((3, 3), (1, 1), (1, 1))
GEOMETRIES = {
    "one pixel": (Geometry(((1, 1),), *SAME), 1, 8, 8),
    "a pixel wide": (Geometry(((1, 9), (6, 1), (1, 1)), *SAME), 3, 16, 8),
    "tails everywhere": (Geometry(((13, 7),), *SAME), 3, 40, 136),
    "pyramid": (Geometry(((9, 12), (5, 6), (3, 3), (2, 2), (1, 1)), *SAME), 2, 24, 16),
    "point": (Geometry(((9, 12), (3, 2)), (1, 1)), 2, 72, 24),
    "strided point": (Geometry(((9, 12),), (1, 1), (2, 2)), 2, 24, 16),
    "strided": (Geometry(((9, 12), (4, 5)), (3, 3), (2, 2), (1, 1)), 2, 16, 24),
    "uneven": (Geometry(((9, 12), (3, 4)), (2, 3), (1, 2), (1, 0), (2, 1)), 2, 8, 16),
    "wide": (Geometry(((11, 10),), (5, 5), (3, 2), (2, 2), (1, 2)), 1, 8, 8),
    "odd channels": (Geometry(((9, 7), (3, 3)), *SAME), 2, 27, 36),
    "stem": (Geometry(((13, 14),), (7, 7), (2, 2), (3, 3)), 2, 3, 16),
    "more padding than filter": (Geometry(((3, 2),), (1, 2), (1, 1), (2, 1)), 2, 8, 8),
}
"""Geometry, images, channels, filters."""


# --- NumPy in the place of a GPU ----------------------------------------------------------------


def bfloat16(x):
    """The nearest bfloat16, as the 16 bits that hold it."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


@pytest.fixture
def here(monkeypatch):
    """The engines run on NumPy arrays; CUDA kernels run on the emulator."""
    monkeypatch.setattr(cuda, "device", lambda: 0)
    monkeypatch.setattr(cuda, "capability", lambda device: 90)
    monkeypatch.setattr(cuda, "_kernel", emulated.kernel)
    monkeypatch.setattr(cuda, "multiply", multiply)
    monkeypatch.setattr(cuda, "numbers", lambda x: "bfloat16" if x.dtype == np.uint16 else x.dtype.name)


def arrays(geometry, N, C, F, seed=0):
    """x, weight, bias, scale and dL/dy in float64."""
    rng = np.random.default_rng(seed)
    shapes = (N, geometry.pixels, C), (F, *geometry.size, C // geometry.groups), (F,), (F,)
    drawn = [rng.normal(size=shape) for shape in (*shapes, (N, geometry.output_pixels, F))]
    drawn[3] = np.clip(np.abs(drawn[3]), 0, 1)
    return drawn


def three(engine, x, weight, bias, scale, gy, geometry, shortcut=None):
    """An engine's results: y with everything that follows it, dL/dx and dL/dweight; memos are full the second time.

    Without another one, gy will do for a shortcut.
    """
    memo, shortcut = {}, gy if shortcut is None else shortcut
    for _ in range(2):
        y = engine.convolve(x, weight, bias, scale, shortcut, True, geometry, memo)
        gx = engine.convolve_input_gradient(gy, weight, geometry, memo)
    return y, gx, engine.convolve_weight_gradient(x, gy, geometry)


# --- algebra, in float64 ------------------------------------------------------------------------


@st.composite
def problems(draw, sizes, strides, paddings, dilations):
    """Geometry, images, channels, filters, seed."""
    side = st.integers(1, 9)
    maps = draw(st.lists(st.tuples(side, side), min_size=1, max_size=3))
    rules = (draw(st.sampled_from(choices)) for choices in (sizes, strides, paddings, dilations))
    geometry = Geometry(tuple(maps), *rules)
    assume(all(min(map_) > 0 for map_ in geometry.output_maps))
    return geometry, *(draw(st.integers(1, 5)) for _ in range(3)), draw(st.integers(0, 2**32 - 1))


ALIKE = problems([(3, 3)], [(1, 1)], [(1, 1)], [(1, 1)])
ANY = problems([(3, 3), (1, 1), (2, 3)], [(1, 1), (2, 2), (1, 3)], [(0, 0), (1, 1), (2, 0)], [(1, 1), (1, 2)])


@pytest.mark.parametrize(("engine", "drawn"), [(shift, ALIKE), (im2col, ANY)], ids=["shift", "im2col"])
def test_the_algebra_is_right_and_both_gradients_are_transposes(engine, drawn, here, monkeypatch):
    """Also <conv(x, w), g> = <x, dL/dx> = <w, dL/dw>."""
    monkeypatch.setattr(cuda, "launch", lambda *call: ends_of_shift(call[1], call[-1]))

    @settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @given(drawn)
    def holds(problem):
        geometry = problem[0]
        x, weight, _, _, gy = made = arrays(*problem)
        for got, want in zip(three(engine, *made, geometry), three(definition, *made, geometry), strict=True):
            assert got.shape == want.shape
            np.testing.assert_allclose(got, want, atol=1e-11)
        product = np.sum(engine.convolve(x, weight, None, None, None, False, geometry, {}) * gy)
        gx = engine.convolve_input_gradient(gy, weight, geometry, {})
        gweight = engine.convolve_weight_gradient(x, gy, geometry)
        assert np.sum(gx * x) == pytest.approx(product, abs=1e-9)
        assert np.sum(gweight * weight) == pytest.approx(product, abs=1e-9)

    holds()


class Cublas:
    """cuBLAS as its manual defines it, on the memory of NumPy arrays: column after column, `ld` elements apart."""

    def __init__(self):
        self.precisions = []

    def gemmStridedBatchedEx(  # noqa: N802  its name
        self, handle, op_a, op_b, m, n, k, alpha, a, type_a, ld_a, step_a, b, type_b, ld_b, step_b, beta, c, type_c,
        ld_c, step_c, count, precision, algorithm,
    ):  # fmt: skip
        assert handle == "handle" and algorithm == -1 and type_c == 0 and {type_a, type_b} <= {0, 14}
        assert type_a == type_b and precision in ((68,) if type_a else (68, 77))
        self.precisions.append(precision)

        def columns(address, kind, rows, width, ld, step):
            assert ld >= rows, "cuBLAS refuses columns that overlap"
            size, ctype = (2, ctypes.c_uint16) if kind else (4, ctypes.c_float)
            reach = (count - 1) * step + (width - 1) * ld + rows
            memory = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctype)), (reach,))
            return np.lib.stride_tricks.as_strided(memory, (count, rows, width), (step * size, size, ld * size))

        left = columns(a, type_a, *((k, m) if op_a else (m, k)), ld_a, step_a)
        right = columns(b, type_b, *((n, k) if op_b else (k, n)), ld_b, step_b)
        target = columns(c, type_c, m, n, ld_c, step_c)
        one, old = (ctypes.cast(address, ctypes.POINTER(ctypes.c_float))[0] for address in (alpha, beta))
        product = wide(left.swapaxes(1, 2) if op_a else left) @ wide(right.swapaxes(1, 2) if op_b else right)
        target[...] = one * product + (old * target if old else 0)


@pytest.mark.parametrize("kind", ["float32", "tf32", "bfloat16"])
def test_products_speak_to_cublas_in_columns(kind, here, monkeypatch):
    """Shift, with the call to cuBLAS as it is, of which only the function is replaced."""
    cublas = Cublas()
    device = SimpleNamespace(get_cublas_handle=lambda: "handle")
    monkeypatch.setattr(backend, "cuda", lambda: SimpleNamespace(cuda=SimpleNamespace(cublas=cublas, device=device)))
    monkeypatch.setattr(cuda, "multiply", REAL_MULTIPLY)
    monkeypatch.setattr(cuda, "_address", lambda s: s.array.ctypes.data + s.start * s.array.itemsize)
    monkeypatch.setattr(backend, "_tf32", kind == "tf32")
    geometry, *sizes = GEOMETRIES["pyramid"]
    exact = "float32" if kind == "tf32" else kind  # this cuBLAS rounds nothing
    settle(shift, narrowed(arrays(geometry, *sizes), kind), geometry, exact)
    assert set(cublas.precisions) == {77 if kind == "tf32" else 68}


def test_what_a_kernel_is_given(monkeypatch):
    """An int would be passed as 64 bits, and None has no address."""
    given = []
    kernel = lambda *call, shared_mem: given.append((call, shared_mem))  # noqa: E731
    module = SimpleNamespace(get_function=lambda name: {"convolve_float32": kernel}[name])

    def compiled(paths, *options):
        assert "convolve_##name" in paths[0].read_text() and options == ("-std=c++17",)
        return module

    monkeypatch.setattr(backend, "cuda_module", compiled)
    monkeypatch.setattr(cuda, "_kernel", cuda._kernel.__wrapped__)
    monkeypatch.setattr(cuda, "device", lambda: 0)
    x = np.zeros(3)
    cuda.launch(implicit.FILE, "convolve_float32", (7, 1), 256, 4096, (x, None, 5))
    (blocks, threads, (first, null, number)), shared_bytes = given[0]
    assert (blocks, threads, shared_bytes) == ((7, 1), (256,), 4096)
    assert first is x and null == 0 and null.dtype == np.int64 and number == 5 and number.dtype == np.int32


# --- the CUDA kernels, on the emulator ----------------------------------------------------------


def within(name, got, want, terms, factors, bound):
    scale = math.sqrt(terms) * math.prod(math.sqrt(np.mean(np.square(wide(a)))) for a in factors)
    error = np.abs(wide(got) - want).max() / scale
    assert got.shape == want.shape
    assert error <= bound, f"{name}: an error of {error:.2g}, where {bound:.0e} is allowed"


def settle(engine, made, geometry, kind):
    """Three results, held to the definition in float64.

    What TF32 loses, it loses before anything is multiplied: of factors rounded as it rounds them, float32's bound
    holds.  So it does for sums of bfloat16 that are not rounded in the end.
    """
    x, weight, _, _, gy = made
    exact = [round_tf32(a) if kind == "tf32" and a.ndim > 1 else a for a in made]
    wants = three(definition, *map(wide, exact), geometry, wide(gy))
    terms = [geometry.taps * weight.shape[3], geometry.taps * weight.shape[0], gy.shape[0] * gy.shape[1]]
    factors = [(x, weight), (gy, weight), (x, gy)]
    gots = three(engine, *made, geometry)
    for name, got, want, *rule in zip(("y", "dx", "dw"), gots, wants, terms, factors, strict=True):
        within(name, got, want, *rule, BOUND["float32" if got.dtype == np.float32 else kind])
    return gots


def round_tf32(x):
    """The nearest number with ten bits of fraction, ties away from zero."""
    return (x.view(np.uint32) + 0x1000 & ~np.uint32(0x1FFF)).view(np.float32)


def narrowed(made, kind):
    """x, weight and dL/dy in the kind of numbers asked for; bias and scale in float32."""
    narrow = bfloat16 if kind == "bfloat16" else np.float32
    return [narrow(a) if a.ndim > 1 else a.astype(np.float32) for a in made]


@pytest.mark.parametrize(
    "worst",
    [
        pytest.param((False, False), id="copies at once", marks=pytest.mark.slow),
        pytest.param((True, True), id="copies late, backwards"),
    ],
)
@pytest.mark.parametrize("kind", ["tf32", "bfloat16"])
@pytest.mark.parametrize("case", GEOMETRIES)
def test_implicit_on_the_emulator(case, kind, worst, here):
    geometry, *sizes = GEOMETRIES[case]
    emulator = emulated.library(implicit.FILE)
    emulator.choose(*map(int, worst))
    made = narrowed(arrays(geometry, *sizes), kind)
    assert implicit.accepts(made[0], geometry, *sizes[1:])
    y, gx, gweight = settle(implicit, made, geometry, kind)
    assert y.dtype == gx.dtype == made[0].dtype and gweight.dtype == np.float32
    assert emulator.conflicts() == 0, "rows that are read together lie in the same bank of shared memory"


def test_implicit_shares_out_the_sum_over_pixels(here, monkeypatch):
    geometry = Geometry(((30, 20), (7, 9)), *SAME)
    shares = []

    launch = cuda.launch

    def noting(*args):
        launch(*args)
        shares.append(args[2][1])

    monkeypatch.setattr(cuda, "launch", noting)
    for kind in ("tf32", "bfloat16"):
        settle(implicit, narrowed(arrays(geometry, 2, 8, 16), kind), geometry, kind)
    assert max(shares) >= 5, "one block for all pixels proves nothing"


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [case for case, (geometry, *_) in GEOMETRIES.items() if geometry.size == (3, 3)])
def test_shift_on_the_emulator(case, kind, here):
    geometry, *sizes = GEOMETRIES[case]
    made = narrowed(arrays(geometry, *sizes), kind)
    if shift.accepts(made[0], geometry, *sizes[1:]):
        settle(shift, made, geometry, kind)
    else:
        assert case in ("strided", "odd channels")


def test_nan_passes_through_the_rectifier(here):
    geometry = Geometry(((4, 4),), *SAME)
    made = narrowed(arrays(geometry, 1, 8, 8), "float32")
    made[0][0, 5] = np.nan
    for engine in (implicit, shift):
        assert np.isnan(three(engine, *made, geometry)[0][0, 5]).all()


def test_the_plan_is_what_the_kernels_read(here):
    plan = implicit.forward_plan(FORWARD, 2, 8, 16)
    assert plan.dtype == np.int32 and plan.size == emulated.library(implicit.FILE).plan_words()


WORST = {"late": (True, False), "at once": (False, False), "late, backwards": (True, True)}
MISTAKES = {
    "no barrier": ("        __syncthreads();\n", "", "late, backwards"),
    "copies not awaited": ("await_copies<STAGES - 2>()", "await_copies<STAGES - 1>()", "late"),
    "copies into memory in use": ("(s + STAGES - 1) % STAGES", "(s + STAGES) % STAGES", "at once"),
    "everything in one bank": ("(piece ^ (row >> 1 & 3))", "piece", "at once"),
    "a filter too many": ("filter < plan->filters && k < length;", "k < length;", "at once"),
    "a pixel beyond the map": ("w < window.width;", "w <= window.width;", "at once"),
    "a pixel too many": ("pixel >= plan->images * plan->output_pixels || ", "", "at once"),
    "half a shortcut": ("second += added.second", "second += added.first", "at once"),
    "not rounded": ("words[i] = round_tf32(words[i])", "(void)words", "at once"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_emulator_sees_mistakes(mistake, here, monkeypatch, tmp_path):
    """Were it blind, the tests above would prove nothing."""
    right, wrong, worst = MISTAKES[mistake]
    source = (emulated.SOURCES / implicit.FILE).read_text()
    assert source.count(right) == 1
    (tmp_path / implicit.FILE).write_text(source.replace(right, wrong))
    emulator = emulated.compiled(tmp_path, implicit.FILE)
    monkeypatch.setattr(cuda, "_kernel", lambda *names: emulated.kernel(*names, emulator=emulator))
    emulator.choose(*map(int, WORST[worst]))
    geometry = Geometry(((13, 7),), *SAME)
    x, weight, _, _, more = narrowed(arrays(geometry, 2, 40, 24), "tf32")
    exact = wide(round_tf32(x)), wide(round_tf32(weight)), None, None, wide(more)
    want = definition.convolve(*exact, False, geometry, {})
    with pytest.raises(AssertionError):
        y = implicit.convolve(x, weight, None, None, more, False, geometry, {})
        within("y", y, want, 360, (x, weight), BOUND["float32"])
        assert emulator.conflicts() == 0


# --- which of them runs -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("tf32", [True, False])
def test_which_version_runs(kind, tf32, here, monkeypatch):
    monkeypatch.setattr(backend, "library", lambda x: "cupy")
    monkeypatch.setattr(backend, "_tf32", tf32)
    dtype = np.dtype({"bfloat16": "uint16"}.get(kind, kind))

    def chosen(size=(3, 3), stride=(1, 1), padding=(1, 1), C=64, F=64, groups=1):
        geometry = Geometry(((32, 40), (16, 20)), size, stride, padding, groups=groups)
        shapes = (2, geometry.pixels, C), (F, *size, C // groups), (2, geometry.output_pixels, F)
        x, weight, gy = (np.zeros(shape, dtype) for shape in shapes)
        arguments = (x, weight, None, None, None, True, geometry, {}), (gy, weight, geometry, {}), (x, gy, geometry)
        names = [kernel.choose(*each)[0] for kernel, each in zip(KERNELS, arguments, strict=True)]
        assert len(set(names)) == 1
        return names[0].removeprefix("cupy:")

    rest = "implicit" if kind == "bfloat16" or (kind == "float32" and tf32) else "im2col"
    assert chosen() == ("im2col" if kind == "float64" else "shift")
    assert chosen(size=(1, 1), padding=(0, 0)) == chosen(stride=(2, 2)) == chosen((7, 7), (2, 2), (3, 3), C=3) == rest
    assert chosen(F=36) == ("shift" if kind == "float32" else rest)
    assert chosen(groups=4) == "textbook"
    with only("im2col"):
        assert chosen() == "im2col"
    with only("implicit"):
        assert chosen() == ("implicit" if rest == "implicit" else "textbook")
    monkeypatch.setattr(cuda, "capability", lambda device: 75)
    assert chosen(stride=(2, 2)) == "im2col"


# --- compilers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90"])
@pytest.mark.parametrize("file", [implicit.FILE, shift.FILE])
def test_nvcc_compiles_and_keeps_everything_in_registers(file, architecture, tmp_path):
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("needs nvcc to compile the CUDA kernels")
    command = [compiler, "-std=c++17", f"-arch={architecture}", "-cubin", "-ftz=true", "-Xptxas", "-v"]
    done = subprocess.run(
        [*command, "-Werror", "all-warnings", "-o", str(tmp_path / "kernels.cubin"), str(emulated.SOURCES / file)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    spills = [line for line in done.stderr.splitlines() if "spill" in line]
    assert len(spills) == 4
    assert all("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in line for line in spills), done.stderr


def nvrtc():
    """CUDA's compiler at run time, which CuPy uses; the test is skipped where it is not installed."""
    installed = [path for folder in sys.path for path in Path(folder).glob("nvidia/*/lib/libnvrtc.so.*")]
    for name in (*map(str, installed), "libnvrtc.so.13", "libnvrtc.so.12"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    pytest.skip("needs NVRTC to compile the CUDA kernels as CuPy does: pip install nvidia-cuda-nvrtc")


@pytest.mark.parametrize("architecture", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90"])
@pytest.mark.parametrize("file", [implicit.FILE, shift.FILE])
def test_nvrtc_compiles_as_cupy_asks_it_to(file, architecture):
    compiler, program = nvrtc(), ctypes.c_void_p()
    source = (emulated.SOURCES / file).read_bytes()
    assert compiler.nvrtcCreateProgram(ctypes.byref(program), source, file.encode(), 0, None, None) == 0
    added = b"-ftz=true", b"--device-as-default-execution-space"
    options = [b"-std=c++17", b"-arch=" + architecture.encode(), *added]
    failed = compiler.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    compiler.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    compiler.nvrtcGetProgramLog(program, log)
    assert not failed and not log.value, log.value.decode()


# --- on a device --------------------------------------------------------------------------------


@pytest.fixture
def on_device(monkeypatch):
    """`on_device(kind)` is CuPy's namespace and a function that moves arrays there as such numbers."""
    try:
        xp = backend.load("cupy")
    except RuntimeError as error:
        pytest.skip(str(error))
    before = backend.tf32()

    def prepare(kind):
        backend.use_tf32(kind == "tf32")
        single = np.float32 if kind != "float64" else np.float64
        narrow = pytest.importorskip("ml_dtypes").bfloat16 if kind == "bfloat16" else single
        return xp, lambda a: xp.asarray(a.astype(narrow if a.ndim > 1 else single))

    yield prepare
    backend.use_tf32(before)


def calls(x, weight, bias, scale, gy, geometry):
    """(name, kernel, arguments, terms in a sum, its factors) of the three kernels."""
    yield "y", convolve, (x, weight, bias, scale, gy, True, geometry, {}), geometry.taps * weight.shape[3], (x, weight)
    terms = geometry.taps * weight.shape[0] // geometry.groups
    yield "dx", convolve_input_gradient, (gy, weight, geometry, {}), terms, (gy, weight)
    yield "dw", convolve_weight_gradient, (x, gy, geometry), gy.shape[0] * gy.shape[1], (x, gy)


def hold_on_device(version, made, geometry, kind, reference):
    """Every kernel that has the version, against the definition in float64 on `reference`'s library."""
    ran = 0
    exact = [reference(backend.to_numpy(a).astype(np.float64)) for a in made]
    with only(version):
        pairs = zip(calls(*made, geometry), calls(*exact, geometry), strict=True)
        for (name, kernel, arguments, terms, factors), (_, _, wide_arguments, _, _) in pairs:
            chosen, run = kernel.choose(*arguments)
            if version is not None and chosen not in (version, f"cupy:{version}"):
                continue
            got = backend.to_numpy(run(*arguments)).astype(np.float64)
            want = backend.to_numpy(kernel.textbook(*wide_arguments))
            within(f"{name} by {chosen}", got, want, terms, map(backend.to_numpy, factors), BOUND[kind])
            ran += 1
    if not ran:
        pytest.skip(f"{version} does not do this")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("version", [None, "shift", "implicit", "im2col", "textbook"])
@pytest.mark.parametrize("case", GEOMETRIES)
def test_a_device_does_what_the_definition_says(case, version, kind, on_device):
    geometry, *sizes = GEOMETRIES[case]
    _, move = on_device(kind)
    hold_on_device(version, [move(a) for a in arrays(geometry, *sizes)], geometry, kind, lambda a: a)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("version", ["shift", "implicit", "im2col"])
def test_a_whole_pyramid_on_a_device(version, kind, on_device):
    """As large as in training, against the definition in float64 on the device."""
    xp, move = on_device(kind)
    geometry = Geometry(((100, 168), (50, 84), (25, 42), (13, 21), (7, 11)), *SAME)
    hold_on_device(version, [move(a) for a in arrays(geometry, 2, 256, 256)], geometry, kind, xp.asarray)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("version", ["shift", "implicit", "im2col"])
def test_a_device_gives_the_same_bits_again(version, kind, on_device):
    _, move = on_device(kind)
    geometry = Geometry(((25, 42), (13, 21)), *SAME)
    for _, kernel, arguments, *_ in calls(*[move(a) for a in arrays(geometry, 2, 64, 64)], geometry):
        with only(version):
            first, again = (backend.to_numpy(kernel(*arguments)) for _ in range(2))
        np.testing.assert_array_equal(first, again)
