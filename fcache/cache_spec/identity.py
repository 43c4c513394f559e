"""Canonical JSON and SHA-256 digests of frozen dataclasses: what names a cache."""

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from fcache.cache_spec.errors import SpecError

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """`value` (dataclasses, mappings, sequences, scalars) as plain JSON data; Raises SpecError for anything else."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
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


def from_json(cls: type[T], data: Any) -> T:
    """The dataclass `cls` rebuilt from what `to_json` gave. Raises SpecError if a field is missing or unknown."""
    return typing.cast(T, _build(cls, data))


def _build(kind: Any, data: Any) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        names = {f.name for f in dataclasses.fields(kind)}
        if not isinstance(data, Mapping) or set(data) - names:
            found = sorted(set(data) - names) if isinstance(data, Mapping) else data
            raise SpecError(f"{kind.__name__} has the fields {sorted(names)}, found {found}")
        required = {
            f.name
            for f in dataclasses.fields(kind)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        if missing := required - set(data):
            raise SpecError(f"{kind.__name__} lacks the fields {sorted(missing)}")
        return kind(**{name: _build(hints[name], value) for name, value in data.items()})
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if data is None:
            return None
        return _build(next(a for a in args if a is not type(None)), data)
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_build(args[0], v) for v in data)
        return tuple(_build(a, v) for a, v in zip(args, data, strict=True))
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return {k: _build(args[1], v) for k, v in data.items()}
    return data


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
