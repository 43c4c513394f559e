"""Checking a cache against its commits."""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fcache.cache_spec.commits import Commit, commit_path, read_commit
from fcache.cache_spec.errors import CorruptError
from fcache.cache_spec.layout import Group, Shard, part_arrays
from fcache.cache_spec.shardfile import array_metadata, index_size, parse_index, shard_key
from fcache.cache_spec.store import read_manifest

CHUNK = 1 << 22


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


def verify(root: Path, *, deep: bool = False, report: Callable[[int, int], None] | None = None) -> Verified:
    """Checks that every shard is committed, that its files are there, whole and of the stated size.

    `deep` reads every byte and compares digests. `report(done, total)` is called after each part of a shard.
    Raises CorruptError if the manifest itself is damaged.
    """
    manifest = read_manifest(root)
    jobs = [(g, part, s) for g in manifest.groups for part in manifest.parts() for s in g.shards()]
    faults: list[Fault] = []
    committed, size = 0, 0
    for group in manifest.groups:
        for part in manifest.parts():
            faults += _metadata_faults(root, group, part)
    with ThreadPoolExecutor(2) as pool:
        checks = pool.map(lambda job: _check(root, *job, key=manifest.part_key(job[1]), deep=deep), jobs)
        for done, (commit, fault) in enumerate(checks, 1):
            if commit is not None:
                committed += 1
                size += sum(n for n, _ in commit.files.values())
            if fault is not None:
                faults.append(fault)
            if report is not None:
                report(done, len(jobs))
    return Verified(len(jobs), committed, size, tuple(faults))


def _metadata_faults(root: Path, group: Group, part: str) -> list[Fault]:
    """Array metadata other than what the manifest implies would make other zarr readers see other numbers."""
    faults = []
    for path, spec in part_arrays(group, part).items():
        expected = array_metadata(spec, num_records=group.num_records, shard_records=group.shard_records)
        file = root / group.path / path / "zarr.json"
        try:
            found = json.loads(file.read_bytes())
        except (OSError, ValueError) as e:
            found = {"unreadable": str(e)}
        if found != expected:
            faults.append(Fault(group.path, part, -1, "corrupt", f"{group.path}/{path}/zarr.json is not as written"))
    return faults


def _check(
    root: Path, group: Group, part: str, shard: Shard, *, key: str, deep: bool
) -> tuple[Commit | None, Fault | None]:
    def fault(kind: str, what: str) -> Fault:
        return Fault(group.path, part, shard.index, kind, what)

    try:
        commit = read_commit(root / commit_path(group.path, part, shard.index))
    except FileNotFoundError:
        return None, fault("missing", "not committed")
    except CorruptError as e:
        return None, fault("corrupt", str(e))
    if commit.key != key:
        return None, fault("missing", "committed for other targets" if part != "features" else "other settings")
    arrays = part_arrays(group, part)
    expected = {f"{group.path}/{path}/{shard_key(spec, shard.index)}": spec for path, spec in arrays.items()}
    if set(expected) != set(commit.files) or commit.first != shard.first or commit.count != shard.count:
        return commit, fault("corrupt", "the commit does not fit the manifest")
    for name, (size, sha) in commit.files.items():
        path = root / name
        try:
            found = path.stat().st_size
            if found != size:
                return commit, fault("corrupt", f"{name} has {found} bytes, its commit says {size}")
            if expected[name].layout == "sharded":
                with path.open("rb") as f:
                    f.seek(max(0, size - index_size(group.shard_records)))
                    parse_index(f.read(), group.shard_records, size, name)
            if deep and _sha256(path) != sha:
                return commit, fault("corrupt", f"{name} does not hold what its commit says (SHA-256 differs)")
        except FileNotFoundError:
            return commit, fault("corrupt", f"{name} is missing")
        except CorruptError as e:
            return commit, fault("corrupt", str(e))
    return commit, None


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as f:
        while data := f.read(CHUNK):
            found.update(data)
    return found.hexdigest()
