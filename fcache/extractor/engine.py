"""The local engine: claims shards, decodes, runs the backbone, encodes, writes; can be killed at any moment."""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from fcache.cache_spec import CacheWriter, DataError, NoSpaceError, ShardWriter, index_arrays, open_cache, open_writer
from fcache.cache_spec.encodings import find_encoding
from fcache.cache_spec.layout import FEATURES
from fcache.cache_spec.tables import FittedTables
from fcache.extractor.decoding import Decoded, decode
from fcache.extractor.encode import LevelFacts, Tables, encode_batch, tables_on
from fcache.extractor.events import (
    DataNoted,
    Event,
    ExtractionStarted,
    RecordsDone,
    SampleQuarantined,
    ShardCommitted,
    WaitingForOthers,
)
from fcache.extractor.fit import fit_tables
from fcache.extractor.forward import features_of
from fcache.extractor.job import Job
from fcache.extractor.plan import RESERVE_BYTES, Plan, plan_of
from fcache.extractor.prepare import Prepared, prepare
from fcache.extractor.recheck import backbone_fingerprint, recheck
from fcache.extractor.work import Task, claimed, tasks_of

POLL_SECONDS = 1.0
# Batches that may wait for the writer: enough to hide a slow fsync, little memory.
QUEUED_BATCHES = 4


class Stopped(Exception):
    """The run was asked to stop; what was committed stays."""


@dataclass(frozen=True)
class ExtractResult:
    """What a run did: parts of shards it committed, records it made, and what is quarantined in the whole cache."""

    shards: int
    records: int
    seconds: float
    quarantined: Mapping[str, str]
    pending: int


def extract(
    job: Job, *, report: Callable[[Event], None], should_stop: Callable[[], bool] = lambda: False
) -> ExtractResult:
    """Extracts what a job asks for and the cache does not have yet; the same call again continues.

    Raises Stopped when `should_stop` turned true, and FcacheError of the kind that fits; shards that are not
    committed then stay pending.
    """
    started = time.monotonic()
    prepared = prepare(job)
    plan = plan_of(prepared)
    check_space(plan)
    writer = open_writer(job.cache, prepared.wanted)
    with writer.claims.beating():
        try:
            tables = fit_tables(prepared, writer)
            tasks = tasks_of(writer, prepared)
            recheck(writer, prepared, tasks)
            run = _Run(prepared, writer, tables, report, should_stop, started)
            run.announce(tasks, plan)
            while tasks:
                run.do(tasks)
                tasks = tasks_of(writer, prepared)
                if tasks:
                    report(WaitingForOthers(len(tasks)))
                    _wait(should_stop)
            pending = sum(len(writer.pending(part)) for part in writer.manifest.parts())
        finally:
            writer.claims.release_all()
    if pending == 0:
        writer.finish()
    reader = open_cache(job.cache, allow_partial=True)
    quarantined = {i: reason for split in reader.splits for i, reason in reader.quarantined(split).items()}
    return ExtractResult(run.shards, run.records, time.monotonic() - started, quarantined, pending)


def check_space(plan: Plan) -> None:
    """Raises NoSpaceError if what is pending does not fit on the disk."""
    if plan.free_bytes is not None and not plan.fits:
        raise NoSpaceError(
            f"{plan.pending_bytes / 1e6:.0f} MB and a reserve of {RESERVE_BYTES / 1e6:.0f} MB are needed at "
            f"{plan.cache}, {plan.free_bytes / 1e6:.0f} MB are free; free some space, or extract fewer levels "
            "(--levels), views (--views) or samples (--subset)"
        )


def _wait(should_stop: Callable[[], bool]) -> None:
    until = time.monotonic() + POLL_SECONDS
    while time.monotonic() < until:
        if should_stop():
            raise Stopped
        time.sleep(0.1)


@dataclass
class _Open:
    """A shard that is being written: one writer a part, and what its commit will say."""

    task: Task
    writers: dict[str, ShardWriter]
    facts: LevelFacts = field(default_factory=LevelFacts)


@dataclass
class _Run:
    """One run of the engine."""

    prepared: Prepared
    writer: CacheWriter
    tables: FittedTables
    report: Callable[[Event], None]
    should_stop: Callable[[], bool]
    started: float
    shards: int = 0
    records: int = 0
    total: int = 0

    @cached_property
    def _device_tables(self) -> Tables:
        return tables_on(self.tables.levels, self.prepared.backbone.device)

    def announce(self, tasks: list[Task], plan: Plan) -> None:
        """Reports what is to do."""
        self.total = sum(len(t.requests) for t in tasks)
        for split in self.prepared.splits.values():
            for note in split.notes:
                self.report(DataNoted(note))
        self.report(ExtractionStarted(self.total, plan.records - plan.pending_records, plan.pending_bytes))

    def do(self, tasks: list[Task]) -> None:
        """Works on those tasks that this process can claim."""
        taken: list[Task] = []

        def requests() -> Iterator[Any]:
            for task in claimed(self.writer, tasks):
                taken.append(task)
                yield from task.requests

        decoded = decode(self.prepared.decoder, requests(), workers=self.prepared.job.decoders)
        print_ = backbone_fingerprint(self.prepared)
        with ThreadPoolExecutor(1, "fcache-append") as append, ThreadPoolExecutor(1, "fcache-commit") as commit:
            queue = _Queue(append, commit, self, print_)
            try:
                for number, first in enumerate(decoded):
                    self._shard(taken[number], first, decoded, queue)
                queue.drain()
            except BaseException:
                queue.cancel()
                raise

    def _shard(self, task: Task, first: Decoded, rest: Iterator[Decoded], queue: "_Queue") -> None:
        group = self.writer.manifest.group(task.shard.group)
        shard = _Open(task, {})
        queue.open(shard)
        # One by one, so that those that are open are aborted if the disk has no room for the next.
        for part in task.parts:
            shard.writers[part] = self.writer.write(task.shard, part)
        for start in range(0, task.shard.count, group.batch):
            if self.should_stop():
                raise Stopped
            positions = range(start, min(start + group.batch, task.shard.count))
            batch = [first if p == 0 else next(rest) for p in positions]
            self._batch(task, positions, batch, queue)
            self.records += len(batch)
            self.report(RecordsDone(self.records, self.total, time.monotonic() - self.started))
        queue.close()

    def _batch(self, task: Task, positions: range, batch: list[Decoded], queue: "_Queue") -> None:
        group = self.writer.manifest.group(task.shard.group)
        good = [(p, d) for p, d in zip(positions, batch, strict=True) if d.failure is None]
        for position, d in zip(positions, batch, strict=True):
            if d.failure is not None:
                self._refuse(group.ids[task.shard.sample + position], d)
                queue.skip(position, d.failure)
        if not good:
            return
        kept = [p for p, _ in good]
        ids = tuple(group.ids[task.shard.sample + p] for p in kept)
        arrays: dict[str, Mapping[str, Any]] = {}
        if FEATURES in task.parts:
            images = [torch.from_numpy(_present(d.image)) for _, d in good]
            features = features_of(images, group.canvas, self.prepared.backbone)
            views = [_present(d.view) for _, d in good]
            samples = [task.shard.sample + p for p in kept]
            arrays[FEATURES] = {
                **encode_batch(features, group, ids, queue.current.facts, tables=self._device_tables),
                **index_arrays(views, samples, [task.shard.view] * len(kept)),
            }
        for part in task.parts:
            if part != FEATURES:
                names = [a.path for a in group.target_arrays(part) if not a.path.endswith(".count")]
                arrays[part] = {n: [_present(d.targets)[n] for _, d in good] for n in names}
        queue.append(kept, arrays)

    def _refuse(self, sample: str, d: Decoded) -> None:
        if d.unreadable:
            raise DataError(f"{d.failure}: reading failed repeatedly; check the disk and run the same command again")
        if self.prepared.job.on_error == "fail":
            raise DataError(f"sample {sample!r}: {d.failure}; --on-error quarantine leaves such samples out")
        self.report(SampleQuarantined(sample, str(d.failure)))


def _present(value: Any) -> Any:
    assert value is not None, "a record without failure is whole"
    return value


class _Queue:
    """The bounded way from the backbone to the disk; errors of the writer threads surface here.

    Appending is ordered, in one thread; commits wait for the disk in a second one, so that appending goes on.
    """

    def __init__(self, append: ThreadPoolExecutor, commit: ThreadPoolExecutor, run: _Run, print_: Any) -> None:
        self._append, self._commit, self._run, self._print = append, commit, run, print_
        self._appended: list[Future[None]] = []
        self._committed: list[Future[None]] = []
        self._open: list[_Open] = []
        self.current: _Open

    def open(self, shard: _Open) -> None:
        """Begins a shard; waits while more than one is being committed."""
        while len(self._committed) > 1:
            self._committed.pop(0).result()
        self.current = shard
        self._open.append(shard)

    def append(self, positions: list[int], arrays: Mapping[str, Mapping[str, Any]]) -> None:
        """Queues records of the current shard; waits while too many batches are queued."""
        while len(self._appended) >= QUEUED_BATCHES:
            self._appended.pop(0).result()
        for part, named in arrays.items():
            self._appended.append(self._append.submit(self.current.writers[part].append, positions, named))

    def skip(self, position: int, reason: str) -> None:
        """Queues a record that is left out."""
        for writer in self.current.writers.values():
            self._appended.append(self._append.submit(writer.skip, position, reason))

    def close(self) -> None:
        """Queues the commit of the current shard."""
        shard, appended = self.current, self._append.submit(lambda: None)
        self._committed.append(self._commit.submit(self._finish, shard, [*self._appended, appended]))

    def _finish(self, shard: _Open, appended: list[Future[None]]) -> None:
        for future in appended:
            future.result()
        task = shard.task
        # Targets first, so that committed features always have theirs.
        for part in sorted(task.parts, key=lambda p: p == FEATURES):
            facts = shard.facts.as_json() if part == FEATURES else {}
            group = self._run.writer.manifest.group(task.shard.group)
            fitted = part == FEATURES and find_encoding(group.encoding).fit is not None
            commit = shard.writers[part].commit(
                facts=facts,
                fingerprint=self._print if part == FEATURES else {},
                tables=self._run.tables.digest if fitted else "",
            )
            self._run.shards += 1
            size = sum(n for n, _ in commit.files.values())
            self._run.report(ShardCommitted(task.shard.group, part, task.shard.index, size))
        self._open.remove(shard)
        self._run.writer.claims.release(task.shard.group, task.shard.index)

    def drain(self) -> None:
        """Waits until everything is on disk."""
        for future in (*self._appended, *self._committed):
            future.result()

    def cancel(self) -> None:
        """Drops what is queued and removes what was half-written."""
        self._append.shutdown(wait=True, cancel_futures=True)
        self._commit.shutdown(wait=True, cancel_futures=True)
        for shard in self._open:
            for writer in shard.writers.values():
                writer.abort()
