"""Canonical JSON and SHA-256 digests of frozen dataclasses: what names a cache."""

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import PurePath
from typing import Any, TypeVar

from fcache.cache_spec.errors import SpecError
from fcache.cache_spec.names import Names

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """`value` (dataclasses, mappings, sequences, scalars) as plain JSON data; Raises SpecError for anything else."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, Names)):
        return [to_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise SpecError(f"an identity holds finite numbers only, got {value}")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise SpecError(f"{type(value).__name__} cannot be part of an identity")


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces: equal values give equal bytes."""
    text = json.dumps(to_json(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    try:
        return text.encode()
    except UnicodeEncodeError as e:
        # What the file system gives for a name that is not UTF-8.
        raise SpecError(f"{text[max(0, e.start - 40) : e.end + 10]!r} is no valid Unicode; rename the file") from e


def digest(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def digest_of_data(value: Any) -> str:
    """`digest` of what is JSON data of strings and integers already."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def from_json(cls: type[T], data: Any) -> T:
    """The dataclass `cls` rebuilt from what `to_json` gave. Raises SpecError if a field is missing or unknown, or
    holds another type.
    """
    return typing.cast(T, _builder(cls)(data))


@cache
def _builder(kind: Any) -> Callable[[Any], Any]:
    """What makes a value of a type out of JSON data: it is found once, a cache of many shards has many commits."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind in (str, int, float, bool):
        return partial(_scalar, kind)
    if kind is Any:
        return _as_it_is
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints, fields = typing.get_type_hints(kind), dataclasses.fields(kind)
        absent = dataclasses.MISSING
        required = frozenset(f.name for f in fields if f.default is absent and f.default_factory is absent)
        return partial(_dataclass, kind, {f.name: _builder(hints[f.name]) for f in fields}, required)
    if origin in (typing.Union, types.UnionType):
        return partial(_optional, _builder(next(a for a in args if a is not type(None))))
    if origin is tuple and args[1:] == (Ellipsis,):
        return partial(_many, args[0], _builder(args[0]))
    if origin is tuple:
        return partial(_few, args, tuple(_builder(a) for a in args))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return partial(_mapping, _builder(args[1]))
    if isinstance(kind, type) and issubclass(kind, PurePath):
        return kind
    if kind is Names:
        return _names
    raise AssertionError(f"{kind} has no JSON form")


def _as_it_is(data: Any) -> Any:
    return data


def _scalar(kind: type, data: Any) -> Any:
    # By the very type: True is no number of shards, 2.0 none either.
    if type(data) is kind or (kind is float and type(data) is int):
        return data
    raise SpecError(f"{kind.__name__} expected, found {_shown(data)}")


def _optional(build: Callable[[Any], Any], data: Any) -> Any:
    return None if data is None else build(data)


def _names(data: Any) -> Names:
    return data if isinstance(data, Names) else Names.of(_many(str, _builder(str), data))


def _many(kind: Any, build: Callable[[Any], Any], data: Any) -> tuple[Any, ...]:
    if type(data) is not list and type(data) is not tuple:
        raise SpecError(f"a list is expected, found {_shown(data)}")
    return tuple(data) if set(map(type, data)) == {kind} and kind is str else tuple(map(build, data))


def _few(kinds: tuple[Any, ...], builders: tuple[Callable[[Any], Any], ...], data: Any) -> tuple[Any, ...]:
    if type(data) is list and tuple(map(type, data)) == kinds:
        # Scalars of the right types, as most are.
        return tuple(data)
    if (type(data) is not list and type(data) is not tuple) or len(data) != len(builders):
        raise SpecError(f"a list of {len(builders)} is expected, found {_shown(data)}")
    return tuple([build(v) for build, v in zip(builders, data, strict=True)])


def _mapping(build: Callable[[Any], Any], data: Any) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise SpecError(f"an object is expected, found {_shown(data)}")
    return {k: build(v) for k, v in data.items()}


def _dataclass(kind: Any, builders: Mapping[str, Callable[[Any], Any]], required: frozenset[str], data: Any) -> Any:
    if not isinstance(data, Mapping) or not data.keys() <= builders.keys():
        found = sorted(set(data) - set(builders)) if isinstance(data, Mapping) else _shown(data)
        raise SpecError(f"{kind.__name__} has the fields {sorted(builders)}, found {found}")
    if missing := required - data.keys():
        raise SpecError(f"{kind.__name__} lacks the fields {sorted(missing)}")
    return kind(**{name: builders[name](value) for name, value in data.items()})


def _shown(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 60 else f"{text[:57]}…"


def first_difference(expected: Any, found: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first field in which two JSON values differ, as (dotted name, expected, found), or None if equal."""
    expected, found = to_json(expected), to_json(found)
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted(set(expected) | set(found)):
            name = f"{path}.{key}" if path else key
            if key not in expected or key not in found:
                return name, expected.get(key, "absent"), found.get(key, "absent")
            if difference := first_difference(expected[key], found[key], name):
                return difference
        return None
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for i, (a, b) in enumerate(zip(expected, found, strict=True)):
            if difference := first_difference(a, b, f"{path}[{i}]"):
                return difference
        return None
    return None if expected == found else (path, expected, found)
