"""A disk that has room for ever one page, or one file, more: it is full at every stage, and the same call continues."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path

import pytest

PAGE = 4096
KINDS = ("semantic", "instances")
# Which step of a writing process found the disk full: the first of these functions that is on the stack.
STAGES = {
    "write_commit": "commit",
    "publish": "publishing",
    "close": "shard close",
    "create_or_grow": "manifest",
    "acquire": "claim",
    "append": "shard data",
    "write": "shard file",
    "finish": "finish",
}


def mount(folder, **options):
    """A file system in memory with so many bytes (size) and files (nr_inodes), or the one there changed to that."""
    said = ",".join(f"{k}={v}" for k, v in options.items())
    again = ["-o", f"remount,{said}"] if os.path.ismount(folder) else ["-t", "tmpfs", "-o", said, "none"]
    subprocess.run(["mount", *again, folder], check=True)


def stage_of(error):
    names = [f.name for f in traceback.extract_tb(error.__traceback__)]
    causes = [f.name for f in traceback.extract_tb(error.__cause__.__traceback__)] if error.__cause__ else []
    return next((stage for name, stage in STAGES.items() if name in names + causes), "elsewhere")


def committed(root):
    from cachebuilder import snapshot

    files = snapshot(root) if root.exists() else {}
    found = {n: s for n, s in files.items() if n.startswith("commits/")}
    return found | {f: files[f] for _, (data, _) in list(found.items()) for f in json.loads(data)["files"]}


def check_what_is_there(root, before):
    """Nothing half-written opens, nothing that was committed was touched, nothing temporary is left."""
    from cachebuilder import snapshot

    from fcache.cache_spec import FcacheError, IncompleteError, open_cache, verify

    left = [p.name for n in ("partial", "claims") for p in root.glob(f"{n}/**/*") if p.is_file()]
    assert left == [], f"left behind: {left}"
    assert not (root / "lock").exists(), "the lock was left behind"
    after = snapshot(root)
    assert {n: after[n] for n in before} == before, "what was committed was touched"
    if (root / "zarr.json").exists():
        found = verify(root, deep=True)
        assert not found.corrupt, found.corrupt
        for split in open_cache(root).splits:
            if open_cache(root).missing(split=split):
                with contextlib.suppress(IncompleteError):
                    open_cache(root).records(split)
                    raise AssertionError("half of a split opened")
    else:
        with contextlib.suppress(FcacheError):
            open_cache(root)
            raise AssertionError("half a cache opened")


def write_all(root):
    """What an extraction does to a cache: create, claim, write, commit, finish."""
    from cachebuilder import group, manifest, write_shard

    from fcache.cache_spec import LevelSpec, open_writer

    levels = (LevelSpec("level-4", "C H W", (4, 32, 32), 4),)
    groups = (group(samples=5, levels=levels, encoding="fp32"), group("val/32x32", 2, levels=levels, encoding="fp32"))
    writer = open_writer(root, manifest(*groups, kinds=KINDS))
    try:
        for part in writer.manifest.parts():
            for shard in writer.pending(part):
                assert writer.claims.acquire(shard.group, shard.index)
                write_shard(writer, shard, part)
                writer.claims.release(shard.group, shard.index)
    finally:
        writer.claims.release_all()
    writer.finish()


def fill_again_and_again(folder, what, most, step):
    """Writes with ever more room; returns how often each stage found none."""
    from fcache.cache_spec import NoSpaceError
    from tests.torture.caches import contents

    small, whole = Path(folder) / "small", Path(folder) / "whole"
    small.mkdir()
    write_all(whole)
    plenty = {"size": "64m", "nr_inodes": 10_000}
    stages, root = Counter(), small / "c"
    for room in range(2 * step, most, step):
        mount(small, **{**plenty, what: room})
        before = committed(root)
        try:
            write_all(root)
        except NoSpaceError as e:
            refused = e
        else:
            break
        assert refused.exit_code == 6
        assert "it continues" in str(refused), refused
        stages[stage_of(refused)] += 1
        if root.exists():
            check_what_is_there(root, before)
    else:
        raise AssertionError(f"{most} {what} are not enough")
    assert contents(root) == contents(whole)
    return stages


def extract_again_and_again(folder, most, step):
    """The same for the command line, extracting and training; ever more files are allowed."""
    from fcache.cli import main
    from fcache.extractor.scenes import write_scenes
    from tests.torture.caches import contents

    folder = Path(folder)
    small, whole, data = folder / "small", folder / "whole", folder / "data"
    small.mkdir()
    write_scenes(data, train=3, val=2, size=(48, 64))
    counts = Counter()

    def call(*arguments):
        told = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(told):
            status = main([str(a) for a in arguments])
        assert "bug in fcache" not in told.getvalue(), told.getvalue()
        assert status != 6 or "no space left" in told.getvalue(), told.getvalue()
        return status

    def extract(cache):
        options = "--model mobilenetv2_050 --weights random:0 --dataset ade20k --views 1 --view-recipe ade20k-small"
        options += " --input-size 32 32 --batch-size 2 --workers 0"
        return call("extract", *options.split(), "--data-root", data, "--cache", cache)

    def until_there_is_room(name, function, root, step):
        for room in range(1 + step, most, step):
            mount(small, size="256m", nr_inodes=room)
            status = function()
            assert status in (0, 6), f"{name} with room for {room} files: exit {status}"
            counts[f"{name}: exit {status}"] += 1
            if status == 0:
                return
            if name == "extract" and root.exists():
                check_what_is_there(root, {})
        raise AssertionError(f"{most} files are not enough")

    assert extract(whole) == 0
    until_there_is_room("extract", lambda: extract(small / "c"), small / "c", step)
    assert contents(small / "c") == contents(whole)
    shutil.rmtree(small / "c")
    train = ("train-head", "--cache", whole, "--head", "semantic/linear", "--iters", 2, "--set", "batch_size=2")
    train += ("--allow-random-backbone", "--out")
    assert call(*train, folder / "runs") == 0

    def train_again():
        begun = list((small / "runs").glob("*/checkpoint*"))
        return call(*train, small / "runs", *(["--resume"] if begun else []))

    until_there_is_room("train-head", train_again, small / "runs", 1)
    written = sorted(p.relative_to(folder / "runs").as_posix() for p in (folder / "runs").rglob("*"))
    assert written == sorted(p.relative_to(small / "runs").as_posix() for p in (small / "runs").rglob("*"))
    return counts


def mounting():
    """What runs a command where it may mount; skips where nobody may."""
    for way in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        test = [*way, "sh", "-c", "mount -t tmpfs none /mnt"]
        if shutil.which("unshare") and not subprocess.run(test, check=False, capture_output=True).returncode:
            return way
    pytest.skip("a small file system needs the right to mount one, or user namespaces")


def run_where_one_may_mount(call):
    code = f"import json; from tests.torture.test_full_disks import *; print(json.dumps({call}))"
    paths = [str(Path(__file__).parents[2]), *(p for p in sys.path if p)]
    environment = {**os.environ, "PYTHONPATH": ":".join(paths), "OMP_NUM_THREADS": "1"}
    command = [*mounting(), sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_a_disk_that_is_full_at_every_stage_ends_in_one_error_and_the_same_call_continues(folder, rounds, record):
    counts = {}
    for what, most, step in (("size", 1_000_000, rounds(6 * PAGE, PAGE)), ("nr_inodes", 400, rounds(4, 1))):
        made = folder / what
        made.mkdir()
        stages = run_where_one_may_mount(f"fill_again_and_again({str(made)!r}, {what!r}, {most}, {step})")
        assert len(stages) >= 3, stages
        assert "elsewhere" not in stages, stages
        counts["no byte left" if what == "size" else "no file left"] = stages
    met = {s for stages in counts.values() for s in stages}
    assert met >= {"manifest", "commit"}
    record("full_disks", {**counts, "half-written and open": 0, "differences": 0})


def test_commands_on_a_full_disk_exit_with_6_and_continue(folder, rounds, record):
    counts = run_where_one_may_mount(f"extract_again_and_again({str(folder)!r}, 600, {rounds(120, 4)})")
    assert counts["extract: exit 6"] >= 1
    assert counts["train-head: exit 6"] >= 1
    assert counts["extract: exit 0"] == counts["train-head: exit 0"] == 1
    record("full_disks_commands", counts)
