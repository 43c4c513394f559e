"""The engine of many devices on one machine: one process each, which share the shards of the cache by their claims.

A shard whose process dies is free at once, as claims name their process: the others take it over. The leading process
computes nothing; it starts the others, adds up what they tell, and ends none before all are gone.
"""

import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from fcache.cache_spec import DataError, FcacheError, open_storage
from fcache.extractor.children import child_context, pipe_of
from fcache.extractor.devices import check_device
from fcache.extractor.engines import Engine
from fcache.extractor.engines.local import started
from fcache.extractor.events import BatchDone, Event, WaitingForOthers, WorkerEvent, WorkerLost
from fcache.extractor.extraction import open_extraction, share
from fcache.extractor.job import Job
from fcache.extractor.pipeline import Stopped
from fcache.extractor.work import tasks_of

POLL_SECONDS = 0.2


def on_devices(devices: Sequence[str]) -> Engine:
    """An engine with one process for each of `devices`, in which a device may stand more than once.

    Processes on the CPU divide torch's threads, and all of them the decoding processes. If one dies the others go on;
    raises DataError if all have.
    """
    return partial(_extract, tuple(devices))


def _extract(
    devices: tuple[str, ...],
    job: Job,
    report: Callable[[Event | WorkerEvent], None],
    should_stop: Callable[[], bool],
) -> None:
    for device in devices:
        check_device(device, job.precision)
    # Everything that can be wrong is found here, once; the others find a cache that is there and fits.
    with open_extraction(replace(job, device=devices[0], workers=0)) as extraction:
        tasks = tasks_of(extraction.writer, extraction.prepared)
        report(started(extraction, tasks))
    del extraction
    if any(device.startswith("cuda") for device in devices):
        torch.cuda.empty_cache()
    if tasks:
        _Team(job, devices, report).lead(should_stop)


@dataclass(frozen=True)
class _Finished:
    """The last thing a process says: `error` is None if it did all that there was."""

    error: FcacheError | str | None


@dataclass
class _Member:
    """One process: `finished` is what it said at its end, None while it works or if it died."""

    device: str
    process: Any
    pipe: Connection
    finished: _Finished | None = None
    waits: bool = False


class _Team:
    """The processes of one run, led from this one."""

    def __init__(self, job: Job, devices: tuple[str, ...], report: Callable[[Event | WorkerEvent], None]) -> None:
        self._job, self._report = job, report
        threads = max(1, torch.get_num_threads() // max(1, sum(d == "cpu" for d in devices)))
        jobs = [replace(job, device=device) for device in devices]
        jobs = [replace(j, workers=j.decoders(len(devices))) for j in jobs]
        self._starts = [partial(_start, j, threads if j.device == "cpu" else 0) for j in jobs]
        self._members: list[_Member] = []

    def lead(self, should_stop: Callable[[], bool]) -> None:
        """Returns when everything is committed. Raises Stopped, the FcacheError of a process, DataError if all died."""
        error, stopping, lost = None, False, ""
        try:
            for start in self._starts:
                self._members.append(start())
            live = list(self._members)
            while live:
                ready = wait([m.pipe for m in live], timeout=POLL_SECONDS)
                for member in [m for m in live if m.pipe in ready]:
                    if self._hear(member):
                        continue
                    live.remove(member)
                    ended = member.finished.error if member.finished is not None else _death(member.process)
                    if isinstance(ended, FcacheError):
                        error = error or ended
                    elif ended is not None and not stopping:
                        lost = f"{member.device}: {ended}"
                        self._report(WorkerLost(member.device, ended))
                if not stopping and (error is not None or should_stop()):
                    stopping = True
                    for member in live:
                        _stop(member)
        finally:
            self._end()
        if error is not None:
            raise error
        if stopping:
            raise Stopped
        if all(m.finished is None or m.finished.error is not None for m in self._members):
            raise DataError(
                f"all {len(self._members)} extraction processes failed, the last on {lost}; what is committed stays: "
                "mend the cause and run the same command again"
            )

    def _hear(self, member: _Member) -> bool:
        """Passes on what a process said; False if it has ended."""
        try:
            said = member.pipe.recv()
        except (EOFError, OSError):
            return False
        if isinstance(said, _Finished):
            member.finished = said
        elif isinstance(said, WaitingForOthers):
            member.waits = True
            # One that waits for the others of its own run waits for nobody.
            if all(m.waits or not m.process.is_alive() for m in self._members):
                self._report(said)
        else:
            member.waits = member.waits and not isinstance(said, BatchDone)
            self._report(said)
        return True

    def _end(self) -> None:
        """No process is left behind, whatever happened, and no half-written file."""
        for member in self._members:
            member.pipe.close()
            if member.finished is None:
                member.process.kill()
        for member in self._members:
            member.process.join()
        open_storage(self._job.cache).sweep()


def _start(job: Job, threads: int) -> _Member:
    context = child_context()
    ours, theirs = pipe_of(context)
    process = context.Process(target=_work, args=(job, threads, theirs), name=f"fcache-{job.device}")
    process.start()
    theirs.close()
    return _Member(job.device, process, ours)


def _stop(member: _Member) -> None:
    with suppress(OSError):
        member.pipe.send("stop")


def _death(process: Any) -> str:
    process.join()
    status = process.exitcode
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"


def _work(job: Job, threads: int, pipe: Connection) -> None:
    """What an extraction process does. It stops when it is told to, or when nobody listens any more."""
    stop, lock = threading.Event(), threading.Lock()
    # Ctrl-C reaches every process of a terminal: the leading one decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    if threads:
        torch.set_num_threads(threads)

    def listen() -> None:
        with suppress(EOFError, OSError):
            pipe.recv()
        stop.set()

    def say(event: Any) -> None:
        with lock:
            pipe.send(event)

    threading.Thread(target=listen, name="fcache-listen", daemon=True).start()
    error: FcacheError | str | None = None
    try:
        with open_extraction(job) as extraction:
            share(extraction, report=say, should_stop=stop.is_set)
    except Stopped:
        error = "told to stop by SIGTERM"
    except FcacheError as e:
        error = e
    except BaseException:
        # Memory of a device that ran out, a device that failed: others may do better.
        error = traceback.format_exc().strip().rpartition("\n")[2]
    with suppress(OSError):
        say(_Finished(error))
