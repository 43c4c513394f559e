"""From claimed shards to committed ones: decoding, backbone, encoding and writing, each beside the others."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fcache.cache_spec import DataError, index_arrays
from fcache.cache_spec.layout import FEATURES
from fcache.extractor.decoding import Decoded, Request
from fcache.extractor.encode import Coded, begin_encoding
from fcache.extractor.events import BatchDone, SampleQuarantined, TimeSpent, WorkerEvent
from fcache.extractor.forward import features_of
from fcache.extractor.work import Task
from fcache.extractor.writing import OpenShard, WriteQueue

if TYPE_CHECKING:
    from fcache.extractor.extraction import Extraction


class Stopped(Exception):
    """The run was asked to stop; what was committed stays."""


def extract_shards(
    extraction: "Extraction",
    tasks: Iterable[Task],
    *,
    report: Callable[[WorkerEvent], None],
    should_stop: Callable[[], bool],
) -> None:
    """Extracts claimed shards one after another; returns when all of them are committed and their claims given back.

    `tasks` is drawn from lazily. Threads may do this at the same time: one of them computes, others finish writing.
    Raises Stopped when `should_stop` turned true, and FcacheError; shards that are not committed then stay pending.
    """
    taken: list[Task] = []

    def requests() -> Iterator[Request]:
        for task in tasks:
            taken.append(task)
            yield from task.requests

    with (
        ThreadPoolExecutor(1, "fcache-encode") as encode,
        ThreadPoolExecutor(1, "fcache-append") as append,
        ThreadPoolExecutor(1, "fcache-commit") as commit,
    ):
        run = _Run(extraction, report, should_stop, encode, WriteQueue(append, commit, extraction, report))
        try:
            with extraction.turn, closing(extraction.decoders.stream(requests())) as decoded:
                for number, first in enumerate(run.timed(decoded)):
                    run.shard(taken[number], first, decoded)
            with run.clock.spending("writing"):
                run.queue.drain()
            report(run.clock.take())
        except BaseException:
            run.queue.cancel()
            for task in taken:
                extraction.writer.claims.release(task.shard.group, task.shard.index)
            raise


class _Clock:
    """What a thread spends its time on."""

    def __init__(self) -> None:
        self._spent = TimeSpent()

    @contextmanager
    def spending(self, what: str) -> Generator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._spent += TimeSpent(**{what: time.perf_counter() - started})

    def take(self) -> TimeSpent:
        """What was spent since the last call."""
        spent, self._spent = self._spent, TimeSpent()
        return spent


@dataclass
class _Run:
    """The computing side of `extract_shards`."""

    extraction: "Extraction"
    report: Callable[[WorkerEvent], None]
    should_stop: Callable[[], bool]
    encode: ThreadPoolExecutor
    queue: WriteQueue
    clock: _Clock = field(default_factory=_Clock)
    before: Future[Coded] | None = None

    def timed(self, decoded: Iterator[Decoded]) -> Iterator[Decoded]:
        """The records, while the time that they take is counted."""
        while True:
            with self.clock.spending("decoding"):
                found = next(decoded, None)
            if found is None:
                return
            yield found

    def shard(self, task: Task, first: Decoded, rest: Iterator[Decoded]) -> None:
        """Extracts one shard; its commit is queued."""
        writer, shard = self.extraction.writer, OpenShard(task, {})
        group, rest = writer.manifest.group(task.shard.group), self.timed(rest)
        with self.clock.spending("writing"):
            self.queue.open(shard)
            # One by one, so that those that are open are aborted if the disk has no room for the next.
            for part in task.parts:
                shard.writers[part] = writer.write(task.shard, part)
        for start in range(0, task.shard.count, group.batch):
            if self.should_stop():
                raise Stopped
            positions = range(start, min(start + group.batch, task.shard.count))
            self._batch(task, positions, [first if p == 0 else next(rest) for p in positions])
            self.report(BatchDone(len(positions)))
        self.queue.close()
        self.report(self.clock.take())

    def _batch(self, task: Task, positions: range, batch: list[Decoded]) -> None:
        group = self.extraction.writer.manifest.group(task.shard.group)
        good = [(p, d) for p, d in zip(positions, batch, strict=True) if d.failure is None]
        for position, d in zip(positions, batch, strict=True):
            if d.failure is not None:
                self._refuse(group.ids[task.shard.sample + position], d)
                self.queue.skip(position, d.failure)
        if not good:
            return
        kept = [p for p, _ in good]
        coded, arrays = None, dict[str, Mapping[str, Any]]()
        if FEATURES in task.parts:
            with self.clock.spending("computing"):
                coded = self._compute(task, good)
            samples = [task.shard.sample + p for p in kept]
            arrays[FEATURES] = index_arrays([_present(d.view) for _, d in good], samples, [task.shard.view] * len(kept))
        for part in task.parts:
            if part != FEATURES:
                names = [a.path for a in group.target_arrays(part) if not a.path.endswith(".count")]
                arrays[part] = {n: [_present(d.targets)[n] for _, d in good] for n in names}
        with self.clock.spending("writing"):
            self.queue.append(kept, arrays, coded)

    def _compute(self, task: Task, good: list[tuple[int, Decoded]]) -> Future[Coded]:
        """Begins a batch on the device and waits for the one before it, so that the device always has work."""
        extraction, backbone = self.extraction, self.extraction.prepared.backbone
        group = extraction.writer.manifest.group(task.shard.group)
        images = [torch.from_numpy(_present(d.image)) for _, d in good]
        ids = tuple(group.ids[task.shard.sample + p] for p, _ in good)
        features = features_of(images, group.canvas, backbone)
        if self.before is not None:
            self.before.result().wait()
        begin = partial(begin_encoding, features, group, ids, tables=extraction.device_tables)
        if backbone.device.type == "cpu":
            self.before = self.encode.submit(begin)
        else:
            # A device computes beside this thread anyway.
            self.before = Future()
            self.before.set_result(begin())
        return self.before

    def _refuse(self, sample: str, d: Decoded) -> None:
        if d.unreadable:
            raise DataError(f"{d.failure}: reading failed repeatedly; check the disk and run the same command again")
        if self.extraction.prepared.job.on_error == "fail":
            raise DataError(f"sample {sample!r}: {d.failure}; --on-error quarantine leaves such samples out")
        self.report(SampleQuarantined(sample, str(d.failure)))


def _present(value: Any) -> Any:
    assert value is not None, "a record without failure is whole"
    return value
