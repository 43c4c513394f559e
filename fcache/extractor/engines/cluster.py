"""The engine of a dask cluster: every worker opens the extraction once, a task is the number of one shard.

Workers write to the cache themselves and answer with a few numbers; nothing large goes through the scheduler. A task
may run again, or twice at once, after a worker was lost: claims keep work from being done twice, and what is written
again has equal bytes. This module imports distributed, which the other engines do not need.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from distributed import Client, Future, KilledWorker, as_completed
from distributed.client import FutureCancelledError

from fcache.cache_spec import DataError, FcacheError, open_storage
from fcache.cache_spec.store import read_manifest
from fcache.cache_spec.writer import CacheWriter
from fcache.extractor.engines import Engine
from fcache.extractor.engines.dask_worker import Answer, OnWorker, begin, shard, stop
from fcache.extractor.events import Event, WaitingForOthers, WaitingForWorkers, WorkerEvent, WorkerLost
from fcache.extractor.extraction import wait
from fcache.extractor.job import Job
from fcache.extractor.pipeline import Stopped
from fcache.extractor.work import pending_shards

CONNECT_SECONDS = 15
POLL_SECONDS = 0.05
# How often the list of workers is asked for.
WORKERS_SECONDS = 2.0
# What fails for another reason than the data (a device out of memory) is tried again, perhaps elsewhere.
RETRIES = 2
GPU = "GPU"


def on_cluster(address: str, *, device: str | None = None) -> Engine:
    """An engine over the workers of the dask scheduler at `address`, which see data, weights and cache at equal paths.

    Each worker computes on `device` (None: its first GPU, else the CPU, with as many threads as it has). Where workers
    declare the resource GPU, a shard takes one. Needs the package distributed.
    """
    return partial(_extract, address, device)


def _extract(
    address: str,
    device: str | None,
    job: Job,
    report: Callable[[Event | WorkerEvent], None],
    should_stop: Callable[[], bool],
) -> None:
    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as e:
        raise DataError(f"no dask scheduler answers at {address}: {e}; start one (`dask scheduler`)") from e
    # A name of this client's own: two commands on one cluster do not meet.
    run = _Run(client, address, f"fcache-{client.id}", job, report, should_stop)
    try:
        client.register_plugin(OnWorker(job, device), name=run.name)
        run.lead()
    except (OSError, TimeoutError) as e:
        raise run.scheduler_lost() from e
    finally:
        # One that is gone would be waited for, again at every call.
        if there := client.status == "running":
            client.unregister_worker_plugin(run.name)
        # What the run ended with must not be hidden by a close that takes long.
        with suppress(TimeoutError):
            client.close(timeout=CONNECT_SECONDS if there else 0.1)


@dataclass
class _Run:
    """One extraction, led from this process."""

    client: Client
    address: str
    name: str
    job: Job
    report: Callable[[Event | WorkerEvent], None]
    should_stop: Callable[[], bool]
    workers: dict[str, Any] = field(default_factory=dict)
    asked: float = 0.0

    def lead(self) -> None:
        """Returns when everything is committed. Raises Stopped, FcacheError."""
        flying: set[Future] = set()
        ready = as_completed((), loop=self.client.loop)
        try:
            self._fly(ready, flying, [partial(begin, self.name)])
            storage = open_storage(self.job.cache)
            writer = CacheWriter(storage, read_manifest(storage))
            number = 0
            while pending := pending_shards(writer, self.job):
                self._fly(ready, flying, [partial(shard, self.name, p) for p in pending])
                number += 1
                looked = time.monotonic()
                if left := pending_shards(writer, self.job):
                    self.report(WaitingForOthers(len(left)))
                    wait(time.monotonic() - looked, self.should_stop)
        except Stopped:
            self.client.run(stop, self.name)
            while flying:
                if not self._land(ready, flying):
                    time.sleep(POLL_SECONDS)
            raise
        finally:
            if flying and self.client.status == "running":
                self.client.cancel(list(flying))

    def _fly(self, ready: as_completed, flying: set[Future], calls: list[Callable[[], Answer]]) -> None:
        """Runs calls on the workers, a few more at a time than there are threads, until all have answered."""
        calls = list(reversed(calls))
        while calls or flying:
            if self.should_stop():
                raise Stopped
            self._look()
            threads = sum(w["nthreads"] for w in self.workers.values())
            while calls and len(flying) < 2 * max(1, threads):
                future = self.client.submit(calls.pop(), pure=False, retries=RETRIES, resources=self._resources())
                flying.add(future)
                ready.add(future)
            if not self._land(ready, flying):
                time.sleep(POLL_SECONDS)

    def _land(self, ready: as_completed, flying: set[Future]) -> bool:
        """Takes the answers that have come. Raises the first error."""
        if self.client.status != "running":
            raise self.scheduler_lost()
        landed: list[Any] = ready.next_batch(block=False)
        for future in landed:
            flying.discard(future)
            try:
                answer: Answer = future.result()
            except KilledWorker as e:
                raise DataError(
                    f"dask gave up on a shard: {e.allowed_failures + 1} workers died while they had it, perhaps for "
                    "lack of memory; give them more, or lower --batch-size and --workers, and run the same again"
                ) from e
            except FutureCancelledError as e:
                raise self.scheduler_lost() from e
            except Exception as e:
                raise DataError(
                    f"a shard failed on the workers {RETRIES + 1} times, at last with {type(e).__name__}: {e}; what is "
                    "committed stays: mend the cause and run the same command again"
                ) from e
            finally:
                future.release()
            if isinstance(answer, FcacheError):
                raise answer
            for event in answer:
                self.report(event)
        return bool(landed)

    def _look(self) -> None:
        """Looks for workers that came or went, now and then."""
        if time.monotonic() - self.asked < WORKERS_SECONDS:
            return
        found: dict[str, Any] = self.client.scheduler_info()["workers"]
        for gone in self.workers.keys() - found.keys():
            self.report(WorkerLost(gone, "left the cluster"))
        self.workers, self.asked = found, time.monotonic()
        if not found:
            self.report(WaitingForWorkers())

    def _resources(self) -> dict[str, float] | None:
        declared = any(GPU in w["resources"] for w in self.workers.values())
        return {GPU: 1} if declared else None

    def scheduler_lost(self) -> DataError:
        """The error of a run whose scheduler went away."""
        return DataError(
            f"the dask scheduler at {self.address} is gone; what is committed stays: start it again and run the same "
            "command"
        )
