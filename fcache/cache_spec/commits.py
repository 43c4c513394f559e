"""Commit records: the only thing that makes a shard exist."""

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fcache.cache_spec.errors import CorruptError
from fcache.cache_spec.files import read_file, unreadable, write_durably
from fcache.cache_spec.identity import digest, from_json, to_json
from fcache.cache_spec.layout import FEATURES, Shard


@dataclass(frozen=True)
class Commit:
    """What one part of one shard holds.

    `key` is the digest of the features or of the target kind; `files` maps paths below the cache to (bytes, SHA-256);
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

    @property
    def content(self) -> str:
        """Digest of what the shard holds: its files and its quarantined samples."""
        return digest({"files": self.files, "quarantined": self.quarantined})

    def fits(self, shard: Shard, ids: Sequence[str]) -> bool:
        """Whether it records what the manifest expects there: the records, view and samples of `shard`."""
        expected = (shard.index, shard.first, shard.count, shard.view)
        found = (self.shard, self.first, self.count, self.view)
        return found == expected and self.ids == tuple(ids[shard.sample : shard.sample + shard.count])


def commit_path(group: str, part: str, shard: int) -> str:
    """Where a commit lies below the cache: commits/train/000012.json, commits/train/semantic/000012.json."""
    folder = f"commits/{group}" if part == FEATURES else f"commits/{group}/{part}"
    return f"{folder}/{shard:06d}.json"


def write_commit(root: Path, commit: Commit) -> None:
    """Writes a commit durably; from now on its shard exists."""
    body = to_json(commit)
    data = json.dumps({**body, "digest": digest(body)}, indent=1, sort_keys=True).encode() + b"\n"
    write_durably(root, root / commit_path(commit.group, commit.part, commit.shard), data)


def read_commits(root: Path, group: str, part: str) -> dict[int, Commit]:
    """All commits of a part of a group by shard. Raises CorruptError if one is damaged."""
    folder = (root / commit_path(group, part, 0)).parent
    try:
        names = sorted(n for n in os.listdir(folder) if n.endswith(".json") and n[:-5].isdecimal())
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise unreadable(folder, e) from e
    commits = (read_commit(folder / name) for name in names)
    return {c.shard: c for c in commits}


def read_commit(path: Path) -> Commit:
    """One commit. Raises FileNotFoundError; CorruptError if its digest does not fit its content, or it its place."""
    data = read_file(path)
    try:
        body = json.loads(data)
        stated = body.pop("digest")
        changed = stated != digest(body)
        commit = from_json(Commit, body)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
        raise CorruptError(f"{path}: not a commit record ({type(e).__name__}: {e}); run `fcache repair`") from e
    if changed:
        raise CorruptError(f"{path}: the commit record was changed (its digest differs); run `fcache repair`")
    if not path.as_posix().endswith(f"/{commit_path(commit.group, commit.part, commit.shard)}"):
        raise CorruptError(f"{path}: a commit record of another place was put here; run `fcache repair`")
    return commit


def run_facts(started: float) -> dict[str, Any]:
    """Time, seconds, host and process of a commit: the only fields in which equal extractions may differ."""
    now = time.time()
    return {"time": round(now, 3), "seconds": round(now - started, 3), "host": socket.gethostname(), "pid": os.getpid()}
