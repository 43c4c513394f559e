"""Checking a cache against its commits."""

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fcache.cache_spec.commits import Commit, commit_path, find_commit
from fcache.cache_spec.encodings import find_encoding
from fcache.cache_spec.errors import CorruptError, DataError, IncompatibleError
from fcache.cache_spec.layout import FEATURES, Group, Manifest, Shard, part_arrays
from fcache.cache_spec.shardfile import index_size, parse_index, shard_key
from fcache.cache_spec.storage.pieces import sha256_of
from fcache.cache_spec.storage.protocol import Storage, open_storage
from fcache.cache_spec.store import GROUP_NODE, ROOT, read_manifest, zarr_nodes
from fcache.cache_spec.tables import read_tables, table_files


@dataclass(frozen=True)
class Fault:
    """Something wrong with one part of one shard: "missing" (no commit yet) or "corrupt"; `what` says more."""

    group: str
    part: str
    shard: int
    kind: str
    what: str


@dataclass(frozen=True)
class Verified:
    """The result of a check: parts of shards that were expected and checked, bytes on disk, and faults."""

    parts: int
    committed: int
    bytes: int
    faults: tuple[Fault, ...]

    @property
    def corrupt(self) -> tuple[Fault, ...]:
        """Faults of committed shards."""
        return tuple(f for f in self.faults if f.kind == "corrupt")

    @property
    def missing(self) -> tuple[Fault, ...]:
        """Shards without a commit."""
        return tuple(f for f in self.faults if f.kind == "missing")


def verify(
    where: Path | str | Storage, *, deep: bool = False, report: Callable[[int, int], None] | None = None
) -> Verified:
    """Checks that every shard is committed, that its files are there, whole and of the stated size.

    `deep` reads every byte and compares digests. `report(done, total)` is called after each part of a shard.
    Raises CorruptError if the manifest itself is damaged.
    """
    storage = open_storage(where)
    manifest = read_manifest(storage)
    jobs = [(g, part, s) for g in manifest.groups for part in manifest.parts() for s in g.shards()]
    faults, tables = _table_faults(storage, manifest)
    faults += [*_metadata_faults(storage, manifest), *_stray_commits(storage, manifest)]
    committed, size = 0, 0
    # Two keep a disk busy; an object store answers after milliseconds, but many at once.
    with ThreadPoolExecutor(2 if storage.path() else 16) as pool:
        checks = pool.map(
            lambda job: _check(storage, *job, key=manifest.part_key(job[1]), tables=tables, deep=deep), jobs
        )
        for done, (commit, fault) in enumerate(checks, 1):
            if commit is not None:
                committed += 1
                size += sum(n for n, _ in commit.files.values())
            if fault is not None:
                faults.append(fault)
            if report is not None:
                report(done, len(jobs))
    return Verified(len(jobs), committed, size, tuple(faults))


def make_pending(where: Path | str | Storage, faults: Iterable[Fault]) -> int:
    """Removes the commits of corrupt shards, so that the next extraction writes them again; returns how many.

    Faults of metadata have no shard: opening the cache for writing restores what is not as written.
    """
    storage, removed = open_storage(where), 0
    for fault in faults:
        if fault.kind == "corrupt" and fault.shard >= 0:
            storage.remove(commit_path(fault.group, fault.part, fault.shard))
            removed += 1
    return removed


def _metadata_faults(storage: Storage, manifest: Manifest) -> list[Fault]:
    """Metadata other than what the manifest implies would make other zarr readers see other numbers, or none."""
    faults = []
    if _without(_read_json(storage, ROOT), "attributes") != _without(GROUP_NODE, "attributes"):
        faults.append(Fault("", FEATURES, -1, "corrupt", "zarr.json is not as written"))
    for group in manifest.groups:
        seen: set[str] = set()
        for part in manifest.parts():
            for path, expected in zarr_nodes(group, (part,)).items():
                if path in seen:
                    continue
                seen.add(path)
                found = _read_json(storage, f"{path}/{ROOT}")
                if not _same_node(found, expected, group.shard_records):
                    faults.append(Fault(group.path, part, -1, "corrupt", f"{path}/zarr.json is not as written"))
    return faults


def _table_faults(storage: Storage, manifest: Manifest) -> tuple[list[Fault], str | None]:
    """Damage of fitted tables and of their metadata, and the digest of the tables: None if they cannot be read."""

    def fault(what: str) -> Fault:
        return Fault("", FEATURES, -1, "corrupt", what)

    faults: list[Fault] = []
    try:
        tables = read_tables(storage, manifest)
        for name, (size, sha) in table_files(storage, manifest).items():
            if storage.size(name) != size or sha256_of(storage, name, size).hex() != sha:
                faults.append(fault(f"{name} was changed (its size or digest differs)"))
    except (CorruptError, DataError, IncompatibleError) as e:
        return [fault(str(e))], None
    except FileNotFoundError as e:
        return [fault(f"{e}: a file of the fitted tables is missing")], None
    return faults, tables.digest


def _stray_commits(storage: Storage, manifest: Manifest) -> Iterator[Fault]:
    """Commits of shards that the manifest does not have, unless they are valid: then the cache has just grown."""
    for group in manifest.groups:
        for part in manifest.parts():
            folder = commit_path(group.path, part, 0).rpartition("/")[0]
            for name in storage.names(folder):
                number = name.removesuffix(".json")
                if name == number or not number.isdecimal() or int(number) < group.num_shards:
                    continue
                try:
                    find_commit(storage, f"{folder}/{name}")
                except (CorruptError, DataError) as e:
                    yield Fault(group.path, part, int(number), "corrupt", str(e))


def _read_json(storage: Storage, name: str) -> dict[str, Any]:
    try:
        found = json.loads(storage.read(name))
    except (FileNotFoundError, CorruptError, DataError, ValueError, RecursionError) as e:
        return {"unreadable": str(e)}
    return found if isinstance(found, dict) else {"unreadable": "no object"}


def _same_node(found: dict[str, Any], expected: dict[str, Any], shard_records: int) -> bool:
    """Whether a node is as expected; a growth that was interrupted leaves arrays some shards longer."""
    if "shape" not in expected or not isinstance(found.get("shape"), list) or not found["shape"]:
        return _without(found) == _without(expected)
    length, *shape = found["shape"]
    more = length - expected["shape"][0] if type(length) is int else -1
    longer = 0 <= more < 2**53 and more % shard_records == 0
    return longer and _without({**found, "shape": shape}) == _without({**expected, "shape": expected["shape"][1:]})


def _without(node: dict[str, Any], name: str = "") -> str:
    """A node as text, without one field: as values, true would equal 1."""
    return json.dumps({k: v for k, v in node.items() if k != name}, sort_keys=True)


def _check(
    storage: Storage, group: Group, part: str, shard: Shard, *, key: str, tables: str | None, deep: bool
) -> tuple[Commit | None, Fault | None]:
    def fault(kind: str, what: str) -> Fault:
        return Fault(group.path, part, shard.index, kind, what)

    try:
        commit = find_commit(storage, commit_path(group.path, part, shard.index))
    except (CorruptError, DataError) as e:
        return None, fault("corrupt", str(e))
    if commit is None:
        return None, fault("missing", "not committed")
    wanted = tables if part == FEATURES and find_encoding(group.encoding).fit is not None else ""
    if wanted is not None and commit.tables != wanted:
        return commit, fault("corrupt", "it was coded with other fitted tables than the cache has")
    if commit.key != key:
        return None, fault(
            "missing", "committed for other targets" if part != FEATURES else "committed with other settings"
        )
    arrays = part_arrays(group, part)
    expected = {f"{group.path}/{path}/{shard_key(spec, shard.index)}": spec for path, spec in arrays.items()}
    if set(expected) != set(commit.files) or not commit.fits(shard, group.ids):
        return commit, fault("corrupt", "the commit does not fit the manifest")
    for name, (size, sha) in commit.files.items():
        try:
            found = storage.size(name)
            if found != size:
                return commit, fault("corrupt", f"{name} has {found} bytes, its commit says {size}")
            if expected[name].layout == "sharded":
                tail = np.empty(min(size, index_size(group.shard_records)), dtype=np.uint8)
                storage.read_ranges([(name, size - len(tail), tail)])
                parse_index(tail.tobytes(), group.shard_records, size, name)
            if deep and sha256_of(storage, name, size).hex() != sha:
                return commit, fault("corrupt", f"{name} does not hold what its commit says (SHA-256 differs)")
        except FileNotFoundError:
            return commit, fault("corrupt", f"{name} is missing")
        except (CorruptError, DataError) as e:
            return commit, fault("corrupt", str(e))
    return commit, None
