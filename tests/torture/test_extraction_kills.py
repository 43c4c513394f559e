"""SIGKILL at random moments of an extraction, again and again, then continue: nothing is lost, nothing is redone."""

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import torch

from fcache.cache_spec import verify
from fcache.extractor import Job, extract
from fcache.extractor.scenes import write_scenes
from tests.extractor.conftest import contents

FULL = os.environ.get("FCACHE_TORTURE") == "full"
KILLS = 200 if FULL else 20
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "torture_extraction_kills.json"


def _extract(job: Job) -> None:
    torch.set_num_threads(1)
    # A little slower than real, so that kills fall into every phase of a shard.
    extract(job, report=lambda event: time.sleep(0.004))


def _commits(root: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in root.glob("commits/**/*.json")}


def test_an_extraction_killed_at_random_moments_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    write_scenes(tmp_path / "data", train=24, val=6, size=(48, 64))
    whole = Job(
        model="mobilenetv2_050", dataset="ade20k", root=tmp_path / "data", cache=tmp_path / "whole",
        weights="random:0", views=2, view_recipe="ade20k-small", input_size=(32, 32), shard_records=2, batch_size=2,
    )  # fmt: skip
    started = time.monotonic()
    extract(whole, report=lambda event: time.sleep(0.004))
    expected, duration = contents(whole.cache), time.monotonic() - started
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fcache.extractor"])
    choose, kills, after_commits, caches = random.Random(0), 0, 0, 0
    while kills < KILLS:
        caches += 1
        job = replace(whole, cache=tmp_path / f"cache-{caches}")
        while True:
            before = _commits(job.cache)
            process = context.Process(target=_extract, args=(job,))
            process.start()
            process.join(choose.uniform(0.05, 0.6 * duration) if kills < KILLS else None)
            if not process.is_alive():
                assert process.exitcode == 0
                break
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            after = _commits(job.cache)
            # What was committed is never written again, and what counts as committed is whole.
            assert before.items() <= after.items()
            after_commits += len(after) > len(before)
            if (job.cache / "zarr.json").exists():
                assert verify(job.cache, deep=True).corrupt == ()
        assert contents(job.cache) == expected
    assert after_commits >= KILLS // 5
    if FULL:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        counts = {"kills": kills, "kills_after_new_commits": after_commits, "caches": caches, "failures": 0}
        RESULTS.write_text(json.dumps(counts, indent=1) + "\n")
