"""CuPy without a GPU: NumPy underneath, CuPy's strictness on top, and a count of what makes a host wait.

The array refuses what hides mistakes: implicit copies to the host, NumPy arrays as operands or indices, NumPy's
functions (which real CuPy would quietly carry out).  Kernels in CUDA run as they are, compiled by g++ for one
thread after the other (cuda_serial.h).  `array_api_compat.cupy` is the real one, on top of this.
"""

from __future__ import annotations

import contextlib
import importlib
import operator
import sys
import traceback
from types import ModuleType

import cuda_serial
import numpy as np
from fake_launches import Kernel, signatures
from fake_streams import ORDERS, Device, Event, MemoryPool, PinnedMemory, Stream, alloc_pinned_memory
from stand_ins import kernels_of_shift

FUNCTIONS = (
    "abs add all amax amin any arccos arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin argsort bincount "
    "bitwise_and bitwise_or bitwise_xor broadcast_arrays broadcast_to can_cast ceil clip concatenate conj copysign cos "
    "cosh count_nonzero cross cumprod cumsum diff divide equal exp expand_dims expm1 flatnonzero flip floor "
    "floor_divide greater greater_equal hypot imag invert isfinite isin isinf isnan left_shift less less_equal log "
    "log10 log1p log2 logaddexp logical_and logical_not logical_or logical_xor matmul matrix_transpose max maximum "
    "mean meshgrid min minimum moveaxis multiply negative nextafter nonzero not_equal outer permute_dims positive "
    "power prod real reciprocal remainder repeat reshape result_type right_shift roll round searchsorted sign signbit "
    "sin sinh sort sqrt square squeeze stack std subtract sum swapaxes take take_along_axis tan tanh tensordot tile "
    "transpose tril triu trunc unique var where"
).split()
CREATORS = "arange empty empty_like eye full full_like linspace ones ones_like zeros zeros_like".split()
PASSED_ON = (
    "bool_ complex128 complex64 complexfloating dtype e finfo float32 float64 floating iinfo inf int16 int32 int64 "
    "int8 integer intp isdtype issubdtype nan newaxis number pi signedinteger uint16 uint32 uint64 uint8 "
    "unsignedinteger"
).split()
OWN = "ndarray array asarray RawModule cuda linalg fft _core get_default_memory_pool".split()
NAMES = (*FUNCTIONS, *CREATORS, *PASSED_ON, *OWN)
"""All there is.  A test holds that real CuPy has each."""

UNKNOWN_SIZES = {"flatnonzero", "nonzero", "unique"}  # to make their result, CuPy must know what is in it
NO_BFLOAT16 = {"argsort", "at", "searchsorted", "sort", "unique", "where"}


class Counts:
    """Where in the package the host waited for the device, and where it sent something there."""

    def __init__(self):
        self.waits: list[str] = []
        self.uploads: list[str] = []

    def clear(self) -> None:
        self.waits.clear()
        self.uploads.clear()
        ORDERS.clear()


counts = Counts()
Event.waits = counts.waits


def _note(book: list[str], what: str) -> None:
    frames = [f for f in traceback.extract_stack() if "/minidet/" in f.filename and "backend.py" not in f.filename]
    place = f"{frames[-1].filename.rpartition('/minidet/')[2]}:{frames[-1].lineno}" if frames else "elsewhere"
    book.append(f"{what} at {place}")


def bare(value):
    """The NumPy array within; one that is not within is refused."""
    if isinstance(value, ndarray):
        return value._array
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}: an array on the host, of shape {value.shape}")
    if isinstance(value, list | tuple):
        return type(value)(map(bare, value))
    return value


def _dressed(value):
    if isinstance(value, np.ndarray | np.generic) and not isinstance(value, np.dtype):
        return ndarray(np.asarray(value))  # reductions give arrays without axes, not scalars
    if isinstance(value, list | tuple):
        return tuple(map(_dressed, value))
    return value


def _bfloat16(values) -> bool:
    return any(getattr(getattr(x, "dtype", None), "name", "") == "bfloat16" for x in values)


def _matmul(a, b):
    """As cuBLAS does it: bfloat16 stays what it is, and CuPy 14 has it only of two axes."""
    if not _bfloat16((a, b)):
        return np.matmul(a, b)
    if max(a.ndim, b.ndim) > 2:
        raise TypeError(f"a product of bfloat16 with {max(a.ndim, b.ndim)} axes: CuPy 14 takes it for integers")
    return np.matmul(a.astype(np.float32), b.astype(np.float32)).astype(np.promote_types(a.dtype, b.dtype))


def _refuse(name: str, args: tuple, kwargs: dict) -> None:
    """What NumPy would do, and CuPy 14.2 does not."""
    if kwargs.get("kind") not in (None, "stable"):
        raise ValueError(f"{name}: CuPy only sorts stably, and takes no other kind than that")
    if name in NO_BFLOAT16 and _bfloat16(args):
        raise TypeError(f"{name} of bfloat16: CuPy has none, or quietly makes it float32")


def _wrapped(function, *, name: str = ""):
    function = _matmul if name == "matmul" else function

    def call(*args, **kwargs):
        if name in UNKNOWN_SIZES:
            _note(counts.waits, name)
        _refuse(name, args, kwargs)
        result = _dressed(function(*bare(args), **{key: bare(value) for key, value in kwargs.items()}))
        if name == "empty" and result._array.dtype.kind in "fV":
            result._array.fill(np.nan)  # undefined, and seen to be
        return result

    if isinstance(function, np.ufunc) and function.nin == 2:
        call.at = _wrapped(function.at, name="at")
    call.__name__ = name
    return call


class ndarray:  # noqa: N801  as CuPy calls it
    """An array that is on the device, so to speak."""

    __slots__ = ("_array",)
    __hash__ = None

    def __init__(self, array: np.ndarray):
        self._array = array

    base, shape, ndim, size, dtype, flags, strides, nbytes, itemsize = (
        property(lambda self, name=name: getattr(self._array, name))
        for name in ("base", "shape", "ndim", "size", "dtype", "flags", "strides", "nbytes", "itemsize")
    )

    @property
    def device(self):
        return Device()

    def __len__(self) -> int:
        return len(self._array)

    # What waits.

    def get(self) -> np.ndarray:
        _note(counts.waits, "get")
        return self._array.copy()

    def _waits(name, function):  # noqa: N805
        def method(self, *args):
            _note(counts.waits, name)
            return function(self._array, *args)

        return method

    item, tolist = _waits("item", lambda a: a.item()), _waits("tolist", lambda a: a.tolist())
    __bool__, __float__ = _waits("bool", bool), _waits("float", lambda a: float(a.item()))
    __int__, __repr__ = _waits("int", lambda a: int(a.item())), _waits("repr", repr)

    # What is refused.

    def __array__(self, *_args, **_kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed.  Use `.get()`")

    def __array_ufunc__(self, ufunc, method, *inputs, **_):
        raise TypeError(f"np.{ufunc.__name__} of an array on a device, with {[type(x).__name__ for x in inputs]}")

    def __array_function__(self, function, *_):
        raise TypeError(f"np.{function.__name__} of an array on a device: it would be carried out, and hide a mistake")

    # What is ordered.

    def __getitem__(self, key):
        return ndarray(np.asarray(self._array[_key(key)]))

    def __setitem__(self, key, value):
        self._array[_key(key)] = bare(value)

    def sum(self):
        return ndarray(np.asarray(self._array.sum()))

    def copy(self):
        return ndarray(self._array.copy())

    def astype(self, dtype, copy=True):
        return self if not copy and self.dtype == dtype else ndarray(self._array.astype(dtype))

    def set(self, arr, stream=None):
        assert isinstance(arr, np.ndarray) and (arr.dtype, arr.shape) == (self.dtype, self.shape)
        assert arr.flags.c_contiguous and self.flags.c_contiguous
        memory = arr
        while not isinstance(memory, PinnedMemory):  # of other memory, the host would wait for the copy
            memory = memory.base if isinstance(memory, np.ndarray) else memory.obj
        stream.order("copy", arr, lambda: self._array.__setitem__(..., arr))

    def reshape(self, *shape):
        return ndarray(self._array.reshape(*shape))

    def fill(self, value):
        self._array.fill(value)


def _key(key):
    for part in key if isinstance(key, tuple) else (key,):
        if isinstance(part, ndarray) and part.dtype == bool:
            _note(counts.waits, "a mask as an index")
    return bare(key)


def _operators() -> None:
    def binary(function):
        def method(self, other):
            if isinstance(other, np.ndarray):
                raise TypeError(f"Unsupported type {type(other)}: an operand on the host")
            if not isinstance(other, ndarray | int | float | np.generic):
                return NotImplemented
            return _dressed(function(self._array, bare(other)))

        return method

    def in_place(function):
        def method(self, other):
            function(self._array, bare(other), out=self._array, casting="same_kind")
            return self

        return method

    for name, ufunc in {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.true_divide, "pow": np.power,
        "floordiv": np.floor_divide, "mod": np.remainder, "and": np.bitwise_and, "or": np.bitwise_or,
        "xor": np.bitwise_xor, "matmul": _matmul,
    }.items():  # fmt: skip
        setattr(ndarray, f"__{name}__", binary(ufunc))
        setattr(ndarray, f"__r{name}__", binary(lambda a, b, f=ufunc: f(b, a)))
        if name != "matmul":
            setattr(ndarray, f"__i{name}__", in_place(ufunc))
    for name in ("lt", "le", "eq", "ne", "gt", "ge"):
        setattr(ndarray, f"__{name}__", binary(getattr(operator, name)))
    for f in (operator.neg, operator.abs, operator.invert, operator.pos):
        setattr(ndarray, f"__{f.__name__.strip('_')}__", lambda self, f=f: _dressed(f(self._array)))


_operators()
ndarray.__module__ = "cupy"


def array(obj, dtype=None, copy=True):
    if isinstance(obj, ndarray):
        return ndarray(np.array(obj._array, dtype=dtype, copy=copy))
    _note(counts.uploads, "upload")
    made = np.array(obj, dtype=dtype)
    if made.dtype.kind in "OSUMm" or not made.dtype.isnative:
        raise ValueError(f"Unsupported dtype {made.dtype}")
    return ndarray(made)


def asarray(obj, dtype=None):
    if isinstance(obj, ndarray):
        return obj if dtype is None or obj.dtype == dtype else obj.astype(dtype)
    return array(obj, dtype)


class RawModule:
    """CUDA's source, compiled for this CPU, to run a thread after the other; for the convolutions' there is NumPy."""

    def __init__(self, code=None, *, options=()):
        self._signatures = signatures(code, options)
        real = next((option for option in options if option.startswith("-DREAL=")), None)
        self._kernels = cuda_serial.compile(code, real) if real else kernels_of_shift(self._signatures)

    def get_function(self, name):
        kernel = self._kernels[name]
        return Kernel(self._signatures[name], lambda grid, block, args: kernel(grid, block, bare(args)), ndarray)


def _set_compute_type(dtype, kind) -> None:
    if np.dtype(dtype).char not in "efd" or kind not in range(8):
        raise ValueError(f"Unknown compute type: {kind} of {dtype}")


def _module(name: str, **attributes) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(attributes)
    return module


def modules() -> dict[str, ModuleType]:
    """Everything that `import cupy` brings, by name."""
    device = _module("cupy.cuda.device", Device=Device)
    runtime = _module("cupy.cuda.runtime", getDevice=lambda: 0)
    cuda = _module(
        "cupy.cuda", Device=Device, device=device, runtime=runtime, Stream=Stream, Event=Event,
        alloc_pinned_memory=alloc_pinned_memory, get_current_stream=lambda: Stream.null,
    )  # fmt: skip
    linalg = _module("cupy.linalg", **{n: _wrapped(getattr(np.linalg, n)) for n in ("norm", "solve", "inv", "lstsq")})
    fft = _module("cupy.fft", **{n: _wrapped(getattr(np.fft, n)) for n in ("fft", "ifft")})
    own = {"ndarray": ndarray, "array": array, "asarray": asarray, "RawModule": RawModule}
    own["get_default_memory_pool"] = MemoryPool
    core = _module("cupy._core", set_compute_type=_set_compute_type)
    own |= {"_core": core, "cuda": cuda, "linalg": linalg, "fft": fft}
    own |= {name: _wrapped(getattr(np, name), name=name) for name in (*FUNCTIONS, *CREATORS)}
    own |= {name: getattr(np, name) for name in PASSED_ON}
    cupy = _module("cupy", __version__="14.2.0", __path__=[], __all__=list(own), **own)
    return {"cupy": cupy, "cupy.cuda": cuda, "cupy.cuda.device": device, "cupy.linalg": linalg, "cupy.fft": fft}


@contextlib.contextmanager
def installed():
    """Inside, `import cupy` finds this; what was imported on top of another is put away until the end."""
    def ours(name):
        return name.partition(".")[0] == "cupy" or name.startswith("array_api_compat.cupy")

    before = {name: sys.modules.pop(name) for name in list(sys.modules) if ours(name)}
    sys.modules.update(_imported or modules())
    counts.clear()
    try:
        yield importlib.import_module("array_api_compat.cupy")
    finally:
        _imported.update({name: sys.modules.pop(name) for name in list(sys.modules) if ours(name)})
        sys.modules.update(before)


_imported: dict[str, ModuleType] = {}
