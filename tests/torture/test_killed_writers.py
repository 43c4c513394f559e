"""kill -9 of a writing process at random moments: nothing that was committed is lost, touched or wrong."""

import os
import random
import subprocess
import sys
import time

from cachebuilder import assert_readable_is_exact, group, manifest, snapshot, write_pending

from fcache.cache_spec import LevelSpec, open_cache, open_writer, verify
from fcache.cache_spec.layout import FEATURES

LEVELS = (LevelSpec("level-4", "C H W", (64, 64, 64), 4), LevelSpec("level-8", "C H W", (128, 32, 32), 8))
KINDS = ("semantic", "instances")
RUN = ("time", "seconds", "host", "pid")

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
            for commit in reader.commits(g, part).values():
                names |= set(commit.files)
    return {n: files[n] for n in names}


def without_run(text):
    """A commit without what says when, where and by whom."""
    import json

    body = json.loads(text)
    return {k: v for k, v in body.items() if k not in ("run", "digest")}


def contents(root):
    found = {}
    for name, (data, _) in snapshot(root).items():
        found[name] = without_run(data) if name.startswith("commits/") else data
    return found


def test_killed_writers_lose_and_touch_nothing(folder, rounds, record):
    whole = folder / "whole"
    began = time.monotonic()
    run_to_the_end(whole, 2)
    seconds = time.monotonic() - began
    reference = contents(whole)

    rng = random.Random(0)
    target, kills, late_kills, caches, refused = rounds(8, 200), 0, 0, 0, 0
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
                    if any(partial.commits(g, FEATURES) for g in partial.manifest.split(split)):
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


def test_a_writer_killed_at_every_step_of_a_commit_leaves_a_pending_shard(folder, monkeypatch):
    """Every system call that changes a file, in turn: the process "dies" there and another goes on."""
    from pathlib import Path

    from fcache.cache_spec import files, shardfile

    class Killed(BaseException):
        pass

    small = manifest(group(samples=2, levels=(LevelSpec("level-4", "C", (4,), 4),)), kinds=())
    steps = 0
    while True:
        root, left = folder / f"step-{steps}", [steps]

        def dying(function, left=left):
            def call(*args, **kwargs):
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for owner, name in ((Path, "replace"), (Path, "mkdir"), (files.os, "fsync"), (shardfile.os, "fsync")):
                patch.setattr(owner, name, dying(getattr(owner, name)))
            # A killed process cleans nothing up.
            patch.setattr(Path, "unlink", lambda *_, **__: None)
            try:
                write_pending(open_writer(root, small))
            except Killed:
                pass
            else:
                break
        (root / "lock").unlink(missing_ok=True)
        if (root / "zarr.json").exists():
            faults = verify(root, deep=True)
            assert not faults.corrupt
            assert len(faults.missing) + faults.committed == 1
        write_pending(open_writer(root, small))
        assert not verify(root, deep=True).faults
        assert len(assert_readable_is_exact(open_cache(root), "train", ())) == 2
        steps += 1
    assert steps > 40
