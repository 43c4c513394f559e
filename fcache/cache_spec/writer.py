"""The cache writer: whole shards, commit record last, nothing half-written that counts."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fcache.cache_spec.claims import Claims
from fcache.cache_spec.commits import Commit, commit_path, find_commit, run_facts, write_commit
from fcache.cache_spec.errors import CorruptError
from fcache.cache_spec.layout import FEATURES, Manifest, Shard, part_arrays
from fcache.cache_spec.shardfile import ShardFile, shard_key
from fcache.cache_spec.storage.protocol import Storage, open_storage
from fcache.cache_spec.store import committed_shards, create_or_grow
from fcache.cache_spec.view import View

# Records that wait for their digest: a few of the largest pyramids.
UNDIGESTED_BYTES = 128 << 20
Records = np.ndarray | Sequence[np.ndarray]


class CacheWriter:
    """An open cache that shards are written to; several processes may each have one on the same cache."""

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self.storage = storage
        self.manifest = manifest
        self.claims = Claims(storage)
        storage.sweep()

    def pending(self, part: str = FEATURES) -> list[Shard]:
        """The shards of a part that have no commit yet, in order."""
        found: list[Shard] = []
        for group in self.manifest.groups:
            done = committed_shards(self.storage, self.manifest, group.path, part)
            found += [s for s in group.shards() if s.index not in done]
        return found

    def samples(self, shard: Shard) -> tuple[str, ...]:
        """The sample ids of a shard's records, in record order."""
        return self.manifest.group(shard.group).ids[shard.sample : shard.sample + shard.count]

    def write(self, shard: Shard, part: str = FEATURES) -> "ShardWriter":
        """A writer for one part of one shard; commit or abort it."""
        return ShardWriter(self.storage, self.manifest, shard, part)

    def finish(self) -> None:
        """Removes what only a running extraction needs; call it when nothing is pending."""
        self.claims.clear(g.path for g in self.manifest.groups)
        self.storage.sweep()


class ShardWriter:
    """One part of one shard while it is written. Memory: what waits for its digest, and the small tables."""

    def __init__(self, storage: Storage, manifest: Manifest, shard: Shard, part: str) -> None:
        self._storage, self._shard, self._part = storage, shard, part
        self._group = manifest.group(shard.group)
        self._key = manifest.part_key(part)
        self._started = time.time()
        self._quarantined: dict[str, str] = {}
        self._seen: set[int] = set()
        self._files: dict[str, ShardFile] = {}
        self._arrays = part_arrays(self._group, part)
        # Two digest, one waits for the disk to begin.
        self._helpers = ThreadPoolExecutor(3, "fcache-digest")
        try:
            for path, spec in self._arrays.items():
                name = f"{shard.group}/{path}/{shard_key(spec, shard.index)}"
                self._files[path] = ShardFile(storage, name, spec, self._group.shard_records, self._helpers)
        except BaseException:
            self.abort()
            raise

    def append(self, positions: Sequence[int], arrays: Mapping[str, Records]) -> None:
        """Stores records at `positions` (0-based in the shard), in increasing order.

        `arrays` maps every array of the part (as in `Block.targets`, or level parts and index arrays) to one entry a
        record; count arrays follow from ragged entries. They are digested in the background: they must not change
        before the shard is committed.
        """
        named = {f"targets/{k}" if self._part != FEATURES else k: v for k, v in arrays.items()}
        wanted = {p for p in self._arrays if not p.endswith(".count")}
        assert set(named) == wanted, f"arrays {sorted(named)} given, {sorted(wanted)} expected"
        for path, records in named.items():
            spec, file = self._arrays[path], self._files[path]
            for position, record in zip(positions, records, strict=True):
                data = np.asarray(record)
                file.put(position, data)
                if spec.ragged:
                    self._files[f"{path}.count"].put(position, np.asarray(len(data), dtype=np.int32))
            file.digest()
        behind = sorted(self._files.values(), key=lambda f: f.undigested)
        while behind and sum(f.undigested for f in behind) > UNDIGESTED_BYTES:
            behind.pop().wait()
        self._seen.update(positions)

    def skip(self, position: int, reason: str) -> None:
        """Leaves a record out: its sample cannot be used."""
        self._quarantined[self._group.ids[self._shard.sample + position]] = reason
        self._seen.add(position)

    def commit(self, *, facts: Mapping[str, Any], fingerprint: Mapping[str, Any], tables: str = "") -> Commit:
        """Publishes the files, then writes the commit record. Every record must have been appended or skipped.

        `tables` is the digest of the fitted tables that the codes were made with.
        """
        assert self._seen == set(range(self._shard.count)), "a shard is committed whole"
        s = self._shard
        try:
            # Together: the disk then makes all of them durable in few of its own steps.
            with ThreadPoolExecutor(8, "fcache-sync") as pool:
                closed = list(pool.map(ShardFile.close, self._files.values()))
                files = {file.name: sizes for file, sizes in zip(self._files.values(), closed, strict=True)}
                commit = Commit(
                    group=s.group, part=self._part, shard=s.index, first=s.first, count=s.count, view=s.view,
                    ids=self._group.ids[s.sample : s.sample + s.count], key=self._key, files=files,
                    quarantined=self._quarantined, facts=facts, fingerprint=fingerprint, run=run_facts(self._started),
                    tables=tables,
                )  # fmt: skip
                self._retract(commit)
                list(pool.map(ShardFile.publish, self._files.values()))
        except BaseException:
            self.abort()
            raise
        write_commit(self._storage, commit)
        self._files.clear()
        self._helpers.shutdown()
        return commit

    def _retract(self, new: Commit) -> None:
        """Removes a commit of other content before its files are replaced: a kill in between leaves a pending shard."""
        name = commit_path(new.group, new.part, new.shard)
        try:
            old = find_commit(self._storage, name)
            if old is None or old.content == new.content:
                return
        except CorruptError:
            pass
        self._storage.remove(name)

    def abort(self) -> None:
        """Removes what was written; the shard stays pending."""
        for file in self._files.values():
            file.discard()
        self._files.clear()
        self._helpers.shutdown(wait=False)


def open_writer(where: Path | str | Storage, wanted: Manifest) -> CacheWriter:
    """Creates the cache at a path or URL, or grows it, and opens it for writing. Raises as `create_or_grow`."""
    storage = open_storage(where)
    return CacheWriter(storage, create_or_grow(storage, wanted))


def index_arrays(views: Sequence[View], samples: Sequence[int], view_indices: Sequence[int]) -> dict[str, Records]:
    """The index arrays of some records: geometry, positions in the group's sample list, view numbers."""
    arrays: dict[str, Records] = {
        "index/sample": np.asarray(samples, dtype=np.int32),
        "index/view": np.asarray(view_indices, dtype=np.int32),
        "index/to_view": np.stack([v.matrix for v in views]),
        "index/valid_size": np.asarray([v.valid for v in views], dtype=np.int32),
        "index/image_size": np.asarray([v.image_size for v in views], dtype=np.int32),
    }
    if views and views[0].frames:
        arrays["index/frames"] = np.asarray([v.frames for v in views], dtype=np.int32)
    return arrays
