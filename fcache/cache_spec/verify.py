"""Checking a cache against its commits."""

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fcache.cache_spec.commits import Commit, commit_path, read_commit
from fcache.cache_spec.errors import CorruptError, DataError
from fcache.cache_spec.files import explained, sync_folder, unreadable
from fcache.cache_spec.layout import FEATURES, Group, Manifest, Shard, part_arrays
from fcache.cache_spec.shardfile import index_size, parse_index, shard_key
from fcache.cache_spec.store import GROUP_NODE, read_manifest, zarr_nodes

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
    faults = _metadata_faults(root, manifest)
    committed, size = 0, 0
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


def make_pending(root: Path, faults: Iterable[Fault]) -> int:
    """Removes the commits of corrupt shards, so that the next extraction writes them again; returns how many.

    Faults of metadata have no shard: opening the cache for writing restores what is not as written.
    """
    removed = 0
    for fault in faults:
        if fault.kind == "corrupt" and fault.shard >= 0:
            path = root / commit_path(fault.group, fault.part, fault.shard)
            with explained(path):
                path.unlink(missing_ok=True)
                sync_folder(path.parent)
            removed += 1
    return removed


def _metadata_faults(root: Path, manifest: Manifest) -> list[Fault]:
    """Metadata other than what the manifest implies would make other zarr readers see other numbers, or none."""
    faults = []
    if _without(_read_json(root / "zarr.json"), "attributes") != _without(GROUP_NODE, "attributes"):
        faults.append(Fault("", FEATURES, -1, "corrupt", "zarr.json is not as written"))
    for group in manifest.groups:
        seen: set[str] = set()
        for part in manifest.parts():
            for path, expected in zarr_nodes(group, (part,)).items():
                if path in seen:
                    continue
                seen.add(path)
                found = _read_json(root / path / "zarr.json")
                if not _same_node(found, expected, group.shard_records):
                    faults.append(Fault(group.path, part, -1, "corrupt", f"{path}/zarr.json is not as written"))
    return faults


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
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
    root: Path, group: Group, part: str, shard: Shard, *, key: str, deep: bool
) -> tuple[Commit | None, Fault | None]:
    def fault(kind: str, what: str) -> Fault:
        return Fault(group.path, part, shard.index, kind, what)

    try:
        commit = read_commit(root / commit_path(group.path, part, shard.index))
    except FileNotFoundError:
        return None, fault("missing", "not committed")
    except (CorruptError, DataError) as e:
        return None, fault("corrupt", str(e))
    if commit.key != key:
        return None, fault(
            "missing", "committed for other targets" if part != FEATURES else "committed with other settings"
        )
    arrays = part_arrays(group, part)
    expected = {f"{group.path}/{path}/{shard_key(spec, shard.index)}": spec for path, spec in arrays.items()}
    if set(expected) != set(commit.files) or not commit.fits(shard, group.ids):
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
        except OSError as e:
            return commit, fault("corrupt", str(unreadable(name, e)))
        except CorruptError as e:
            return commit, fault("corrupt", str(e))
    return commit, None


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as f:
        while data := f.read(CHUNK):
            found.update(data)
    return found.hexdigest()
