"""The cache reader: what is committed, and records of it."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fcache.cache_spec.arrays import ArraySpec
from fcache.cache_spec.block import SourceInfo
from fcache.cache_spec.commits import each_commit
from fcache.cache_spec.committed import Committed, gather
from fcache.cache_spec.encodings import find_encoding
from fcache.cache_spec.errors import CorruptError, IncompleteError, unknown_name
from fcache.cache_spec.identity import digest
from fcache.cache_spec.layout import FEATURES, Group, Manifest, part_arrays
from fcache.cache_spec.reading.access import ArrayAccess, OpenShards, ReadOptions
from fcache.cache_spec.reading.arrayfiles import ArrayFiles
from fcache.cache_spec.spec import LevelSpec
from fcache.cache_spec.storage.protocol import Storage, open_storage
from fcache.cache_spec.store import read_manifest
from fcache.cache_spec.tables import FittedTables, read_tables


@dataclass(frozen=True)
class GroupRecords:
    """The readable records of a group: numbers, views and sample positions, in record order."""

    group: Group
    records: np.ndarray
    views: np.ndarray
    samples: np.ndarray


class CacheReader:
    """An open cache. It writes nothing, and several threads may use it. Make one with `open_cache`."""

    def __init__(self, storage: Storage, *, allow_partial: bool, options: ReadOptions) -> None:
        self.storage = storage
        self.manifest: Manifest = read_manifest(storage)
        self.allow_partial = allow_partial
        self.options = options
        self._committed: dict[tuple[str, str], Committed] = {}
        self._access: dict[tuple[str, str], ArrayAccess] = {}
        self._shards = OpenShards(storage, options)
        self._fitted = FittedTables()
        self._lock = threading.RLock()

    @property
    def url(self) -> str:
        """The path or URL of the cache."""
        return self.storage.url

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(dict.fromkeys(g.split for g in self.manifest.groups))

    def committed(self, group: Group, part: str) -> Committed:
        """The valid commits of a part of a group, read once (see `refresh`)."""
        with self._lock:
            if (group.path, part) not in self._committed:
                commits = each_commit(self.storage, group.path, part)
                tables = self._tables().digest if find_encoding(group.encoding).fit is not None else ""
                self._committed[group.path, part] = gather(
                    self.manifest, group, part, commits, tables=tables, url=self.url
                )
            return self._committed[group.path, part]

    def refresh(self) -> None:
        """Looks again at what is committed."""
        with self._lock:
            self._committed.clear()
            self._access.clear()
            self._shards = OpenShards(self.storage, self.options)

    def missing(self, part: str = FEATURES, split: str | None = None) -> int:
        """How many shards of a part have no commit."""
        groups = self.manifest.groups if split is None else self.manifest.split(split)
        return sum(g.num_shards - len(self.committed(g, part)) for g in groups)

    def quarantined(self, split: str) -> dict[str, str]:
        """Samples that could not be used, with the reason."""
        found: dict[str, str] = {}
        for group in self.manifest.split(split):
            for part in self.manifest.parts():
                for samples in self.committed(group, part).quarantined.values():
                    found.update(samples)
        return found

    def require(self, split: str, kinds: Sequence[str] = ()) -> None:
        """Raises IncompleteError if shards of the features or of these kinds of target are missing."""
        for part in (FEATURES, *kinds):
            if kinds and part != FEATURES:
                self.manifest.target(part)
            if (n := self.missing(part, split)) and not self.allow_partial:
                total = sum(g.num_shards for g in self.manifest.split(split))
                raise IncompleteError(
                    f"{self.url}: {n} of {total} shards of split {split!r} ({part}) are not committed; run the same "
                    "`fcache extract` again to finish, or use --allow-partial"
                )

    def records(self, split: str, kinds: Sequence[str] = ()) -> list[GroupRecords]:
        """The records of a split whose features and targets of these kinds are committed, by group."""
        self.require(split, kinds)
        found = []
        for group in self.manifest.split(split):
            parts = [self.committed(group, part) for part in (FEATURES, *kinds)]
            table = _records_of(group, parts)
            if len(table):
                found.append(GroupRecords(group, *table.T.copy()))
        if not found:
            raise IncompleteError(f"{self.url}: no record of split {split!r} is committed yet")
        return found

    def access(self, group: Group, part: str, path: str) -> ArrayAccess:
        """Direct access to one array (its path on disk, relative to the group) of a part."""
        key = (group.path, path)
        with self._lock:
            if key not in self._access:
                arrays = part_arrays(group, part)
                if path not in arrays:
                    raise unknown_name("array", path, arrays)
                folder, committed = f"{group.path}/{path}", self.committed(group, part).files[path]
                files = ArrayFiles(self.storage, folder, arrays[path], group.shard_records, committed)
                self._access[key] = ArrayAccess(files, self._shards)
            return self._access[key]

    def tables(self, group: Group) -> Mapping[str, Mapping[str, np.ndarray]]:
        """The fitted tables of a group's encoding by level; none if it fits nothing. Raises CorruptError."""
        return self._tables().levels if find_encoding(group.encoding).fit is not None else {}

    def _tables(self) -> FittedTables:
        with self._lock:
            # Tables never change; only that there are none yet may.
            if not self._fitted:
                self._fitted = read_tables(self.storage, self.manifest)
            return self._fitted

    def read(self, group: str, path: str, record: int) -> np.ndarray:
        """One record of one array ("level-4", "index/to_view", "targets/semantic/map"), cut to its count if ragged.

        Raises SpecError for an array that the group lacks, IncompleteError for a record that is not committed.
        """
        g = self.manifest.group(group)
        part = path.split("/")[1] if path.startswith("targets/") else FEATURES
        access = self.access(g, part, path)
        found = access.read(record)
        if not access.spec.ragged:
            return found
        return found[: check_count(self.access(g, part, f"{path}.count").read(record), access.spec, record)]

    def info(self, split: str, *, kinds: Sequence[str] = (), levels: Sequence[LevelSpec] = ()) -> SourceInfo:
        """What a source over a split gives; the extent is the committed set."""
        groups = self.manifest.split(split)
        first = groups[0]
        common = levels or first.levels
        if len(groups) > 1:
            common = tuple(level.free() for level in common)
        shards = {
            g.path: sorted(set.intersection(*(set(self.committed(g, p)) for p in (FEATURES, *kinds)))) for g in groups
        }
        committed = [self.committed(g, FEATURES).content(i) for g in groups for i in shards[g.path]]
        extent: dict[str, Any] = {
            "split": split,
            "samples": sum(len(g.ids) for g in groups),
            "views": max(g.views for g in groups),
            "shards": {path: len(found) for path, found in shards.items()},
            "committed": digest([shards, committed]),
        }
        return SourceInfo(
            split=split,
            role=first.role,
            features=self.manifest.features,
            targets=self.manifest.targets,
            levels=tuple(common),
            canvas=first.canvas,
            random_weights=self.manifest.random_weights,
            extent=extent,
        )


def check_count(count: np.ndarray, spec: ArraySpec, record: int) -> int:
    """The used length of a ragged record. Raises CorruptError if its array cannot hold that many."""
    n = int(count)
    if not 0 <= n <= spec.shape[0]:
        raise CorruptError(
            f"{spec.path}.count is {n} for record {record}, at most {spec.shape[0]} fit; run `fcache verify`"
        )
    return n


def _records_of(group: Group, parts: Sequence[Committed]) -> np.ndarray:
    """Number, view and sample of the records int32 [n, 3] that all parts have, without those of quarantined samples."""
    common = np.full(group.num_shards, True)
    for part in parts:
        common &= np.isin(np.arange(group.num_shards), part.shards)
    found = [np.empty((0, 3), dtype=np.int32)]
    for e in group.extents:
        offsets = np.arange(e.count, dtype=np.int32)
        offsets = offsets[common[(e.first + offsets) // group.shard_records]]
        found.append(np.stack([e.first + offsets, np.full_like(offsets, e.view), e.sample + offsets], axis=1))
    table = np.concatenate(found)
    # An id is looked for in the shard that lacks it: it may be that of a sample of which other views are there.
    bad = {(shard, i) for part in parts for shard, samples in part.quarantined.items() for i in samples}
    if not bad:
        return table
    touched = np.isin(table[:, 0] // group.shard_records, [shard for shard, _ in bad])
    kept = ~touched
    for row in np.flatnonzero(touched):
        kept[row] = (int(table[row, 0]) // group.shard_records, group.ids[int(table[row, 2])]) not in bad
    return table[kept]


def open_cache(
    where: Path | str | Storage,
    *,
    allow_partial: bool = False,
    mode: str = "auto",
    ahead: str = "auto",
    check: str = "none",
) -> CacheReader:
    """Opens the cache at a path or an object-store URL (s3://bucket/prefix) for reading.

    `mode`, `ahead` and `check` are those of `ReadOptions`. A split is refused when it is read, if shards of it are
    missing, unless `allow_partial`. Raises SpecError, IncompatibleError or CorruptError.
    """
    options = ReadOptions(mode=mode, ahead=ahead, check=check)
    return CacheReader(open_storage(where), allow_partial=allow_partial, options=options)
