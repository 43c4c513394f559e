"""SIGKILL at random moments of an extraction, again and again, then continue: nothing is lost, nothing is redone."""

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path

import torch

from fcache.cache_spec import verify
from fcache.extractor import Job, extract
from fcache.extractor.scenes import write_scenes
from tests.extractor.conftest import contents

# A server that has imported everything once: its children start at once.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fcache.extractor"])
FULL = os.environ.get("FCACHE_TORTURE") == "full"
KILLS = 200 if FULL else 20
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "torture_extraction_kills.json"


def _extract(job: Job, working: Event) -> None:
    torch.set_num_threads(1)

    def report(event: object) -> None:
        working.set()
        # A little slower than real, so that kills fall into every phase of a shard.
        time.sleep(0.004)

    extract(job, report=report)


def _run_and_kill(job: Job, *, seconds: float, choose: random.Random) -> bool:
    """Extracts in a process that is killed after a random time, of work mostly, of starting now and then.

    Returns whether it was killed; False: it finished before.
    """
    working = CONTEXT.Event()
    process = CONTEXT.Process(target=_extract, args=(job, working))
    process.start()
    while choose.random() < 0.8 and process.is_alive() and not working.is_set():
        working.wait(60)
    process.join(choose.uniform(0, seconds))
    killed = process.is_alive()
    if killed:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert killed or process.exitcode == 0
    return killed


def _commits(root: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in root.glob("commits/**/*.json")}


def test_an_extraction_killed_at_random_moments_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    write_scenes(tmp_path / "data", train=24, val=6, size=(48, 64))
    whole = Job(
        model="mobilenetv2_050", dataset="ade20k", root=tmp_path / "data", cache=tmp_path / "whole",
        weights="random:0", views=2, view_recipe="ade20k-small", input_size=(32, 32), shard_records=2, batch_size=2,
    )  # fmt: skip
    starts: list[float] = []

    def report(event: object) -> None:
        starts.append(time.monotonic())
        time.sleep(0.004)

    extract(whole, report=report)
    expected, seconds = contents(whole.cache), starts[-1] - starts[0]
    choose, kills, after_commits, caches = random.Random(0), 0, 0, 0
    while kills < KILLS:
        caches += 1
        job = replace(whole, cache=tmp_path / f"cache-{caches}")
        before = _commits(job.cache)
        while kills < KILLS and _run_and_kill(job, seconds=seconds, choose=choose):
            kills += 1
            after = _commits(job.cache)
            # What was committed is never written again, and what counts as committed is whole.
            assert before.items() <= after.items()
            after_commits += len(after) > len(before)
            before = after
            if (job.cache / "zarr.json").exists():
                assert verify(job.cache, deep=True).corrupt == ()
        extract(job, report=report)
        assert before.items() <= _commits(job.cache).items()
        assert contents(job.cache) == expected
    assert after_commits >= KILLS // 5
    if FULL:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        counts = {"kills": kills, "kills_after_new_commits": after_commits, "caches": caches, "failures": 0}
        RESULTS.write_text(json.dumps(counts, indent=1) + "\n")
