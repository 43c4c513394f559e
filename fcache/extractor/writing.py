"""The way of a batch from the device to the disk, and of a shard to its commit, beside the computation."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fcache.cache_spec import ShardWriter
from fcache.cache_spec.encodings import find_encoding
from fcache.cache_spec.layout import FEATURES
from fcache.extractor.encode import Coded, LevelFacts
from fcache.extractor.events import ShardCommitted, WorkerEvent
from fcache.extractor.recheck import backbone_fingerprint
from fcache.extractor.work import Task

if TYPE_CHECKING:
    from fcache.extractor.extraction import Extraction

# Batches that may wait for the writer: enough to hide a slow fsync, little memory.
QUEUED_BATCHES = 4


@dataclass
class OpenShard:
    """A shard that is being written: one writer a part, and what its commit will say."""

    task: Task
    writers: dict[str, ShardWriter]
    facts: LevelFacts = field(default_factory=LevelFacts)


class WriteQueue:
    """The bounded way from the backbone to the disk; errors of the writer threads surface here.

    Appending is ordered, in one thread; commits wait for the disk in a second one, so that appending goes on.
    """

    def __init__(
        self,
        append: ThreadPoolExecutor,
        commit: ThreadPoolExecutor,
        extraction: "Extraction",
        report: Callable[[WorkerEvent], None],
    ) -> None:
        self._append, self._commit, self._extraction, self._report = append, commit, extraction, report
        self._print = backbone_fingerprint(extraction.prepared)
        self._appended: list[Future[None]] = []
        self._committed: list[Future[None]] = []
        self._open: list[OpenShard] = []
        self._current: OpenShard

    def open(self, shard: OpenShard) -> None:
        """Begins a shard; waits while more than one is being committed."""
        while len(self._committed) > 1:
            self._committed.pop(0).result()
        self._current = shard
        self._open.append(shard)

    def append(self, positions: list[int], arrays: dict[str, Mapping[str, Any]], coded: Future[Coded] | None) -> None:
        """Queues records of the current shard; waits while too many batches are queued."""
        while len(self._appended) >= QUEUED_BATCHES:
            self._appended.pop(0).result()
        self._appended.append(self._append.submit(_write, self._current, positions, arrays, coded))

    def skip(self, position: int, reason: str) -> None:
        """Queues a record that is left out."""
        for writer in self._current.writers.values():
            self._appended.append(self._append.submit(writer.skip, position, reason))

    def close(self) -> None:
        """Queues the commit of the current shard."""
        shard, appended = self._current, self._append.submit(lambda: None)
        self._committed.append(self._commit.submit(self._finish, shard, [*self._appended, appended]))

    def _finish(self, shard: OpenShard, appended: list[Future[None]]) -> None:
        for future in appended:
            future.result()
        task, writer = shard.task, self._extraction.writer
        # Targets first, so that committed features always have theirs.
        for part in sorted(task.parts, key=lambda p: p == FEATURES):
            facts = shard.facts.as_json() if part == FEATURES else {}
            group = writer.manifest.group(task.shard.group)
            fitted = part == FEATURES and find_encoding(group.encoding).fit is not None
            commit = shard.writers[part].commit(
                facts=facts,
                fingerprint=self._print if part == FEATURES else {},
                tables=self._extraction.tables.digest if fitted else "",
            )
            size = sum(n for n, _ in commit.files.values())
            self._report(ShardCommitted(task.shard.group, part, task.shard.index, size))
        self._open.remove(shard)
        writer.claims.release(task.shard.group, task.shard.index)

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


def _write(
    shard: OpenShard, positions: list[int], arrays: dict[str, Mapping[str, Any]], coded: Future[Coded] | None
) -> None:
    """Appends a batch to the parts of its shard, as soon as it is encoded and on the host."""
    if coded is not None:
        arrays[FEATURES] = {**coded.result().stored(shard.facts), **arrays[FEATURES]}
    for part, named in arrays.items():
        shard.writers[part].append(positions, named)
