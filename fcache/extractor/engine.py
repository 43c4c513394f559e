"""Extraction from the outside: one call, an engine that divides the work, one result."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fcache.cache_spec import open_cache
from fcache.cache_spec.storage.protocol import open_storage
from fcache.cache_spec.store import read_manifest
from fcache.cache_spec.writer import CacheWriter
from fcache.extractor.engines import Engine
from fcache.extractor.engines.local import local
from fcache.extractor.events import (
    BatchDone,
    Event,
    ExtractionStarted,
    RecordsDone,
    ShardCommitted,
    TimeSpent,
    WorkerEvent,
)
from fcache.extractor.job import Job


@dataclass(frozen=True)
class ExtractResult:
    """What a run did: parts of shards it committed, records it made, and what is quarantined in the whole cache.

    `spent` are the seconds of all its processes together, by what they waited for.
    """

    shards: int
    records: int
    seconds: float
    quarantined: Mapping[str, str]
    pending: int
    spent: TimeSpent


def extract(
    job: Job,
    *,
    report: Callable[[Event], None],
    should_stop: Callable[[], bool] = lambda: False,
    engine: Engine = local,
) -> ExtractResult:
    """Extracts what a job asks for and the cache does not have yet; the same call again continues.

    `engine` says who does the work: this process (`local`), one process a device (`on_devices`) or the workers of a
    dask cluster (`on_cluster`); the bytes of the cache are the same. Raises Stopped when `should_stop` turned true,
    and FcacheError of the kind that fits; shards that are not committed then stay pending.
    """
    started = time.monotonic()
    counts = _Counts(report, started)
    engine(job, counts.report, should_stop)
    storage = open_storage(job.cache)
    writer = CacheWriter(storage, read_manifest(storage))
    pending = sum(len(writer.pending(part)) for part in writer.manifest.parts())
    if pending == 0:
        writer.finish()
    reader = open_cache(job.cache, allow_partial=True)
    quarantined = {i: reason for split in reader.splits for i, reason in reader.quarantined(split).items()}
    seconds = time.monotonic() - started
    return ExtractResult(counts.shards, counts.records, seconds, quarantined, pending, counts.spent)


class _Counts:
    """Adds up what the processes of an engine tell, and passes on what a user wants to know. Threads may share one."""

    def __init__(self, report: Callable[[Event], None], started: float) -> None:
        self._report, self._started, self._lock = report, started, threading.Lock()
        self.shards = self.records = self._total = 0
        self.spent = TimeSpent()

    def report(self, event: Event | WorkerEvent) -> None:
        """Counts an event."""
        with self._lock:
            if isinstance(event, TimeSpent):
                self.spent += event
                return
            if isinstance(event, BatchDone):
                self.records += event.records
                event = RecordsDone(self.records, self._total, time.monotonic() - self._started)
            elif isinstance(event, ExtractionStarted):
                self._total = event.records
            elif isinstance(event, ShardCommitted):
                self.shards += 1
        self._report(event)
