"""What lies in a cache that nothing needs: found, listed, and removed without harm to who writes to it meanwhile."""

import json
import os
import re
import socket
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fcache.cache_spec.claims import LOCK, Claims, claim_folder, holder_died
from fcache.cache_spec.commits import commit_path
from fcache.cache_spec.errors import CorruptError
from fcache.cache_spec.layout import Group, Manifest, part_arrays
from fcache.cache_spec.shardfile import shard_key
from fcache.cache_spec.storage.files import ORPHAN_SECONDS, process_alive
from fcache.cache_spec.storage.protocol import Storage, open_storage
from fcache.cache_spec.store import MANIFESTS, NAMED, ROOT, read_manifest, zarr_nodes

SHARD = re.compile(r"c\.(\d+)(\.0)*")
COMMIT = re.compile(r"(\d{6,})\.json")


@dataclass(frozen=True)
class Garbage:
    """A file that nothing needs: its name below the cache, its bytes, and why.

    `kind` is "temporary", "claim", "manifest" or "leftover".
    """

    name: str
    bytes: int
    kind: str
    why: str


@dataclass(frozen=True)
class Tidied:
    """The files of a cache that nothing needs, and those that are not fcache's (name, bytes): these are left alone."""

    garbage: tuple[Garbage, ...]
    foreign: tuple[tuple[str, int], ...]

    @property
    def bytes(self) -> int:
        """Of the garbage."""
        return sum(g.bytes for g in self.garbage)


def find_garbage(where: Path | str | Storage) -> Tidied:
    """What nothing needs in a cache; writes nothing. Raises as `read_manifest`.

    Temporary files of dead processes (those of other hosts after a day), claims and the lock of dead holders, manifests
    of before, commits of shards that no manifest has, and files of shards that are neither committed nor claimed.
    """
    storage = open_storage(where)
    return _find(storage, read_manifest(storage), growing=not is_dead(storage, LOCK))


def remove_garbage(where: Path | str | Storage) -> tuple[Garbage, ...]:
    """Removes what `find_garbage` finds; returns what was removed.

    Holds the cache's lock, so that no manifest changes meanwhile, and claims a shard before its leftovers are removed.
    Raises DataError while another process creates or grows the cache.
    """
    storage = open_storage(where)
    before = find_garbage(storage).garbage
    if not before:
        return ()
    # A dead lock is taken over, and goes with ours.
    claims, removed = Claims(storage), [found for found in before if found.name == LOCK]
    with claims.lock(wait_seconds=0.0):
        manifest = read_manifest(storage)
        places = _Places.of(manifest)
        for found in _find(storage, manifest, growing=False).garbage:
            claims.beat()
            if _remove(storage, found, places, claims):
                removed.append(found)
    storage.sweep()
    return tuple(removed)


def _remove(storage: Storage, found: Garbage, places: "_Places", claims: Claims) -> bool:
    if found.kind == "claim":
        return _remove_claim(storage, found.name)
    shard = places.shard_of(found.name)
    if shard is None:
        storage.remove(found.name)
        return True
    group, part, index = shard
    if not claims.acquire(group, index):
        return False
    try:
        # Committed since it was found?
        with suppress(FileNotFoundError):
            storage.size(commit_path(group, part, index))
            return False
        storage.remove(found.name)
        return True
    finally:
        claims.release(group, index)


def _remove_claim(storage: Storage, name: str) -> bool:
    """Takes a claim over from its dead holder, if no other process has meanwhile, then removes it."""
    try:
        content = storage.read(name)
    except FileNotFoundError:
        return False
    if not is_dead(storage, name):
        return False
    mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}).encode()
    if not storage.replace(name, content, mine):
        return False
    storage.remove(name)
    return True


def is_dead(storage: Storage, name: str) -> bool:
    """Whether the holder of a claim is gone: a dead process of this host, or nobody renewed it for a day."""
    try:
        return holder_died(storage.read(name)) or storage.age(name) > ORPHAN_SECONDS
    except FileNotFoundError:
        return True
    except CorruptError:
        return False


def in_use(storage: Storage) -> bool:
    """Whether a process that may be alive writes to a cache: it holds a claim, the lock or a temporary file."""
    for name, _ in storage.walk():
        if name == LOCK or name.startswith("claims/"):
            if not is_dead(storage, name):
                return True
        elif name.startswith("partial/") and not _orphaned(storage, name):
            return True
    return False


@dataclass(frozen=True)
class _Places:
    """Where the files of a manifest lie: nodes of zarr, folders of arrays and of commits."""

    nodes: frozenset[str]
    arrays: Mapping[str, tuple[Group, str, Any]]
    commits: Mapping[str, tuple[Group, str]]
    claims: Mapping[str, str]
    shards: Mapping[str, frozenset[int]]

    @staticmethod
    def of(manifest: Manifest) -> "_Places":
        nodes, arrays, commits = set[str](), dict[str, tuple[Group, str, Any]](), dict[str, tuple[Group, str]]()
        for group in manifest.groups:
            nodes |= {f"{path}/{ROOT}" for path in zarr_nodes(group, manifest.parts())}
            for part in manifest.parts():
                commits[commit_path(group.path, part, 0).rpartition("/")[0]] = group, part
                arrays |= {f"{group.path}/{a}": (group, part, spec) for a, spec in part_arrays(group, part).items()}
        shards = {g.path: frozenset(s.index for s in g.shards()) for g in manifest.groups}
        return _Places(
            frozenset(nodes), arrays, commits, {claim_folder(g.path): g.path for g in manifest.groups}, shards
        )

    def shard_of(self, name: str) -> tuple[str, str, int] | None:
        """(group, part, shard) of a shard file of the manifest, None for any other file."""
        folder, _, key = name.rpartition("/")
        found = SHARD.fullmatch(key)
        if found is None or folder not in self.arrays:
            return None
        group, part, spec = self.arrays[folder]
        index = int(found[1])
        known = index in self.shards[group.path] and key == shard_key(spec, index)
        return (group.path, part, index) if known else None


def _find(storage: Storage, manifest: Manifest, *, growing: bool) -> Tidied:
    files = dict(storage.walk())
    places, named = _Places.of(manifest), _manifest_files(storage)
    garbage: list[Garbage] = []
    foreign: list[tuple[str, int]] = []
    busy = {
        (places.claims[folder], int(found[1]))
        for name in files
        if (folder := name.rpartition("/")[0]) in places.claims
        and (found := COMMIT.fullmatch(name.rpartition("/")[2]))
        and not is_dead(storage, name)
    }
    for name, size in sorted(files.items()):
        kind, why = _judge(storage, name, places, files, named, busy, growing)
        if kind == "foreign":
            foreign.append((name, size))
        elif kind:
            garbage.append(Garbage(name, size, kind, why))
    return Tidied(tuple(garbage), tuple(foreign))


def _judge(
    storage: Storage,
    name: str,
    places: _Places,
    files: Mapping[str, int],
    named: set[str],
    busy: set[tuple[str, int]],
    growing: bool,
) -> tuple[str, str]:
    """(kind, why) of a file; "" if it is needed, "foreign" if it is not fcache's."""
    top, (folder, _, last) = name.split("/")[0], name.rpartition("/")
    if name == ROOT or name in places.nodes or name in named or top == "tables" or name.startswith("commits/tables"):
        return "", ""
    if top == "partial":
        return ("temporary", "of a process that is gone") if _orphaned(storage, name) else ("", "")
    if top == "claims" or name == LOCK:
        return ("claim", "its holder is gone") if is_dead(storage, name) else ("", "")
    if top == MANIFESTS:
        return ("", "") if growing else ("manifest", "of before, the root names another")
    if folder in places.commits and (found := COMMIT.fullmatch(last)):
        group, part = places.commits[folder]
        if name == commit_path(group.path, part, int(found[1])) and int(found[1]) in places.shards[group.path]:
            return "", ""
        return ("", "") if growing else ("leftover", "a commit of a shard that the manifest does not have")
    if folder in places.arrays and (found := SHARD.fullmatch(last)):
        shard = places.shard_of(name)
        if shard is None:
            return ("", "") if growing else ("leftover", "of a shard that the manifest does not have")
        if commit_path(*shard) in files or (shard[0], shard[2]) in busy:
            return "", ""
        return "leftover", "of a shard that is not committed"
    return "foreign", ""


def _orphaned(storage: Storage, name: str) -> bool:
    host, _, rest = name.removeprefix("partial/").partition("~")
    pid = rest.partition("~")[0]
    if host == socket.gethostname() and pid.isdecimal():
        return not process_alive(int(pid))
    try:
        return storage.age(name) > ORPHAN_SECONDS
    except FileNotFoundError:
        return False


def _manifest_files(storage: Storage) -> set[str]:
    """The files below manifest/ that the root names: group manifests, and the names that these name."""
    found: set[str] = set()
    groups = json.loads(storage.read(ROOT))["attributes"]["fcache"]["groups"]
    for entry in groups.values():
        found.add(entry["file"])
        body = json.loads(storage.read(entry["file"]))
        found |= {body[key]["file"] for key in NAMED if isinstance(body[key], dict)}
    return found
