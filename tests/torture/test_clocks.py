"""Clocks that are wrong, that jump, and processes that sleep for longer than a claim lasts: equal bytes at the end."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from cachebuilder import group, manifest, write_pending, write_shard

from fcache.cache_spec import CacheWriter, open_writer, verify
from fcache.extractor import extract
from tests.torture.caches import contents
from tests.torture.children import CONTEXT, run_child

HOUR = 3600.0
KINDS = ("semantic",)


def shift_clock(seconds, jumping):
    """From now on the wall clock of this process is wrong, by the same or by ever other amounts; files keep theirs."""
    true, choose = time.time, random.Random(os.getpid())
    time.time = lambda: true() + (choose.uniform(-seconds, seconds) if jumping else seconds)


def extract_at(job, seconds, jumping, claims):
    torch.set_num_threads(1)
    shift_clock(seconds, jumping)
    if claims:
        short_claims(claims)
    extract(job, report=lambda _: time.sleep(0.01))


def short_claims(stale):
    """Claims of this process last a moment instead of minutes."""
    begin = CacheWriter.__init__

    def begun(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        self.claims.stale_seconds = stale

    CacheWriter.__init__ = begun


@contextlib.contextmanager
def touched_at_random(root, choose):
    """Somebody sets the times of claims, locks and temporary files to hours ago and hours ahead."""
    done, touched = threading.Event(), Counter()

    def touch():
        while not done.wait(0.01):
            paths = [root / "lock"]
            # Files and folders vanish while one looks.
            with contextlib.suppress(FileNotFoundError):
                paths += [*root.glob("claims/*/*"), *root.glob("partial/*")]
            for path in paths:
                then = time.time() + choose.choice((-30 * 24, -6, -1, 1, 6, 30 * 24)) * HOUR
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path, (then, then))
                    touched[path.parent.parent.name] += 1

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        yield touched
    finally:
        done.set()
        thread.join()


def test_extractors_whose_clocks_are_wrong_or_jump_make_equal_caches(job, whole, folder, rounds, record):
    choose, counts = random.Random(8), Counter()
    clocks = [(6 * HOUR, False), (-6 * HOUR, False), (24 * HOUR, True), (0.0, False)]
    for number in range(rounds(1, 12)):
        shared = replace(job, cache=folder / f"c{number}")
        touching = bool(number % 2) or number == 0
        with touched_at_random(shared.cache, choose) if touching else contextlib.nullcontext({}) as touched:
            processes = [CONTEXT.Process(target=extract_at, args=(shared, *clock, None)) for clock in clocks[:3]]
            for process in processes:
                process.start()
            for process in processes:
                process.join(300)
                assert process.exitcode == 0
        assert contents(shared.cache) == whole
        assert not verify(shared.cache, deep=True).faults
        counts["caches"] += 1
        counts["extractors"] += 3
        counts["times of files changed"] += sum(touched.values())
    record("clocks", {**counts, "differences": 0})


def test_an_extractor_that_sleeps_longer_than_its_claim_lasts_wakes_up_harmlessly(job, whole, folder, rounds, record):
    choose, counts = random.Random(9), Counter()
    for number in range(rounds(1, 15)):
        shared = replace(job, cache=folder / f"c{number}")
        sleeper = CONTEXT.Process(target=extract_at, args=(shared, 0.0, False, 0.6))
        sleeper.start()
        wait_for = choose.randrange(1, 8)
        deadline = time.monotonic() + 120
        while len(list(shared.cache.glob("commits/**/*.json"))) < wait_for and sleeper.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(choose.uniform(0, 0.03))
        with contextlib.suppress(ProcessLookupError):
            os.kill(sleeper.pid, signal.SIGSTOP)
        asleep = sleeper.is_alive()
        held = len(list(shared.cache.glob("claims/*/*")))
        other = CONTEXT.Process(target=extract_at, args=(shared, 0.0, False, 0.6))
        other.start()
        other.join(300)
        assert other.exitcode == 0
        # Everything is done, by the other one alone, while the first one sleeps in the middle of something.
        assert not verify(shared.cache, deep=True).faults
        done = {p: p.stat().st_mtime_ns for p in shared.cache.glob("commits/**/*.json")}
        os.kill(sleeper.pid, signal.SIGCONT)
        sleeper.join(300)
        assert sleeper.exitcode == 0
        assert contents(shared.cache) == whole
        counts["slept"] += asleep
        counts["claims taken from a sleeper"] += held if asleep else 0
        again = sum(p.stat().st_mtime_ns != when for p, when in done.items())
        counts["parts written again, with equal bytes, by a sleeper"] += again
    assert counts["claims taken from a sleeper"]
    record("sleepers", {**counts, "differences": 0})


def wanted():
    return manifest(group(samples=6, views=2, shard_records=1), kinds=KINDS)


def write_with_sleep(root, step):
    """Stops in the middle of writing, as if suspended, and goes on when told."""
    writer = open_writer(root, wanted())
    for shard in writer.pending():
        if writer.claims.acquire(shard.group, shard.index):
            for part in writer.manifest.parts():
                if step == (shard.index, part):
                    os.kill(os.getpid(), signal.SIGSTOP)
                if shard in writer.pending(part):
                    write_shard(writer, shard, part)
            writer.claims.release(shard.group, shard.index)
    write_pending(writer)
    writer.finish()


def test_a_writer_that_sleeps_through_the_growth_of_its_cache_touches_nothing_new(folder):
    """While it sleeps another finishes its shards and adds samples; what it then writes is what is there already."""
    for number, step in enumerate([(0, "features"), (3, "semantic"), (11, "features")]):
        root, grown = folder / f"{number}", folder / f"{number}-grown"
        more = manifest(group(samples=9, views=2, shard_records=1), kinds=KINDS)
        for where in (grown, root):
            sleeper = None
            if where is root:
                sleeper = CONTEXT.Process(target=write_with_sleep, args=(root, step))
                sleeper.start()
                while _state(sleeper.pid) != "T":
                    assert sleeper.is_alive()
                    time.sleep(0.005)
            for wish in (wanted(), more):
                writer = open_writer(where, wish)
                writer.claims.stale_seconds = 0.05
                write_pending(writer)
            writer.finish()
            if sleeper is not None:
                os.kill(sleeper.pid, signal.SIGCONT)
                sleeper.join(120)
                assert sleeper.exitcode == 0
        assert contents(root) == contents(grown)
        assert not verify(root, deep=True).faults


def _state(pid):
    with open(f"/proc/{pid}/stat") as f:
        return f.read().rsplit(")", 1)[1].split()[0]


def test_a_cache_made_at_a_wrong_time_differs_in_nothing_but_the_time(job, whole, folder, rounds):
    for number, seconds in enumerate(rounds((-1.7e9,), (-1.7e9, -1.0, 400 * 24 * HOUR))):
        shared = replace(job, cache=folder / f"c{number}")
        ended = run_child(extract_at, shared, seconds, False, None)
        assert ended.status == 0, ended.error
        assert contents(shared.cache) == whole


def test_commands_under_a_shifted_system_clock_make_equal_caches(job, whole, folder, rounds, record):
    """As above with every clock of the process, and the times of files as it sees them, shifted by libfaketime."""
    if shutil.which("faketime") is None or not rounds(0, 1):
        pytest.skip("runs in full only, and where faketime is installed")
    options = "--model mobilenetv2_050 --weights random:0 --dataset ade20k --views 2 --view-recipe ade20k-small"
    options += " --input-size 32 32 --shard-records 2 --batch-size 1 --workers 0"
    command = [sys.executable, "-m", "fcache.cli", "extract", *options.split(), "--data-root", str(job.root)]
    paths = os.pathsep.join(p for p in ("", *sys.path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    for number in range(3):
        cache = folder / f"c{number}"
        shifts = (["faketime", "-f", "+6h"], ["faketime", "-f", "-6h"], [])
        started = [
            subprocess.Popen(
                [*shift, *command, "--cache", str(cache)], env=environment, stderr=subprocess.PIPE, text=True
            )
            for shift in shifts
        ]
        for process in started:
            _, told = process.communicate(timeout=600)
            assert process.returncode == 0, told
        assert contents(cache) == whole
    record("shifted_clocks", {"caches": 3, "extractors": 9, "differences": 0})
