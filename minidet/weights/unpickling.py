"""A pickle is a program; of its instructions, those that tensors need are carried out, every other is refused."""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

from minidet.weights.tensors import BUILDERS, KEYS, Dtype, Name, Rebuilt, Storage, WeightsError

MOST_STEPS = 5_000_000  # instructions: a ResNet-101 with its optimizer has some 50,000
INSTEAD = (
    "nothing was run. Weights are plain tensors: where you trust this file, load it with the program that wrote it "
    "and save the state dict alone, torch.save(model.state_dict(), FILE)"
)

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list}
VALUES = set(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
"""Instructions that carry what they push."""


def unpickle(stream: BinaryIO, storages: dict[str, Storage] | None = None) -> Any:
    """What the pickle at the stream's position describes; the stream then stands behind it.

    Containers, texts and numbers come as they are, tensors and arrays as `Strided` and `Rebuilt`, whose bytes
    nobody has read yet.  `storages`, if given, receives every storage that is named.

    No name is ever imported, and nothing of the file's is called: a name is looked up among the few of
    `BUILDERS`, before anything is done with it.

    Raises:
        WeightsError: for any other name or instruction, and if the pickle is damaged.
    """
    machine = _Machine(storages)
    operations = pickletools.genops(stream)
    for step in range(MOST_STEPS):
        try:
            operation, argument, _ = next(operations)
        except (ValueError, StopIteration) as error:
            raise WeightsError(f"damaged or truncated: its pickle ends early, or is none ({error})") from error
        try:
            if operation.name == "STOP":
                return machine.pop()
            machine.run(operation.name, argument)
        except LookupError as error:  # a stack or a memo without what the instruction needs
            raise WeightsError(f"damaged: instruction {step} of its pickle, {operation.name}, has no sense") from error
    raise WeightsError(f"a pickle of more than {MOST_STEPS:,} instructions: no weights need so many")


class _Machine:
    """The stack machine that a pickle is written for."""

    def __init__(self, storages: dict[str, Storage] | None):
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages = {} if storages is None else storages

    def pop(self) -> Any:
        """The topmost value; never one below the last mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise IndexError
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        """All values above the last mark, which goes too."""
        start = self.marks.pop()
        values, self.stack[start:] = self.stack[start:], []
        return values

    def run(self, name: str, argument: Any) -> None:
        """One instruction."""
        push = self.stack.append
        if name in VALUES:
            push(argument)
        elif name in CONSTANTS:
            push(CONSTANTS[name])
        elif name in EMPTY:
            push(EMPTY[name]())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            push(tuple(reversed([self.pop() for _ in range(int(name[-1]))])))
        elif name.endswith("PUT") or name == "MEMOIZE":  # PUT, BINPUT, LONG_BINPUT
            self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]
        elif name.endswith("GET"):
            push(self.memo[argument])
        else:
            self.build(name, argument)

    def build(self, name: str, argument: Any) -> None:
        """One instruction that makes something of what is on the stack."""
        push = self.stack.append
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marks.append(len(self.stack))
            case "TUPLE":
                push(tuple(self.pop_mark()))
            case "LIST":
                push(self.pop_mark())
            case "DICT":
                push(_filled({}, self.pop_mark()))
            case "APPEND" | "APPENDS":
                items = [self.pop()] if name == "APPEND" else self.pop_mark()
                _of_type(list, self.stack[-1]).extend(items)
            case "SETITEM" | "SETITEMS":
                pairs = [self.pop(), self.pop()][::-1] if name == "SETITEM" else self.pop_mark()
                _filled(_of_type(dict, self.stack[-1]), pairs)
            case "GLOBAL":
                push(_named(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                last, module = _of_type(str, self.pop()), _of_type(str, self.pop())
                push(_named(f"{module}.{last}"))
            case "BINPERSID":
                storage = Storage.of(self.pop())
                push(self.storages.setdefault(storage.key, storage))
                if self.storages[storage.key] != storage:
                    raise WeightsError(f"damaged: its storage {storage.key} is described in two ways")
            case "REDUCE":
                arguments, function = _of_type(tuple, self.pop()), self.pop()
                push(_called(function, arguments))
            case "BUILD":
                state, target = self.pop(), self.stack[-1]
                if isinstance(target, Dtype | Rebuilt):
                    target.build(state)
                elif type(target) is not dict or type(state) is not dict:  # an OrderedDict's attributes: not needed
                    raise WeightsError(f"sets the attributes of a {type(target).__name__}; {INSTEAD}")
            case _:
                asked = f" ({str(argument)[:80]})" if argument is not None else ""
                raise WeightsError(f"holds the pickle instruction {name}{asked}, which no tensor needs; {INSTEAD}")


def _named(name: str) -> Name:
    if name not in BUILDERS:
        raise WeightsError(f"asks for {name[:80]!r}, which no tensor needs; {INSTEAD}")
    return Name(name)


def _called(function: Any, arguments: tuple) -> Any:
    builder = BUILDERS[function.name] if isinstance(function, Name) else None
    if builder is None:
        what = function.name if isinstance(function, Name) else f"a {type(function).__name__}"
        raise WeightsError(f"calls {what}, which is nothing to call; {INSTEAD}")
    try:
        return builder(*arguments)
    except TypeError as error:  # of the call itself: a builder checks what it is given
        raise WeightsError(f"damaged: {function.name} with arguments it does not take") from error


def _of_type(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise WeightsError(f"damaged: a {type(value).__name__} where a pickle needs a {kind.__name__}")
    return value


def _filled(target: dict, pairs: list) -> dict:
    """`target` with key, value, key, value ...; a key twice is nothing that a dict was ever saved as."""
    if len(pairs) % 2:
        raise WeightsError("damaged: a key without a value")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        if type(key) not in KEYS:  # hashing a deep tuple would recurse
            raise WeightsError(f"damaged: a {type(key).__name__} as a key")
        if key in target:
            raise WeightsError(f"damaged: the name {key!r} comes twice")
        target[key] = value
    return target
