"""kill -9 of a writing process at random moments: nothing that was committed is lost, touched or wrong."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time

from cachebuilder import assert_readable_is_exact, group, manifest, snapshot, write_pending

from fcache.cache_spec import LevelSpec, open_cache, open_writer, verify
from fcache.cache_spec.commits import read_commits
from fcache.cache_spec.layout import FEATURES
from tests.torture.caches import contents
from tests.torture.children import CHANGES, WRITING, run_child

LEVELS = (LevelSpec("level-4", "C H W", (64, 64, 64), 4), LevelSpec("level-8", "C H W", (128, 32, 32), 8))
KINDS = ("semantic", "instances")

# Creates or grows the cache, writes what is pending, feature and target parts in turn, and says when it begins.
WRITER = """
import sys
from pathlib import Path
from cachebuilder import write_shard
from fcache.cache_spec import open_writer
from test_killed_writers import wanted
print("go", flush=True)
writer = open_writer(Path(sys.argv[1]), wanted(int(sys.argv[2])))
for shard in writer.pending():
    for part in writer.manifest.parts():
        if shard in writer.pending(part):
            write_shard(writer, shard, part, bad=["train#3"])
for part in writer.manifest.parts():
    for shard in writer.pending(part):
        write_shard(writer, shard, part, bad=["train#3"])
writer.finish()
"""


def wanted(views):
    return manifest(
        group(samples=7, views=views, shard_records=2, encoding="fp16", levels=LEVELS),
        group("val/32x32", 3, shard_records=2, encoding="fp16", levels=LEVELS),
        kinds=KINDS,
    )


def start(root, views):
    paths = [*(p for p in sys.path if p), os.path.dirname(__file__)]
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, root, str(views)],
        env={**os.environ, "PYTHONPATH": ":".join(paths), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "go\n"
    return process


def run_to_the_end(root, views):
    with start(root, views) as process:
        assert process.wait(timeout=120) == 0


def committed(root):
    """Bytes and times of all commits and of the files that they name."""
    if not (root / "zarr.json").exists():
        return {}
    files = snapshot(root)
    names = {n for n in files if n.startswith("commits/")}
    reader = open_cache(root)
    for g in reader.manifest.groups:
        for part in reader.manifest.parts():
            for commit in read_commits(reader.storage, g.path, part).values():
                names |= set(commit.files)
    return {n: files[n] for n in names}


def test_killed_writers_lose_and_touch_nothing(folder, rounds, record):
    whole = folder / "whole"
    began = time.monotonic()
    run_to_the_end(whole, 2)
    seconds = time.monotonic() - began
    reference = contents(whole)

    rng = random.Random(0)
    target, kills, late_kills, caches, refused = rounds(6, 200), 0, 0, 0, 0
    while kills < target:
        caches += 1
        root = folder / f"cache-{caches}"
        # A cache is killed a few times over, and grown on the way.
        views = 1
        for _ in range(4):
            before = committed(root)
            with start(root, views) as process:
                time.sleep(rng.uniform(0, 1) ** 2 * seconds)
                process.kill()
                killed = process.wait() == -9
            kills += killed
            late_kills += killed and bool(before)
            after = snapshot(root)
            assert {n: after[n] for n in before} == before, "what was committed was written again"
            if (root / "zarr.json").exists():
                faults = verify(root, deep=True)
                assert not faults.corrupt, faults
                refused += bool(faults.missing)
                partial = open_cache(root, allow_partial=True)
                for split in partial.splits:
                    if any(len(partial.committed(g, FEATURES)) for g in partial.manifest.split(split)):
                        assert_readable_is_exact(partial, split, ())
            views = rng.choice((views, 2))
        run_to_the_end(root, 2)
        if views == 2 and open_cache(root).manifest.group("train").extents == whole_extents(whole):
            assert contents(root) == reference, "the finished cache differs from an uninterrupted one"
        assert not verify(root, deep=True).faults
        for split in ("train", "val"):
            assert_readable_is_exact(open_cache(root), split, KINDS)
        assert sorted(p.name for p in root.iterdir()) == ["commits", "manifest", "train", "val", "zarr.json"]
    assert kills >= target
    assert late_kills
    assert refused
    counts = {"kills": kills, "after commits": late_kills, "caches": caches, "incomplete": refused, "wrong": 0}
    record("killed_writers", counts)


def whole_extents(root):
    return open_cache(root).manifest.group("train").extents


def _write_and_die(root, wanted, step):
    """Writes a cache in a fork that kills itself before its `step`-th change of the file system; whether it did."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1] == signal.SIGKILL
    left = [step]

    def count():
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    def hook(event, args):
        if event in CHANGES or (event == "open" and args[2] and args[2] & WRITING):
            count()

    fsync = os.fsync
    os.fsync = lambda fd: (count(), fsync(fd))
    status = 1
    try:
        sys.addaudithook(hook)
        write_pending(open_writer(root, wanted))
        status = 0
    finally:
        os._exit(status)


def _die_everywhere(folder, stride):
    """Dies at every step in turn, and goes on; returns the steps at which shards were pending, and committed."""
    wanted = manifest(group(samples=2, levels=(LevelSpec("level-4", "C", (4,), 4),)), kinds=())
    write_pending(open_writer(folder / "whole", wanted))
    whole, pending, committed_at = contents(folder / "whole"), [], []
    for step in itertools.count(0, stride):
        root = folder / f"step-{step}"
        root.mkdir()
        died = _write_and_die(root, wanted, step)
        if (root / "zarr.json").exists():
            found = verify(root, deep=True)
            assert not found.corrupt
            assert len(found.missing) + found.committed == 1
            (committed_at if found.committed else pending).append(step)
        assert died or found.committed
        # A lock without an owner inside is waited for until it has rested for two minutes.
        assert not (root / "lock").exists() or (root / "lock").read_bytes()
        writer = open_writer(root, wanted)
        write_pending(writer)
        writer.finish()
        assert contents(root) == whole
        assert len(assert_readable_is_exact(open_cache(root), "train", ())) == 2
        if not died:
            return pending, committed_at


def test_a_writer_killed_at_every_step_of_a_commit_leaves_a_pending_shard(folder, rounds, record):
    """Every system call that changes a file, in turn: the process is killed there and another goes on."""
    ended = run_child(_die_everywhere, folder, rounds(3, 1))
    assert ended.status == 0, ended.error
    pending, committed_at = ended.value
    assert min(committed_at) > max(pending)
    assert len(pending) > rounds(7, 20)
    steps = {
        "kills": committed_at[-1] // rounds(3, 1),
        "kills before the root": pending[0] // rounds(3, 1),
        "kills with a root": len(pending),
        "differences": 0,
    }
    record("killed_at_every_step", steps)
