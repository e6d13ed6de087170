"""Frozen dataclasses as JSON and back: what is stored in checkpoints and read from flags.

The dataclass is the schema.  Reading is strict: an unknown key is an error with a suggestion, never ignored,
so a misspelt setting cannot silently do nothing.
"""

from __future__ import annotations

import difflib
import json
import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

CLASS = "class"  # names a dataclass in its dictionary; no field can be called that
LARGEST = 1e30  # of a setting; float32, which weights are kept in, ends at 3e38


def to_json(value: Any) -> Any:
    """`value` as JSON types; a dataclass becomes a dictionary that also names its class."""
    if is_dataclass(value):
        return {CLASS: type(value).__name__} | {f.name: to_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_json(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a setting of type {type(value).__name__} cannot be stored: {value!r}")


def from_json(cls: type, data: Any, where: str = "") -> Any:
    """The dataclass `cls` that `to_json` made `data` from; absent keys take their defaults.

    Raises:
        ValueError: for an unknown key, a wrong type, or a missing key without default; it says where.
    """
    where = where or cls.__name__
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected a dictionary, got {data!r}")
    data = {key: value for key, value in data.items() if key != CLASS}
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls) if f.init]
    for key in data:
        if key not in known:
            raise ValueError(f"{where}: unknown setting {key!r}{_meant(key, known)}")
    for f in fields(cls):
        if f.init and f.name not in data and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{where}: the setting {f.name!r} is missing")
    return cls(**{key: _read(hints[key], value, f"{where}.{key}") for key, value in data.items()})


def _read(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotation `hint` wants it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _read_one_of(arguments, value, where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where}: expected one of {', '.join(map(repr, arguments))}, got {value!r}")
        return value
    if origin is tuple and isinstance(value, list):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            arguments = (arguments[0],) * len(value)
        if len(arguments) == len(value):
            pairs = zip(arguments, value, strict=True)
            return tuple(_read(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(pairs))
    elif is_dataclass(hint):
        return from_json(hint, value, where)
    elif hint is float and type(value) in (int, float):
        if abs(value) < LARGEST:  # NaN is not
            return float(value)
        raise ValueError(f"{where}: expected a finite number, got {value!r}")
    elif hint is type(None) and value is None:
        return None
    elif type(value) is hint:  # not isinstance: True is no int here
        return value
    raise ValueError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")


def _read_one_of(choices: tuple, value: Any, where: str) -> Any:
    """A union: a dictionary says its class, anything else is the first choice it fits."""
    classes = {c.__name__: c for c in choices if is_dataclass(c)}
    if classes and isinstance(value, dict):
        kind = value.get(CLASS)
        if kind not in classes:
            raise ValueError(f"{where}: {CLASS} must be one of {', '.join(classes)}, got {kind!r}")
        return from_json(classes[kind], value, where)
    for choice in choices:
        try:
            return _read(choice, value, where)
        except ValueError:
            continue
    names = " or ".join(getattr(c, "__name__", str(c)) for c in choices)
    raise ValueError(f"{where}: expected {names}, got {value!r}")


def assign(tree: dict[str, Any], setting: str) -> None:
    """Put "NAME.NAME=VALUE" into what `to_json` made of a dataclass; VALUE is JSON, or else a bare word.

    Raises:
        ValueError: if it has not this form, or there is no such setting.
    """
    name, equals, text = setting.partition("=")
    if not equals:
        raise ValueError("expected NAME=VALUE")
    *path, last = name.split(".")
    place = tree
    for n, key in enumerate([*path, last], start=1):
        if not isinstance(place, dict) or key not in place:
            whole = ".".join([*path, last][:n])
            raise ValueError(f"there is no {whole!r}{_meant(key, place)}")
        if n <= len(path):
            place = place[key]
    try:
        place[last] = json.loads(text)
    except json.JSONDecodeError:
        place[last] = text


def _meant(key: str, known: Any) -> str:
    """What to say of a key that is not among the `known`, which may be no collection at all."""
    known = [name for name in known if name != CLASS] if isinstance(known, (dict, list)) else []
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}" if known else ""


def differences(old: Any, new: Any) -> list[str]:
    """The settings in which two JSON values differ, one "path: old -> new" a line."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in old | new:
            for line in differences(old.get(key), new.get(key)):
                lines.append(f"{key}.{line}" if isinstance(old.get(key), dict) else f"{key}{line}")
        return lines
    return [] if old == new else [f": {old!r} -> {new!r}"]
