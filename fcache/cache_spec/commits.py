"""Commit records: the only thing that makes a shard exist."""

import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fcache.cache_spec.errors import CorruptError
from fcache.cache_spec.identity import canonical_json, digest, digest_of_data, from_json, to_json
from fcache.cache_spec.layout import FEATURES, Shard
from fcache.cache_spec.names import Names
from fcache.cache_spec.storage.protocol import Storage

TOGETHER = 256


@dataclass(frozen=True)
class Commit:
    """What one part of one shard holds.

    `key` is the digest of the features or of the target kind; `tables` that of the fitted tables it was coded with, ""
    where there are none; `files` maps paths below the cache to (bytes, SHA-256);
    `quarantined` maps ids of samples that have no record to the reason; `facts` holds minima, maxima, non-finite
    counts; `fingerprint` the versions and devices that computed it; `run` the time, seconds, host and process.
    """

    group: str
    part: str
    shard: int
    first: int
    count: int
    view: int
    ids: tuple[str, ...]
    key: str
    files: Mapping[str, tuple[int, str]]
    quarantined: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    tables: str = ""

    @property
    def content(self) -> str:
        """Digest of what the shard holds: its files and its quarantined samples."""
        return digest_of_data({"files": dict(self.files), "quarantined": dict(self.quarantined)})

    def fits(self, shard: Shard, ids: Names) -> bool:
        """Whether it records what the manifest expects there: the records, view and samples of `shard`."""
        expected = (shard.index, shard.first, shard.count, shard.view)
        found = (self.shard, self.first, self.count, self.view)
        return found == expected and self.ids == ids[shard.sample : shard.sample + shard.count]


def commit_path(group: str, part: str, shard: int) -> str:
    """Where a commit lies below the cache: commits/train/000012.json, commits/train/semantic/000012.json."""
    folder = f"commits/{group}" if part == FEATURES else f"commits/{group}/{part}"
    return f"{folder}/{shard:06d}.json"


def write_commit(storage: Storage, commit: Commit) -> None:
    """Writes a commit durably; from now on its shard exists."""
    body = to_json(commit)
    data = canonical_json({**body, "digest": digest(body)})
    storage.write(commit_path(commit.group, commit.part, commit.shard), data)


def read_commits(storage: Storage, group: str, part: str) -> dict[int, Commit]:
    """All commits of a part of a group by shard. Raises CorruptError if one is damaged."""
    return {c.shard: c for c in each_commit(storage, group, part)}


def each_commit(storage: Storage, group: str, part: str) -> Iterator[Commit]:
    """The commits of a part of a group, some of them in memory at a time. Raises CorruptError if one is damaged."""
    folder = commit_path(group, part, 0).rpartition("/")[0]
    names = [f"{folder}/{n}" for n in storage.names(folder) if n.endswith(".json") and n[:-5].isdecimal()]
    for start in range(0, len(names), TOGETHER):
        some = names[start : start + TOGETHER]
        try:
            found = zip(some, storage.read_many(some), strict=True)
            yield from [parse_commit(storage, name, data) for name, data in found]
        except FileNotFoundError:
            # One was retracted between the listing and the reading: its shard is written anew.
            yield from [c for name in some if (c := find_commit(storage, name)) is not None]


def find_commit(storage: Storage, name: str) -> Commit | None:
    """The commit of that name, None if there is none. Raises CorruptError if it is damaged or of another place."""
    try:
        return parse_commit(storage, name, storage.read(name))
    except FileNotFoundError:
        return None


def parse_commit(storage: Storage, name: str, data: bytes) -> Commit:
    """The commit in a file of that name. Raises CorruptError if it is damaged or of another place."""
    where = f"{storage.url}/{name}"
    try:
        body = json.loads(data)
        stated = body.pop("digest")
        changed = not _is_canonical(data, stated) and stated != digest(body)
        commit = from_json(Commit, body)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
        raise CorruptError(f"{where}: not a commit record ({type(e).__name__}: {e}); run `fcache repair`") from e
    if changed:
        raise CorruptError(f"{where}: the commit record was changed (its digest differs); run `fcache repair`")
    if name != commit_path(commit.group, commit.part, commit.shard):
        raise CorruptError(f"{where}: a commit record of another place was put here; run `fcache repair`")
    return commit


def _is_canonical(data: bytes, stated: Any) -> bool:
    """Whether a commit is canonical JSON with the digest that it states: then nothing needs to be written again."""
    field = f'"digest":"{stated}",'.encode()
    return data.count(field) == 1 and hashlib.sha256(data.replace(field, b"")).hexdigest() == stated


def run_facts(started: float) -> dict[str, Any]:
    """Time, seconds, host and process of a commit: the only fields in which equal extractions may differ."""
    now = time.time()
    return {"time": round(now, 3), "seconds": round(now - started, 3), "host": socket.gethostname(), "pid": os.getpid()}
