"""Several extractors on one cache: they share the shards, and no shard is written twice at the same time."""

import itertools
import json
import os
import random
import signal
import time
from collections import defaultdict
from dataclasses import replace

import torch

from fcache.cache_spec import CacheWriter, ShardWriter, verify
from fcache.extractor import extract
from fcache.extractor.events import ShardCommitted
from tests.torture.caches import contents
from tests.torture.children import CONTEXT


def observe(log, pause):
    """From now on this process notes when it begins and ends to write a part of a shard."""
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    begin, commit, abort = CacheWriter.write, ShardWriter.commit, ShardWriter.abort

    def note(what, shard_writer):
        s = shard_writer.noted
        line = [what, os.getpid(), time.monotonic(), s[0].group, s[0].index, s[1]]
        os.write(fd, (json.dumps(line) + "\n").encode())

    def write(self, shard, part="features"):
        # Noted before the first file is made.
        holder = type("Noted", (), {"noted": (shard, part)})
        note("begin", holder)
        shard_writer = begin(self, shard, part)
        shard_writer.noted = (shard, part)
        time.sleep(pause)
        return shard_writer

    def committed(self, **facts):
        found = commit(self, **facts)
        note("commit", self)
        return found

    def aborted(self):
        abort(self)
        if hasattr(self, "noted"):
            note("abort", self)

    CacheWriter.write, ShardWriter.commit, ShardWriter.abort = write, committed, aborted


def work(job, log, pause, ready):
    torch.set_num_threads(1)
    observe(log, pause)
    ready.wait(120)
    extract(job, report=lambda _: None)


def start(job, log, *, pauses, parts=None):
    """Extractors that begin together."""
    ready = CONTEXT.Barrier(len(pauses))
    jobs = [replace(job, part=part) for part in parts or [None] * len(pauses)]
    processes = [
        CONTEXT.Process(target=work, args=(j, log, pause, ready)) for j, pause in zip(jobs, pauses, strict=True)
    ]
    for process in processes:
        process.start()
    # The barrier lasts as long as somebody holds it.
    return processes, ready


def lines(log):
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def intervals(log, died):
    """When a process wrote a part of a shard: (begin, end, pid, committed), by part of a shard."""
    found, open_ones = defaultdict(list), {}
    for what, pid, when, *place in lines(log):
        key = (pid, tuple(place))
        if what == "begin":
            open_ones[key] = when
        elif key in open_ones:
            found[tuple(place)].append((open_ones.pop(key), when, pid, what == "commit"))
    for (pid, place), began in open_ones.items():
        found[place].append((began, died[pid], pid, False))
    return found


def check_intervals(log, died):
    """No part of a shard was written by two at the same time, or committed twice; returns how many were begun twice."""
    again = 0
    for place, spans in intervals(log, died).items():
        spans.sort()
        for (_, end, one, _), (begin, _, two, _) in itertools.pairwise(spans):
            assert end <= begin, f"{place} was written by {one} and {two} at the same time"
        noted = sum(committed for *_, committed in spans)
        # One that was killed may have committed without a note of it.
        assert noted == 1 or (noted == 0 and any(pid in died for _, _, pid, _ in spans)), f"{place}: {noted} commits"
        again += len(spans) > 1
    return again


def test_extractors_that_start_together_share_the_shards_even_if_some_are_killed(job, whole, folder, rounds, record):
    choose, killed, again, shards, several = random.Random(7), 0, 0, 0, 0
    for number in range(rounds(1, 25)):
        shared, log = replace(job, cache=folder / f"c{number}"), folder / f"log{number}"
        (processes, _ready), died = start(shared, log, pauses=[0.02] * 4), {}
        victims = choose.sample(processes, choose.choice((1, 2)))
        for victim in victims:
            # In the middle of a shard.
            deadline = time.monotonic() + 120
            began = choose.randrange(1, 4)
            while victim.is_alive() and time.monotonic() < deadline:
                if sum(line[:2] == ["begin", victim.pid] for line in lines(log)) >= began:
                    break
                time.sleep(0.002)
            if victim.is_alive():
                # Before the signal: the others may see the death earlier than this process does.
                died[victim.pid] = time.monotonic()
                os.kill(victim.pid, signal.SIGKILL)
                victim.join()
                killed += 1
        for process in processes:
            process.join(300)
            assert process.exitcode == (-9 if process.pid in died and process.exitcode else 0)
        assert contents(shared.cache) == whole
        assert not verify(shared.cache, deep=True).faults
        again += check_intervals(log, died)
        shards += len(intervals(log, died))
        several += len({line[1] for line in lines(log) if line[0] == "commit"}) > 1
    assert several
    assert killed
    counts = {"caches": rounds(1, 25), "extractors": 4 * rounds(1, 25), "killed in a shard": killed}
    counts |= {"parts of shards": shards, "begun again after a death": again, "written by two at once": 0}
    record("shared_extractions", counts)


def test_parts_divide_the_shards_and_make_the_same_cache(job, whole, folder):
    shared, log = replace(job, cache=folder / "c"), folder / "log"
    processes, _ready = start(shared, log, pauses=[0] * 3, parts=[(i, 3) for i in range(3)])
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    # Each ends with its own part; the last to end cannot know that it is the last.
    extract(shared, report=lambda _: None)
    assert contents(shared.cache) == whole
    check_intervals(log, {})
    places = {}
    for what, pid, _, *place in lines(log):
        if what == "commit":
            places.setdefault(pid, set()).add(tuple(place[:2]))
    assert sorted(len(s) for s in places.values()) == [7, 7, 8]
    assert sum(map(len, places.values())) == len(set().union(*places.values())) == 22


def test_extractors_one_after_another_write_no_shard_again(job, whole, folder):
    shared, committed = replace(job, cache=folder / "c"), []
    for _ in range(3):
        extract(shared, report=lambda e: committed.append(e) if isinstance(e, ShardCommitted) else None)
    assert len(committed) == len({(e.group, e.part, e.shard) for e in committed}) == 44
    assert contents(shared.cache) == whole
