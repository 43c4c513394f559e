"""Fitted tables of encodings: a small artefact of a cache that is committed before any shard and never changes."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fcache.cache_spec.commits import each_commit
from fcache.cache_spec.encodings import find_encoding
from fcache.cache_spec.errors import CorruptError, IncompatibleError
from fcache.cache_spec.identity import canonical_json, digest, from_json, to_json
from fcache.cache_spec.layout import FEATURES, Group, Manifest
from fcache.cache_spec.spec import LevelSpec
from fcache.cache_spec.storage.protocol import Storage
from fcache.cache_spec.store import GROUP_NODE

FOLDER = "tables"
COMMIT = "commits/tables.json"
Tables = Mapping[str, Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class FittedTables:
    """Tables by level and name, float32 arrays, and the digest of their commit, which feature commits carry.

    Without tables, because nothing is fitted or because they are not committed yet, the digest is "".
    """

    levels: Tables = field(default_factory=dict)
    digest: str = ""

    def __bool__(self) -> bool:
        return bool(self.digest)


@dataclass(frozen=True)
class _Commit:
    """What commits/tables.json says: for which features, from which samples ("group/id"), and (bytes, SHA-256) a file.

    `encoding` names what was fitted; encodings that differ in their step have equal tables.
    """

    key: str
    encoding: str
    samples: tuple[str, ...]
    files: Mapping[str, tuple[int, str]]


def fitted_groups(manifest: Manifest) -> tuple[Group, ...]:
    """The groups whose encoding needs tables."""
    return tuple(g for g in manifest.groups if find_encoding(g.encoding).fit is not None)


def fitted_levels(manifest: Manifest) -> dict[str, LevelSpec]:
    """The levels that need tables by name, with the sizes of the first group that has them."""
    return {level.name: level for group in reversed(fitted_groups(manifest)) for level in group.levels}


def write_tables(storage: Storage, manifest: Manifest, tables: Tables, *, samples: tuple[str, ...]) -> FittedTables:
    """Commits tables that were fitted to these samples; call it under the cache's lock.

    Tables that are committed already stay, and are returned. Raises as `read_tables`, and CorruptError if shards are
    coded with tables that are gone.
    """
    if found := read_tables(storage, manifest):
        return found
    for group in fitted_groups(manifest):
        if next(each_commit(storage, group.path, FEATURES), None) is not None:
            raise _damaged(storage, f"it is missing, and shards of {group.path!r} are coded with its tables")
    files: dict[str, bytes] = {f"{FOLDER}/zarr.json": canonical_json(GROUP_NODE)}
    for level in fitted_levels(manifest):
        files[f"{FOLDER}/{level}/zarr.json"] = canonical_json(GROUP_NODE)
        for name, table in tables[level].items():
            array = np.asarray(table, dtype="<f4", order="C")
            files[f"{FOLDER}/{level}/{name}/zarr.json"] = canonical_json(_metadata(array.shape))
            files[_data_file(level, name, array.ndim)] = array.tobytes()
    for name, data in files.items():
        storage.write(name, data)
    entries = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in sorted(files.items())}
    body = to_json(_Commit(manifest.features.key, fitted_groups(manifest)[0].encoding, samples, entries))
    storage.write(COMMIT, canonical_json({**body, "digest": digest(body)}))
    return read_tables(storage, manifest)


def read_tables(storage: Storage, manifest: Manifest) -> FittedTables:
    """The committed tables of a cache; empty if none are needed, or not there yet.

    Raises CorruptError if the commit or a table is damaged or missing, IncompatibleError if they belong to other
    features.
    """
    levels = fitted_levels(manifest)
    if not levels:
        return FittedTables()
    try:
        commit, stated = _parse(storage, storage.read(COMMIT))
    except FileNotFoundError:
        return FittedTables()
    if commit.key != manifest.features.key:
        raise IncompatibleError(f"{storage.url}/{COMMIT} holds tables of other features; use another --cache")
    wanted = {(level, name): shape for level, name, shape in _expected(manifest, levels)}
    names = [_data_file(level, name, len(shape)) for (level, name), shape in wanted.items()]
    try:
        files = storage.read_many(names)
    except FileNotFoundError as e:
        raise _damaged(storage, f"{e}: a file that it names is missing") from None
    found: dict[str, dict[str, np.ndarray]] = {}
    for ((level, name), shape), file, data in zip(wanted.items(), names, files, strict=True):
        if commit.files.get(file) != (len(data), hashlib.sha256(data).hexdigest()):
            raise _damaged(storage, f"{file} was changed (its digest differs)")
        if len(data) != 4 * math.prod(shape):
            raise _damaged(storage, f"{file} has {len(data)} bytes, the level needs {4 * math.prod(shape)}")
        table = np.frombuffer(data, dtype="<f4").reshape(shape)
        if not np.isfinite(table).all():
            raise _damaged(storage, f"{file} holds numbers that are not finite")
        found.setdefault(level, {})[name] = table
    return FittedTables(found, stated)


def table_files(storage: Storage, manifest: Manifest) -> Mapping[str, tuple[int, str]]:
    """Every file of the committed tables with its bytes and SHA-256, to be checked or copied; none without tables."""
    if not fitted_levels(manifest):
        return {}
    try:
        return _parse(storage, storage.read(COMMIT))[0].files
    except FileNotFoundError:
        return {}


def _expected(manifest: Manifest, levels: Mapping[str, LevelSpec]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    fit = find_encoding(fitted_groups(manifest)[0].encoding).fit
    assert fit is not None, "a fitted group has a fitted encoding"
    for level, spec in levels.items():
        for name, shape in fit.shapes(spec).items():
            yield level, name, shape


def _data_file(level: str, name: str, axes: int) -> str:
    return f"{FOLDER}/{level}/{name}/{'.'.join(['c', *['0'] * axes])}"


def _parse(storage: Storage, data: bytes) -> tuple[_Commit, str]:
    try:
        body: Any = json.loads(data)
        stated = body.pop("digest")
        commit = from_json(_Commit, body)
        changed = stated != digest(body)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
        raise _damaged(storage, f"no commit of tables ({type(e).__name__}: {e})") from e
    if changed:
        raise _damaged(storage, "the commit was changed (its digest differs)")
    return commit, stated


def _damaged(storage: Storage, what: str) -> CorruptError:
    # Codes mean nothing without the tables they were made with, and a second fit would give other ones.
    return CorruptError(
        f"{storage.url}/{COMMIT}: {what}; restore {FOLDER}/ and {COMMIT} from a copy, or extract into a new --cache"
    )


def _metadata(shape: tuple[int, ...]) -> dict[str, Any]:
    """The zarr.json of a table: one plain chunk."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": "float32",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": "NaN",
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "attributes": {},
        "dimension_names": [None] * len(shape),
        "storage_transformers": [],
    }
