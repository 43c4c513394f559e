"""What a copy of a cache has to do: the manifest of the target, and the parts of shards that it lacks."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from fcache.cache_spec.commits import Commit, commit_path, parse_commit
from fcache.cache_spec.errors import CorruptError, IncompatibleError, SpecError
from fcache.cache_spec.identity import first_difference
from fcache.cache_spec.layout import FEATURES, Group, Manifest, Shard, part_arrays
from fcache.cache_spec.shardfile import shard_key
from fcache.cache_spec.storage.protocol import Storage, open_storage
from fcache.cache_spec.store import check_identity, foreign_file, is_cache, read_manifest
from fcache.cache_spec.tables import COMMIT as TABLES
from fcache.cache_spec.tables import table_files
from fcache.cache_spec.upkeep.verify import Fault


@dataclass(frozen=True)
class CopyPlan:
    """What a copy has to do, in parts of shards: `copy` and its `bytes`, `skip` are at the target already, `missing`
    have no commit at the source, `faults` are commits of the source that are damaged."""

    copy: int
    bytes: int
    skip: int
    missing: int
    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class Job:
    """The parts of one shard that are to be copied; they share its claim."""

    group: Group
    shard: Shard
    parts: tuple[str, ...]
    bytes: int


def opened(
    source: Path | str | Storage, target: Path | str | Storage, splits: Sequence[str] | None
) -> tuple[Storage, Storage, Manifest]:
    """Both storages, and the part of the source's manifest that is to be copied.

    Raises SpecError if both are one, if there is no cache at the source, or something else at the target;
    IncompatibleError as `merged`.
    """
    here, there = open_storage(source), open_storage(target)
    if here.url == there.url or (here.path() is not None and _same_folder(here.path(), there.path())):
        raise SpecError(f"source and target are both {here.url}; name another target")
    manifest = read_manifest(here)
    if splits is not None:
        manifest = replace(manifest, groups=tuple(g for name in splits for g in manifest.split(name)))
    merged(manifest, there)
    check_tables(here, there, manifest)
    return here, there, manifest


def _same_folder(one: Path | None, other: Path | None) -> bool:
    return one is not None and other is not None and one.resolve() == other.resolve()


def merged(manifest: Manifest, there: Storage) -> Manifest:
    """What the target's manifest will be: it keeps what it has beyond the source.

    Raises IncompatibleError if the target has another identity, other targets, or records at other places.
    """
    if not is_cache(there):
        if name := foreign_file(there, ("lock", "partial")):
            raise SpecError(f"{there.url} is not empty and no cache (it holds {name}); choose another target")
        return manifest
    found = read_manifest(there)
    check_identity(found.features, manifest.features)
    targets = {t.kind: t for t in found.targets}
    for t in manifest.targets:
        if difference := first_difference(t, targets.setdefault(t.kind, t)):
            raise IncompatibleError(
                f"targets {t.kind!r} at {there.url} differ from the source's in {difference[0]}; choose another target"
            )
    groups = {g.path: g for g in found.groups}
    for g in manifest.groups:
        known = groups.setdefault(g.path, g)
        if _starts(known, g):
            groups[g.path] = g
        elif not _starts(g, known):
            raise IncompatibleError(
                f"group {g.path!r} at {there.url} was laid out otherwise than the source's (samples, views, shards or "
                "encoding); choose another target"
            )
    return replace(found, targets=tuple(targets.values()), groups=tuple(groups.values()))


def check_tables(here: Storage, there: Storage, manifest: Manifest) -> None:
    """Raises IncompatibleError if the target has other fitted tables: codes mean nothing without their own."""
    if not table_files(here, manifest):
        return
    with suppress(FileNotFoundError):
        if there.read(TABLES) != here.read(TABLES):
            raise IncompatibleError(
                f"{there.url} has other fitted tables ({TABLES}) than {here.url}; choose another target"
            )


def _starts(one: Group, other: Group) -> bool:
    """Whether `other` is `one`, or `one` grown: all records of `one` lie in `other` at the same place."""
    fixed = ("path", "split", "role", "canvas", "levels", "encoding", "shard_records", "batch", "compression")
    return (
        all(getattr(one, name) == getattr(other, name) for name in fixed)
        and all(other.limits.get(name) == limit for name, limit in one.limits.items())
        and one.views <= other.views
        and tuple(one.extents) == tuple(other.extents[: len(one.extents)])
        and tuple(one.ids) == tuple(other.ids[: len(one.ids)])
        and tuple(one.digests) == tuple(other.digests[: len(one.digests)])
    )


def plan_shards(here: Storage, there: Storage, manifest: Manifest) -> tuple[list[Job], CopyPlan]:
    """The shards of `manifest` that the source has and the target lacks, and what that comes to."""
    jobs: dict[tuple[str, int], Job] = {}
    faults: list[Fault] = []
    skip = missing = 0
    # Targets first, so that committed features always have theirs.
    parts = sorted(manifest.parts(), key=lambda p: p == FEATURES)
    for group in manifest.groups:
        for part in parts:
            at_source, at_target = _stored(here, group, part), _stored(there, group, part)
            for shard in group.shards():
                name = commit_path(group.path, part, shard.index)
                data = at_source.get(name)
                if data is None:
                    missing += 1
                    continue
                try:
                    commit = parse_commit(here, name, data)
                    if commit.key != manifest.part_key(part):
                        missing += 1
                        continue
                    check_fits(group, part, shard, commit)
                    if data == at_target.get(name) or _content(there, name, at_target) == commit.content:
                        skip += 1
                        continue
                except CorruptError as e:
                    faults.append(Fault(group.path, part, shard.index, "corrupt", str(e)))
                    continue
                job = jobs.get((group.path, shard.index), Job(group, shard, (), 0))
                size = sum(n for n, _ in commit.files.values())
                jobs[group.path, shard.index] = replace(job, parts=(*job.parts, part), bytes=job.bytes + size)
    found = list(jobs.values())
    plan = CopyPlan(sum(len(j.parts) for j in found), sum(j.bytes for j in found), skip, missing, tuple(faults))
    return found, plan


def _stored(storage: Storage, group: Group, part: str) -> dict[str, bytes]:
    """The commits of a part of a group, unread, by name."""
    folder = commit_path(group.path, part, 0).rpartition("/")[0]
    names = [f"{folder}/{name}" for name in storage.names(folder)]
    try:
        return dict(zip(names, storage.read_many(names), strict=True))
    except FileNotFoundError:
        # One was retracted between the listing and the reading: its shard is written anew.
        found: dict[str, bytes] = {}
        for name in names:
            with suppress(FileNotFoundError):
                found[name] = storage.read(name)
        return found


def _content(storage: Storage, name: str, stored: Mapping[str, bytes]) -> str:
    """What the commit at the target says that its shard holds, "" without a sound one."""
    try:
        return parse_commit(storage, name, stored[name]).content
    except (KeyError, CorruptError):
        return ""


def check_fits(group: Group, part: str, shard: Shard, commit: Commit) -> None:
    """Raises CorruptError if a commit names other records or files than the manifest implies."""
    expected = {
        f"{group.path}/{path}/{shard_key(spec, shard.index)}" for path, spec in part_arrays(group, part).items()
    }
    if expected != set(commit.files) or not commit.fits(shard, group.ids):
        raise CorruptError("the commit does not fit the manifest")
