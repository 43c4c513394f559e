"""The worker's side of the dask engine: a plugin that holds the open extraction, and the calls that are sent to it."""

import threading
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from distributed import Worker, WorkerPlugin, get_worker

from fcache.cache_spec import FcacheError
from fcache.extractor.engines.local import started
from fcache.extractor.events import BatchDone, Event, WorkerEvent
from fcache.extractor.extraction import Extraction, open_extraction
from fcache.extractor.job import Job
from fcache.extractor.pipeline import Stopped, extract_shards
from fcache.extractor.work import Pending, claimed, task_of, tasks_of


class OnWorker(WorkerPlugin):
    """A job on a worker: opened when its first shard comes, closed with the worker or the run."""

    def __init__(self, job: Job, device: str | None) -> None:
        self._job, self._device = job, device

    def setup(self, worker: Worker) -> None:
        """Called by dask in the worker, also after its restart."""
        self._worker = worker
        self._lock, self._open, self._busy = threading.Lock(), ExitStack(), 0
        self._extraction: Extraction | None = None
        self.stop = threading.Event()

    def teardown(self, worker: Worker) -> None:
        """Called by dask when the worker or the run ends."""
        self.stop.set()
        with self._lock:
            if not self._busy:
                self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"_job": self._job, "_device": self._device}

    def begin(self) -> Extraction:
        """The extraction, opened if it is not yet; `end` must follow. A job that does nothing any more makes room."""
        with self._lock:
            if self._extraction is None:
                for other in list(self._worker.plugins.values()):
                    if isinstance(other, OnWorker) and other is not self:
                        other.make_room()
                device = self._device or ("cuda" if torch.cuda.is_available() else "cpu")
                if device == "cpu":
                    torch.set_num_threads(self._worker.state.nthreads)
                self._extraction = self._open.enter_context(open_extraction(replace(self._job, device=device)))
            self._busy += 1
            return self._extraction

    def end(self) -> None:
        """A task is done with the extraction."""
        with self._lock:
            self._busy -= 1
            if self.stop.is_set() and not self._busy:
                self.close()

    def make_room(self) -> None:
        """Closes the job if no task of it runs: what its client left behind must not keep a device's memory."""
        # Never waited for: two jobs may want each other's room.
        if self._lock.acquire(blocking=False):
            try:
                if not self._busy:
                    self.close()
            finally:
                self._lock.release()

    def close(self) -> None:
        """Gives back what the job holds."""
        self._extraction = None
        self._open.close()


# What a task answers: events, or an error that another try would meet, too.
Answer = tuple[Event | WorkerEvent, ...] | FcacheError


def begin(name: str) -> Answer:
    """On a worker: creates or grows the cache."""
    plugin: Any = get_worker().plugins[name]
    try:
        extraction: Extraction = plugin.begin()
    except FcacheError as e:
        return e
    try:
        return (started(extraction, tasks_of(extraction.writer, extraction.prepared)),)
    finally:
        plugin.end()


def shard(name: str, pending: Pending) -> Answer:
    """On a worker: extracts one shard, if it is not claimed or committed by then."""
    plugin: Any = get_worker().plugins[name]
    events: list[WorkerEvent] = []
    try:
        extraction: Extraction = plugin.begin()
        try:
            task = task_of(extraction.writer, extraction.prepared, pending)
            shards = claimed(extraction.writer, [task])
            extract_shards(extraction, shards, report=events.append, should_stop=plugin.stop.is_set)
        finally:
            plugin.end()
    except Stopped:
        return ()
    except FcacheError as e:
        return e
    records = sum(e.records for e in events if isinstance(e, BatchDone))
    return (BatchDone(records), *(e for e in events if not isinstance(e, BatchDone)))


def stop(name: str, dask_worker: Worker) -> None:
    """On a worker, beside its tasks: they end after their batch."""
    plugin: Any = dask_worker.plugins.get(name)
    if plugin is not None:
        plugin.stop.set()
