"""An extraction as one process has it open: data, backbone, cache and decoders, made once from a job."""

import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch

from fcache.cache_spec import CacheWriter, NoSpaceError, open_writer
from fcache.cache_spec.tables import FittedTables
from fcache.extractor.batching import with_batches
from fcache.extractor.decoding import Decoders
from fcache.extractor.devices import check_device
from fcache.extractor.encode import Tables, tables_on
from fcache.extractor.events import WaitingForOthers, WorkerEvent
from fcache.extractor.fit import fit_tables
from fcache.extractor.job import Job
from fcache.extractor.pipeline import Stopped, extract_shards
from fcache.extractor.plan import RESERVE_BYTES, Plan, plan_of
from fcache.extractor.prepare import Prepared, prepare
from fcache.extractor.recheck import recheck
from fcache.extractor.work import claimed, tasks_of

# How long to wait for others, at least: a look at what is left takes half of the time at most.
POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Extraction:
    """What a process needs to extract any shard of a job. `turn` is held by the thread that decodes and computes."""

    prepared: Prepared
    writer: CacheWriter
    tables: FittedTables
    decoders: Decoders
    plan: Plan
    turn: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def device_tables(self) -> Tables:
        """The fitted tables on the backbone's device."""
        return tables_on(self.tables.levels, self.prepared.backbone.device)


@contextmanager
def open_extraction(job: Job) -> Generator[Extraction]:
    """Opens all that a job names, creates or grows its cache, and keeps the claims of this process alive.

    Raises FcacheError of the kind that fits before anything is extracted: see `prepare`, `open_writer`, `fit_tables`
    and `recheck`; SpecError if the device is not there or cannot compute in the job's precision.
    """
    check_device(job.device, job.precision)
    if (device := torch.device(job.device)).type == "cuda":
        # Pinned memory belongs to the current device.
        torch.cuda.set_device(device)
    prepared = with_batches(prepare(job))
    plan = plan_of(prepared)
    check_space(plan)
    writer = open_writer(job.cache, prepared.wanted)
    batch = max(g.batch for g in writer.manifest.groups)
    with writer.claims.beating(), Decoders(prepared.decoder, job.decoders(), batch=batch) as decoders:
        try:
            extraction = Extraction(prepared, writer, fit_tables(prepared, writer), decoders, plan)
            recheck(writer, prepared, tasks_of(writer, prepared))
            yield extraction
        finally:
            writer.claims.release_all()


def check_space(plan: Plan) -> None:
    """Raises NoSpaceError if what is pending does not fit on the disk."""
    if plan.free_bytes is not None and not plan.fits:
        raise NoSpaceError(
            f"{plan.pending_bytes / 1e6:.0f} MB and a reserve of {RESERVE_BYTES / 1e6:.0f} MB are needed at "
            f"{plan.cache}, {plan.free_bytes / 1e6:.0f} MB are free; free some space, or extract fewer levels "
            "(--levels), views (--views) or samples (--subset)"
        )


def share(
    extraction: Extraction, *, report: Callable[[WorkerEvent], None], should_stop: Callable[[], bool] = lambda: False
) -> None:
    """Extracts what is pending and not claimed by other processes, until nothing is left to anybody.

    Any number of processes may do so on one cache: a shard whose process dies is taken over. Raises Stopped when
    `should_stop` turned true.
    """
    writer, prepared = extraction.writer, extraction.prepared
    while tasks := tasks_of(writer, prepared):
        extract_shards(extraction, claimed(writer, tasks), report=report, should_stop=should_stop)
        looked = time.monotonic()
        if tasks := tasks_of(writer, prepared):
            report(WaitingForOthers(len(tasks)))
            wait(time.monotonic() - looked, should_stop)


def wait(seconds: float, should_stop: Callable[[], bool]) -> None:
    """Lets some time pass, a moment at least. Raises Stopped when `should_stop` turns true."""
    until = time.monotonic() + max(seconds, POLL_SECONDS)
    while (left := until - time.monotonic()) > 0:
        if should_stop():
            raise Stopped
        time.sleep(min(left, 0.1))
