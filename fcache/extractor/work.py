"""The list of work: which shards and parts of a cache are still to do, and claiming them."""

import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from fcache.cache_spec import CacheWriter, DataError, Shard, Storage
from fcache.cache_spec.claims import claim_folder
from fcache.cache_spec.commits import commit_path, find_commit
from fcache.extractor.decoding import Request
from fcache.extractor.job import Job
from fcache.extractor.prepare import Prepared

# A look at all claims and commits comes at most after so many times as long as it took.
LOOK_SHARE = 20
# One of so many free shards is taken for each that others hold: rarely the one that another just took.
SPREAD = 8


@dataclass(frozen=True)
class Task:
    """One shard and those of its parts that have no commit; `requests` has one entry a record."""

    shard: Shard
    parts: tuple[str, ...]
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class Pending:
    """One shard and those of its parts that have no commit."""

    shard: Shard
    parts: tuple[str, ...]


def pending_shards(writer: CacheWriter, job: Job) -> list[Pending]:
    """What a cache lacks of a job's splits and share, in order."""
    pending: dict[tuple[str, int], list[str]] = {}
    shards: dict[tuple[str, int], Shard] = {}
    for part in writer.manifest.parts():
        for shard in writer.pending(part):
            pending.setdefault((shard.group, shard.index), []).append(part)
            shards[shard.group, shard.index] = shard
    order = {
        (g.path, s.index): i for i, (g, s) in enumerate((g, s) for g in writer.manifest.groups for s in g.shards())
    }
    return [
        Pending(shards[key], tuple(pending[key]))
        for key in sorted(pending, key=order.__getitem__)
        if writer.manifest.group(key[0]).split in job.splits
        and (job.part is None or order[key] % job.part[1] == job.part[0])
    ]


def tasks_of(writer: CacheWriter, prepared: Prepared) -> list[Task]:
    """What is to do for a job, in order. Raises DataError if the cache holds samples that the data no longer has."""
    return [task_of(writer, prepared, p) for p in pending_shards(writer, prepared.job)]


def task_of(writer: CacheWriter, prepared: Prepared, pending: Pending) -> Task:
    """A shard with what is to be decoded for it. Raises as `tasks_of`."""
    return Task(pending.shard, pending.parts, _requests(writer, prepared, pending.shard))


def _requests(writer: CacheWriter, prepared: Prepared, shard: Shard) -> tuple[Request, ...]:
    group = writer.manifest.group(shard.group)
    positions = prepared.positions[group.split]
    ids = writer.samples(shard)
    if lost := [i for i in ids if i not in positions]:
        raise DataError(
            f"{len(lost)} samples of the cache are not in {prepared.job.root} (first: {lost[0]!r}); "
            "restore the data, or extract into another --cache"
        )
    return tuple(Request(group.split, positions[i], shard.view, group.canvas) for i in ids)


def claimed(writer: CacheWriter, tasks: list[Task]) -> Iterator[Task]:
    """The tasks that this process could claim, claimed as they are asked for, without the parts done by then.

    In order, as long as no other process is met. Where many share a cache, a look at all claims and commits takes the
    place of a question for each shard of the others, and each process takes one of the next free shards at random, so
    that they do not all ask for the same one. What others held is asked for at the end: its holder may be dead.
    """
    free, later, look = list(tasks), list[Task](), _Look(writer)
    choose = random.Random(writer.claims.token)
    while free:
        task = free.pop(choose.randrange(min(len(free), SPREAD * len(look.held) + 1)))
        if found := _claim(writer, task):
            yield found
            continue
        later.append(task)
        if look.again():
            later = [t for t in (*later, *free) if _place(t) in look.held]
            free = [t for t in free if _place(t) not in look.held and not look.at_end(t)]
    for task in later:
        if found := _claim(writer, task):
            yield found


def _place(task: Task) -> tuple[str, int]:
    return task.shard.group, task.shard.index


def _claim(writer: CacheWriter, task: Task) -> Task | None:
    if not writer.claims.acquire(task.shard.group, task.shard.index):
        return None
    # Another process may have finished it between the listing and the claim, or have died in the midst of it.
    left = tuple(part for part in task.parts if not _committed(writer.storage, task.shard, part))
    if not left:
        writer.claims.release(task.shard.group, task.shard.index)
        return None
    return replace(task, parts=left)


class _Look:
    """Which shards others held, and which parts of shards were committed, when this process last looked."""

    def __init__(self, writer: CacheWriter) -> None:
        self._writer, self._next = writer, 0.0
        self.held: set[tuple[str, int]] = set()
        self.done: set[tuple[str, int, str]] = set()

    def at_end(self, task: Task) -> bool:
        """Whether nothing is left to do of a task."""
        return all((*_place(task), part) in self.done for part in task.parts)

    def again(self) -> bool:
        """Looks, unless that would take a notable share of the time; says whether it did."""
        started = time.monotonic()
        if started < self._next:
            return False
        manifest, names = self._writer.manifest, self._writer.storage.names
        self.held, self.done = set(), set()
        for group in manifest.groups:
            self.held |= {(group.path, i) for i in _numbers(names(claim_folder(group.path)))}
            for part in manifest.parts():
                folder = commit_path(group.path, part, 0).rpartition("/")[0]
                self.done |= {(group.path, i, part) for i in _numbers(names(folder))}
        now = time.monotonic()
        self._next = now + LOOK_SHARE * (now - started)
        return True


def _numbers(names: Iterable[str]) -> Iterator[int]:
    return (int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdecimal())


def _committed(storage: Storage, shard: Shard, part: str) -> bool:
    return find_commit(storage, commit_path(shard.group, part, shard.index)) is not None
