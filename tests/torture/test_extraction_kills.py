"""SIGKILL at random moments of an extraction, again and again, then continue: nothing is lost, nothing is redone."""

import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch

from fcache.cache_spec import FcacheError, open_cache, verify
from fcache.extractor import Job, extract
from fcache.extractor.scenes import write_scenes
from tests.torture.caches import contents
from tests.torture.children import CONTEXT, group_is_gone, run_child

# A little slower than real, so that kills fall into every phase of a shard.
PAUSE = 0.004


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """An extraction of 54 records in 27 shards; nothing may be written into its data."""
    root = tmp_path_factory.mktemp("scenes") / "data"
    write_scenes(root, train=24, val=6, size=(48, 64))
    return Job(
        model="mobilenetv2_050", dataset="ade20k", root=root, cache=root.parent / "whole", weights="random:0", views=2,
        view_recipe="ade20k-small", input_size=(32, 32), shard_records=2, batch_size=2, workers=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected(whole: Job) -> tuple[dict[str, bytes], float]:
    """What an extraction that nobody disturbs leaves, and how long it works."""
    starts: list[float] = []

    def report(event: object) -> None:
        starts.append(time.monotonic())
        time.sleep(PAUSE)

    extract(whole, report=report)
    return contents(whole.cache), starts[-1] - starts[0]


def _extract(job: Job, working: Event, extractors: int) -> None:
    """So many extractors in a process group of their own."""
    torch.set_num_threads(1)
    os.setpgid(0, 0)
    others = []
    for _ in range(extractors - 1):
        if pid := os.fork():
            others.append(pid)
            continue
        status = 1
        try:
            extract(job, report=lambda _: time.sleep(PAUSE))
            status = 0
        finally:
            os._exit(status)

    def report(event: object) -> None:
        working.set()
        time.sleep(PAUSE)

    extract(job, report=report)
    assert [os.waitpid(pid, 0)[1] for pid in others] == [0] * len(others)


def _start(job: Job, *, extractors: int) -> tuple[Any, Event]:
    """A running process group of extractors by its first process, and what tells that this one works."""
    working = CONTEXT.Event()
    process = CONTEXT.Process(target=_extract, args=(job, working, extractors))
    process.start()
    return process, working


def _run_and_kill(job: Job, *, extractors: int, seconds: float, choose: random.Random) -> bool:
    """Extracts in a process group that is killed after a random time, of work mostly, of starting now and then.

    Returns whether it was killed; False: it finished before.
    """
    process, working = _start(job, extractors=extractors)
    while choose.random() < 0.8 and process.is_alive() and not working.is_set():
        working.wait(60)
    process.join(choose.uniform(0, 0.8 * seconds / extractors))
    killed = process.is_alive()
    _kill(process)
    process.join()
    assert killed or process.exitcode == 0
    assert group_is_gone(process.pid, seconds=60)
    return killed


def _kill(process: Any) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        # It has ended, or is not yet the first of its group.
        process.kill()


def _commits(root: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in root.glob("commits/**/*.json")}


def _nothing_half_written_opens(root: Path) -> None:
    """Whatever is there is committed and whole, or refused."""
    if not (root / "zarr.json").exists():
        with pytest.raises(FcacheError):
            open_cache(root)
        return
    found = verify(root, deep=True)
    assert found.corrupt == ()
    reader = open_cache(root)
    for split in reader.splits:
        if reader.missing(split=split):
            with pytest.raises(FcacheError, match="not committed"):
                reader.records(split)


def test_an_extraction_killed_at_random_moments_ends_as_an_uninterrupted_one(
    whole: Job,
    expected: tuple[dict[str, bytes], float],
    folder: Path,
    rounds: Callable[[int, int], int],
    record: Callable[..., None],
) -> None:
    files, seconds = expected
    kills = {"one extractor": rounds(4, 120), "a group of two extractors": rounds(2, 100)}
    done, after_commits, caches, choose = Counter[str](), 0, 0, random.Random(0)
    while sum(done.values()) < sum(kills.values()):
        caches += 1
        job = replace(whole, cache=folder / f"cache-{caches}")
        before = _commits(job.cache)
        while who := choose.choice([w for w in kills if done[w] < kills[w]] or [""]):
            if not _run_and_kill(job, extractors=1 + ("group" in who), seconds=seconds, choose=choose):
                break
            done[who] += 1
            after = _commits(job.cache)
            # What was committed is never written again, and what counts as committed is whole.
            assert before.items() <= after.items()
            after_commits += len(after) > len(before)
            before = after
            _nothing_half_written_opens(job.cache)
        extract(job, report=lambda _: None)
        assert before.items() <= _commits(job.cache).items()
        assert contents(job.cache) == files
    assert done == kills
    assert after_commits >= sum(kills.values()) // 5
    counts = {"kills": dict(done), "kills after new commits": after_commits, "caches": caches, "differences": 0}
    record("extraction_kills", counts)


def test_an_extraction_with_decoding_processes_is_killed_with_and_without_them(
    whole: Job,
    expected: tuple[dict[str, bytes], float],
    folder: Path,
    rounds: Callable[[int, int], int],
    record: Callable[..., None],
) -> None:
    files, seconds = expected
    choose, counts = random.Random(1), Counter[str]()
    for number in range(rounds(2, 30)):
        job = replace(whole, cache=folder / f"decoders-{number}", workers=2)
        process, working = _start(job, extractors=1)
        assert working.wait(120)
        process.join(choose.uniform(0, 0.8 * seconds))
        alive, whole_group = process.is_alive(), bool(number % 2)
        if whole_group:
            _kill(process)
        elif alive:
            # Decoders that nobody asks any more end by themselves.
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert group_is_gone(process.pid, seconds=60), "decoding processes outlive their extractor"
        counts["whole group" if whole_group else "extractor only"] += alive
        _nothing_half_written_opens(job.cache)
        extract(replace(job, workers=0), report=lambda _: None)
        assert contents(job.cache) == files
    record("decoder_groups", {"kills": dict(counts), "left processes": 0, "differences": 0})


def _lose_decoders(job: Job, deaths: int) -> tuple[int, list[str]]:
    """Extracts again and again while decoding processes die; returns deaths and how the extractions ended."""
    torch.set_num_threads(1)
    choose, died, ends = random.Random(2), 0, list[str]()
    while died < deaths:
        left = [choose.randrange(3, 25)]

        def report(event: object, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                decoders = multiprocessing.active_children()
                if decoders:
                    choose.choice(decoders).kill()
                    left[0] = -1000

        try:
            extract(job, report=report)
            ends.append("finished")
        except FcacheError as e:
            ends.append(type(e).__name__)
        except BaseException as e:
            ends.append(f"{type(e).__name__}: {e}")
        died += left[0] <= -1000
        if ends[-1] == "finished":
            break
    return died, ends


def test_an_extraction_whose_decoding_processes_die_says_so_and_continues(
    whole: Job,
    expected: tuple[dict[str, bytes], float],
    folder: Path,
    rounds: Callable[[int, int], int],
    record: Callable[..., None],
) -> None:
    deaths, died, ends, caches = rounds(5, 60), 0, Counter[str](), 0
    while died < deaths:
        caches += 1
        job = replace(whole, cache=folder / f"deaths-{caches}", workers=1)
        ended = run_child(_lose_decoders, job, deaths - died)
        assert ended.status == 0, ended.error
        died += ended.value[0]
        ends.update(ended.value[1])
        _nothing_half_written_opens(job.cache)
        extract(replace(job, workers=0), report=lambda _: None)
        assert contents(job.cache) == expected[0]
    assert set(ends) <= {"finished", "DataError"}
    record("decoder_deaths", {"deaths": died, "extractions": dict(ends), "caches": caches, "differences": 0})
