"""Caches of a folder that another one there contains whole."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fcache.cache_spec.claims import LOCK, Claims
from fcache.cache_spec.commits import each_commit
from fcache.cache_spec.errors import CorruptError, DataError, FcacheError, IncompatibleError, SpecError
from fcache.cache_spec.layout import Group, Manifest
from fcache.cache_spec.storage.files import remove_if_empty
from fcache.cache_spec.storage.protocol import Storage, is_url, open_storage
from fcache.cache_spec.store import ROOT, read_manifest
from fcache.cache_spec.tables import read_tables
from fcache.cache_spec.upkeep.cleaning import find_garbage, in_use
from fcache.cache_spec.upkeep.verify import verify

DEPTH = 5


@dataclass(frozen=True)
class Superseded:
    """A cache all of whose records lie in another one of the same features, and its bytes."""

    cache: str
    by: str
    bytes: int


def find_caches(folder: Path | str) -> list[str]:
    """The paths or URLs of the caches in a folder (five levels deep) or below a URL, sorted; itself, if it is one.

    Raises SpecError if there is no such folder.
    """
    if is_url(folder):
        storage = open_storage(folder)
        names = {name for name, _ in storage.walk()}
        roots = {name.rpartition("manifest/")[0] for name in names if "manifest" in name.split("/")[-2:-1]}
        return sorted(f"{storage.url}/{r}".rstrip("/") for r in roots if f"{r}{ROOT}" in names)
    if not Path(folder).is_dir():
        raise SpecError(f"{folder} is no folder and no cache")
    return sorted(str(path) for path in _folders(Path(folder)))


def _folders(top: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(top):
        path = Path(folder)
        if ROOT in files and "manifest" in folders:
            yield path
            folders.clear()
        if len(path.relative_to(top).parts) >= DEPTH:
            folders.clear()


def find_superseded(caches: list[str]) -> list[Superseded]:
    """Those of some caches that another one of them contains whole, each with one that stays.

    Contained is a cache whose every committed record, features and targets, is committed in the other one with the same
    digests. Of equal ones the first stays. A cache that is damaged, or that somebody writes to, is neither.
    """
    opened = {cache: found for cache in caches if (found := _open(cache)) is not None}
    inside = {
        (a, b)
        for a, one in opened.items()
        for b, other in opened.items()
        if a != b and one.manifest.features.key == other.manifest.features.key and _contains(other, one)
    }
    gone = {a for a, b in inside if (b, a) not in inside or b < a}
    found = []
    for a in sorted(gone):
        by = min(b for one, b in inside if one == a and b not in gone)
        found.append(Superseded(a, by, sum(n for _, n in opened[a].storage.walk())))
    return found


def remove_superseded(found: Superseded) -> None:
    """Removes a superseded cache, after every byte of the one that stays was checked; foreign files stay.

    Raises CorruptError if that one is damaged, DataError if the two are no longer as they were found.
    """
    if find_superseded([found.cache, found.by]) != [found]:
        raise DataError(f"{found.cache} changed since it was found; look again")
    if faults := verify(found.by, deep=True).corrupt:
        raise CorruptError(f"{found.by} is damaged ({faults[0].what}), {found.cache} stays; run `fcache repair`")
    storage = open_storage(found.cache)
    with Claims(storage).lock(wait_seconds=0.0):
        foreign = {LOCK, *(name for name, _ in find_garbage(storage).foreign)}
        # Without its root it is no cache any more, whatever happens next.
        for name in (ROOT, *(name for name, _ in storage.walk() if name not in foreign)):
            storage.remove(name)
    path = storage.path()
    if path is not None:
        remove_if_empty(path)


@dataclass(frozen=True)
class _Opened:
    storage: Storage
    manifest: Manifest


def _open(cache: str) -> _Opened | None:
    storage = open_storage(cache)
    try:
        opened = _Opened(storage, read_manifest(storage))
        return None if in_use(storage) else opened
    except (CorruptError, DataError, IncompatibleError):
        return None


def _contains(outer: _Opened, inner: _Opened) -> bool:
    """Whether every committed record of `inner` is committed in `outer`."""
    keys = {part: outer.manifest.part_key(part) for part in outer.manifest.parts()}
    if any(keys.get(part) != inner.manifest.part_key(part) for part in inner.manifest.parts()):
        return False
    groups = {g.path: g for g in outer.manifest.groups}
    try:
        fitted = read_tables(inner.storage, inner.manifest)
        if fitted and fitted.digest != read_tables(outer.storage, outer.manifest).digest:
            return False
        return all(g.path in groups and _contains_group(outer, groups[g.path], inner, g) for g in inner.manifest.groups)
    except FcacheError:
        return False


def _contains_group(outer: _Opened, wide: Group, inner: _Opened, narrow: Group) -> bool:
    digests = dict(zip(wide.ids, wide.digests, strict=True))
    if narrow.views > wide.views or any(digests.get(i) != d for i, d in zip(narrow.ids, narrow.digests, strict=True)):
        return False
    position = {name: n for n, name in enumerate(wide.ids)}
    places = np.asarray([position[name] for name in narrow.ids])
    for part in inner.manifest.parts():
        has, needs = _committed(outer, wide, part), _committed(inner, narrow, part)
        if np.any(needs & ~has[: narrow.views, places]):
            return False
    return True


def _committed(cache: _Opened, group: Group, part: str) -> np.ndarray:
    """bool [views, samples]: which records are committed; quarantined ones are not."""
    found = np.zeros((group.views, len(group.ids)), bool)
    shards = {s.index: s for s in group.shards()}
    for commit in each_commit(cache.storage, group.path, part):
        shard = shards.get(commit.shard)
        if shard is None or commit.key != cache.manifest.part_key(part) or not commit.fits(shard, group.ids):
            continue
        good = [shard.sample + n for n, name in enumerate(commit.ids) if name not in commit.quarantined]
        found[shard.view, good] = True
    return found
