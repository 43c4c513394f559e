"""A dask cluster on loopback: scheduler and nannies in one process, workers in theirs, all of which can be killed."""

import json
import os
from contextlib import contextmanager, suppress

import dask
from distributed import LocalCluster, WorkerPlugin
from distributed.utils import get_mp_context

from tests.torture.children import CONTEXT
from tests.torture.test_shared_extractions import observe


def _serve(port, workers, pipe):
    os.setpgid(0, 0)
    # Workers, of which many are killed, are forked from a server; dask makes a list of its own first.
    dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})
    get_mp_context().set_forkserver_preload(["tests.torture.clusters", "fcache.extractor.engines.cluster"])
    with LocalCluster(
        n_workers=workers, threads_per_worker=1, host="127.0.0.1", scheduler_port=port, dashboard_address=None,
        memory_limit=0, silence_logs=50,
    ) as cluster:  # fmt: skip
        pipe.send(cluster.scheduler_address)
        with suppress(EOFError):
            pipe.recv()


@contextmanager
def cluster(*, workers, port=0):
    """The process that serves a cluster, and its address."""
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_serve, args=(port, workers, theirs))
    process.start()
    theirs.close()
    try:
        yield process, ours.recv()
    finally:
        with suppress(OSError):
            ours.send("end")
        process.join(60)
        process.kill()
        process.join()


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
    return found
