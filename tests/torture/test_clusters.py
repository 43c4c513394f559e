"""Extraction on a dask cluster whose workers and scheduler are killed: equal bytes, and no shard made for nothing."""

import os
import random
import signal
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest
from distributed import Client

from fcache.cache_spec import DataError, verify
from fcache.extractor import Stopped, WorkerLost, extract
from fcache.extractor.engines.cluster import on_cluster
from tests.torture.caches import contents
from tests.torture.clusters import Observing, cluster, holders
from tests.torture.test_shared_extractions import check_intervals, intervals, lines


def kill_holders(root, kills, choose, died, done):
    """Kills so many workers, each in the middle of a shard, at random moments."""
    left = kills
    while left and not done.wait(choose.uniform(0.05, 0.4)):
        if victims := sorted(holders(root) - died.keys()):
            victim = choose.choice(victims)
            # Before the signal: the others may see the death earlier than this process does.
            died[victim] = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            left -= 1


def test_a_cluster_whose_workers_are_killed_ends_with_the_bytes_of_one_process(job, whole, folder, rounds, record):
    choose, counts, caches, again, parts = random.Random(5), Counter(), 0, 0, 0
    deaths, each = rounds(5, 100), 5
    with cluster(folder, workers=3) as dask, Client(dask.address, set_as_default=False) as client:
        address = dask.address
        while counts["killed in a shard"] < deaths:
            caches += 1
            shared, log, died, done = replace(job, cache=folder / f"c{caches}"), folder / f"log{caches}", {}, []
            client.register_plugin(Observing(log, 0.03), name="observing")
            stop = threading.Event()
            left = min(each, deaths - counts["killed in a shard"])
            killer = threading.Thread(target=kill_holders, args=(shared.cache, left, choose, died, stop))
            killer.start()
            try:
                while True:
                    try:
                        result = extract(shared, report=done.append, engine=on_cluster(address, device="cpu"))
                        break
                    except DataError as e:
                        if "dask gave up on a shard" not in str(e):
                            raise
                        counts["runs that dask gave up and that were continued"] += 1
            finally:
                stop.set()
                killer.join()
            assert result.pending == 0
            assert contents(shared.cache) == whole
            assert not verify(shared.cache, deep=True).faults
            again += check_intervals(log, died)
            parts += len(intervals(log, died))
            begun = Counter(tuple(line[3:]) for line in lines(log) if line[0] == "begin")
            # A worker that dies loses the parts of one shard, no more.
            assert sum(begun.values()) <= len(begun) + 2 * len(died)
            counts["killed in a shard"] += len(died)
            counts["losses that were reported"] += sum(isinstance(e, WorkerLost) for e in done)
    assert counts["killed in a shard"] == deaths
    # Workers that replace the dead may be killed, too, before the scheduler has seen them.
    assert counts["losses that were reported"]
    counts |= {"caches": caches, "parts of shards": parts, "begun again after a death": again, "differences": 0}
    record("cluster_kills", dict(counts))


def test_a_run_that_loses_its_scheduler_says_so_and_continues_after_its_restart(job, whole, folder):
    shared = replace(job, cache=folder / "c")

    def run(address, **options):
        return extract(shared, report=options.pop("report", print), engine=on_cluster(address, device="cpu"), **options)

    def committed():
        return {p: p.stat().st_mtime_ns for p in shared.cache.glob("commits/**/*.json")}

    with cluster(folder, workers=1) as dask:
        address = dask.address

        def lose(event):
            if len(committed()) >= 4 and dask.scheduler.is_alive():
                dask.scheduler.kill()
                dask.scheduler.join()

        with pytest.raises(DataError, match=f"scheduler at {address} is gone.*run the same command"):
            run(address, report=lose)
        for worker in dask.workers:
            worker.join(60)
            assert not worker.is_alive(), "workers outlive their scheduler"
    before = committed()
    with cluster(folder, workers=1, port=int(address.rpartition(":")[2])) as dask:
        assert dask.address == address
        with pytest.raises(Stopped):
            run(address, should_stop=lambda: len(committed()) > len(before))
        assert not list(shared.cache.glob("partial/*"))
        assert not holders(shared.cache)
        assert run(address).pending == 0
        # An error of the data is the run's, with its own words.
        lost = replace(shared, root=folder / "nowhere")
        with pytest.raises(DataError, match="nowhere"):
            extract(lost, report=print, engine=on_cluster(address, device="cpu"))
    assert before.items() <= committed().items()
    assert contents(shared.cache) == whole


def test_a_scheduler_that_does_not_answer_is_named(job, folder, monkeypatch):
    monkeypatch.setattr("fcache.extractor.engines.cluster.CONNECT_SECONDS", 0.2)
    with pytest.raises(DataError, match="no dask scheduler answers at tcp://127.0.0.1:9"):
        extract(job, report=print, engine=on_cluster("tcp://127.0.0.1:9"))
