"""Tensors as pickles describe them: a storage and a way to walk through it, checked before a byte is read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

BFLOAT16 = "bfloat16"  # which NumPy lacks: the upper half of a float32
STORAGES = {
    "DoubleStorage": "f8", "FloatStorage": "f4", "HalfStorage": "f2", "BFloat16Storage": BFLOAT16,
    "LongStorage": "i8", "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1",
    "ByteStorage": "u1", "BoolStorage": "b1",
}  # fmt: skip
"""torch's classes of storages, and what an element is."""
KEYS = (str, int, float, bool, bytes, type(None))
"""Types of a dict's keys."""
MOST_AXES = 32


class WeightsError(ValueError):
    """A file whose weights cannot be used; the message names it and says why."""


@dataclass(frozen=True)
class Name:
    """A name that a pickle asked for and may have; only `BUILDERS` knows what it stands for."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A flat run of elements, kept elsewhere in the file under a key."""

    key: str
    element: str
    count: int

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return 2 if self.element == BFLOAT16 else np.dtype(self.element).itemsize

    @classmethod
    def of(cls, identity: Any) -> Storage:
        """What torch writes in place of a storage: ("storage", class, key, device, count[, view])."""
        match identity:
            case ("storage", Name(name), str(key), str(), int(count), *view) if view in ([], [None]):
                element = STORAGES.get(name.removeprefix("torch."))
                if element and _counts(count):
                    return cls(key, element, count)
        raise WeightsError("damaged: a storage without kind, key and number of elements, or a view into another one")

    def values(self, content: Any, little: bool) -> np.ndarray:
        """All elements, from the bytes that are the storage's."""
        if len(content) != self.count * self.itemsize:
            raise WeightsError(
                f"damaged: storage {self.key} has {len(content):,} bytes for {self.count:,} elements of {self.itemsize}"
            )
        return elements(content, self.element, "<" if little else ">")


def elements(content: Any, element: str, order: str) -> np.ndarray:
    """Bytes as a flat array in this machine's byte order; bfloat16 becomes float32."""
    array = np.frombuffer(content, np.dtype("u2" if element == BFLOAT16 else element).newbyteorder(order))
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return (array.astype(np.uint32) << 16).view(np.float32) if element == BFLOAT16 else array


def _counts(*numbers: Any) -> bool:
    """Whether all are numbers of elements; whatever else a pickle holds is not even printed, being its to choose."""
    return all(type(number) is int and 0 <= number < 2**48 for number in numbers)


@dataclass(frozen=True)
class Strided:
    """A torch tensor: where in its storage it begins, and how far apart its elements are along each axis."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.strides) or len(self.shape) > MOST_AXES:
            raise WeightsError(f"damaged: a tensor of {len(self.shape)} axes with {len(self.strides)} strides")
        if not _counts(self.offset, *self.shape, *self.strides):
            raise WeightsError("damaged: a tensor whose shape, strides or offset are negative, absurd or no integers")
        end = self.offset + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True)) + 1
        if self.size > self.storage.count or (self.size and end > self.storage.count):
            raise WeightsError(
                f"damaged: a tensor of shape {self.shape} and strides {self.strides} from {self.offset} on "
                f"does not lie in its storage of {self.storage.count:,} elements"
            )

    @property
    def size(self) -> int:
        """How many elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """As a NumPy array."""
        return self.size * (4 if self.storage.element == BFLOAT16 else self.storage.itemsize)

    def array(self, values: np.ndarray) -> np.ndarray:
        """The tensor, from all elements of its storage."""
        if not self.size:
            return np.empty(self.shape, values.dtype)
        steps = [stride * values.itemsize for stride in self.strides]
        # Inside the storage, as __post_init__ has made sure.
        return np.array(np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, steps), order="C")


@dataclass
class Dtype:
    """NumPy's description of an element."""

    element: str
    order: str = "="

    def build(self, state: Any) -> None:
        """(version, byte order, three Nones, -1, -1, flags), as NumPy pickles it."""
        match state:
            case (_, "<" | ">" | "=" | "|" as order, None, None, None, -1, -1, _):
                self.order = order
            case _:
                raise WeightsError("damaged: an element type of NumPy's with parts")


@dataclass
class Rebuilt:
    """A NumPy array, once it was described."""

    values: np.ndarray | None = None

    def build(self, state: Any) -> None:
        """(version, shape, element type, column by column?, bytes), as NumPy pickles it."""
        match state:
            case (int(), tuple(shape), Dtype() as dtype, bool(columns), bytes() | bytearray() | str() as content):
                if type(content) is str:  # from Python 2
                    content = content.encode("latin1")
                self.values = _array(content, dtype, shape, "F" if columns else "C")
            case _:
                raise WeightsError("damaged: an array of NumPy's without shape, element type and bytes")


def _array(content: bytes, dtype: Dtype, shape: Any, order: str) -> np.ndarray:
    if type(shape) is not tuple or len(shape) > MOST_AXES or not _counts(*shape):
        raise WeightsError("damaged: an array whose shape is negative, absurd or no integers")
    itemsize = np.dtype(dtype.element).itemsize
    if math.prod(shape) * itemsize != len(content):
        raise WeightsError(f"damaged: an array of shape {shape} with {len(content):,} bytes for elements of {itemsize}")
    return elements(content, dtype.element, dtype.order).reshape(shape, order=order)


# What names stand for.  Each takes what the pickle gives and trusts nothing of it.


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Strided:
    if not isinstance(storage, Storage) or type(shape) is not tuple or type(strides) is not tuple or len(rest) > 3:
        raise WeightsError("damaged: a tensor without storage, shape and strides")
    return Strided(storage, offset, shape, strides)


def _parameter(tensor: Any, requires_grad: Any, hooks: Any) -> Strided:
    if not isinstance(tensor, Strided):
        raise WeightsError("damaged: a parameter that is no tensor")
    return tensor


def _encoded(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise WeightsError("damaged: bytes that are no latin1 text")
    return text.encode("latin1")


def _dtype(element: Any, *flags: Any) -> Dtype:
    if type(element) is not str or not re.fullmatch(r"f[248]|[iu][1248]|b1", element) or len(flags) > 2:
        what = element[:20] if type(element) is str else type(element).__name__
        raise WeightsError(f"holds arrays of {what!r}: only floating-point numbers, integers and bools are read")
    return Dtype(element)


def _empty(kind: Any, shape: Any, element: Any) -> Rebuilt:
    return Rebuilt()


def _buffer(content: Any, dtype: Any, shape: Any, order: Any) -> Rebuilt:
    if not isinstance(content, bytes | bytearray) or not isinstance(dtype, Dtype) or order not in ("C", "F"):
        raise WeightsError("damaged: an array of NumPy's without bytes and element type")
    return Rebuilt(_array(bytes(content), dtype, shape, order))


def _scalar(dtype: Any, content: Any) -> Any:
    return _buffer(content.encode("latin1") if type(content) is str else content, dtype, (), "C").values.item()


def _mapping(pairs: Any = ()) -> dict:
    items = pairs.items() if type(pairs) is dict else pairs
    if not isinstance(items, list | tuple | type({}.items())):
        raise WeightsError("damaged: a dict of no pairs")
    if any(type(pair) not in (list, tuple) or len(pair) != 2 or type(pair[0]) not in KEYS for pair in items):
        raise WeightsError("damaged: a dict of no pairs")
    return dict(items)


BUILDERS: dict[str, Callable[..., Any] | None] = {
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "_codecs.encode": _encoded,
    "__builtin__.bytes": lambda: b"",  # how empty bytes are pickled; any argument is refused
    "numpy.ndarray": None,
    "numpy.dtype": _dtype,
}
"""Every name that a pickle may ask for, and what makes what it stands for; None: it is only mentioned."""
BUILDERS |= {f"torch.{name}": None for name in STORAGES}
for _core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    BUILDERS |= {f"{_core}.multiarray._reconstruct": _empty, f"{_core}.multiarray.scalar": _scalar}
    BUILDERS |= {f"{_core}.numeric._frombuffer": _buffer}
