"""A dask cluster of real processes on loopback, each of which can be killed; workers come back."""

import asyncio
import json
import os
import threading
from contextlib import contextmanager, suppress

import torch
from distributed import Scheduler, Worker, WorkerPlugin

from tests.torture.children import CONTEXT
from tests.torture.test_shared_extractions import observe


def _schedule(port, pipe):
    async def run():
        scheduler = Scheduler(host="127.0.0.1", port=port, dashboard=False)
        await scheduler
        pipe.send(scheduler.address)
        await scheduler.finished()

    asyncio.run(run())


def _work(address, folder):
    torch.set_num_threads(1)

    async def run():
        worker = Worker(address, nthreads=1, memory_limit=0, dashboard=False, local_directory=folder)
        await worker
        await worker.finished()

    with suppress(OSError):
        asyncio.run(run())


class Cluster:
    """The processes. A worker that died is replaced, as nannies, Slurm and Kubernetes do, while the scheduler lives."""

    def __init__(self, folder, *, workers, port=0):
        ours, theirs = CONTEXT.Pipe()
        self.scheduler = CONTEXT.Process(target=_schedule, args=(port, theirs))
        self.scheduler.start()
        theirs.close()
        self.address, self._folder = ours.recv(), str(folder)
        self.workers = [self._start() for _ in range(workers)]
        self.replaced = 0
        self._done = threading.Event()
        self._watch = threading.Thread(target=self._replace)
        self._watch.start()

    def _start(self):
        process = CONTEXT.Process(target=_work, args=(self.address, self._folder))
        process.start()
        return process

    def _replace(self):
        while not self._done.wait(0.05):
            for i, process in enumerate(self.workers):
                if not process.is_alive() and self.scheduler.is_alive():
                    self.workers[i] = self._start()
                    self.replaced += 1

    def close(self):
        self._done.set()
        self._watch.join()
        for process in (self.scheduler, *self.workers):
            process.kill()
            process.join()


@contextmanager
def cluster(folder, *, workers, port=0):
    """A cluster that works inside the block."""
    found = Cluster(folder, workers=workers, port=port)
    try:
        yield found
    finally:
        found.close()


class Observing(WorkerPlugin):
    """Workers that note when they begin and end to write a part of a shard."""

    def __init__(self, log, pause):
        self.log, self.pause = log, pause

    def setup(self, worker):
        observe(self.log, self.pause)


def holders(root):
    """The processes that hold a shard of a cache just now."""
    found = set()
    for path in root.glob("claims/*/*.json"):
        with suppress(OSError, ValueError):
            found.add(int(json.loads(path.read_bytes())["pid"]))
    return found - {os.getpid()}
