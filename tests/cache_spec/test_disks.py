"""Full disks, read-only folders and folders of other users, for real where the system permits."""

import os
import shutil
import subprocess
import sys

import pytest
from cachebuilder import group, manifest, snapshot, write_pending

from fcache.cache_spec import CorruptError, DataError, open_cache, open_writer, verify

ENVIRONMENT = {**os.environ, "PYTHONPATH": ":".join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}

# Leaves ever more space on a small file system: whatever fits is committed, the rest is NoSpaceError and pending.
FULL = """
import os, sys
from pathlib import Path
from cachebuilder import assert_readable_is_exact, group, manifest, snapshot, write_pending
from fcache.cache_spec import LevelSpec, NoSpaceError, open_cache, open_writer, verify
root, ballast = Path(sys.argv[1]) / "c", Path(sys.argv[1]) / "ballast"
levels = (LevelSpec("level-4", "C H W", (8, 32, 32), 4),)
wanted = manifest(group(samples=12, shard_records=2, levels=levels, encoding="fp32"), kinds=("semantic",))
writer = open_writer(root, wanted)
refused, steps = 0, []
for left in range(0, 1_000_000, 30_000):
    ballast.write_bytes(b"")
    space = os.statvfs(root)
    ballast.write_bytes(b"x" * max(0, space.f_bavail * space.f_frsize - left))
    before = {n: s for n, s in snapshot(root).items() if n.startswith("commits/")}
    before |= {n: s for n, s in snapshot(root).items() if any(n in body.decode() for body, _ in before.values())}
    try:
        write_pending(writer)
        break
    except NoSpaceError as e:
        refused += 1
        assert e.exit_code == 6 and "no space left" in str(e) and "it continues" in str(e)
    assert not (root / "partial").exists() or not list((root / "partial").iterdir()), "temporary files were left"
    faults = verify(root, deep=True)
    assert faults.missing and not faults.corrupt, faults
    after = snapshot(root)
    assert {n: after[n] for n in before} == before, "what was committed was touched"
    steps.append(faults.committed)
print(steps)
assert refused >= 3 and steps[0] == 0 and 0 < steps[-1] < 12, steps
assert not verify(root, deep=True).faults
assert len(assert_readable_is_exact(open_cache(root), "train", ("semantic",))) == 12
"""


def test_a_full_disk_ends_in_one_error_and_the_rest_is_written_later(tmp_path):
    code = tmp_path / "full.py"
    code.write_text(FULL)
    (tmp_path / "small").mkdir()
    mount = 'mount -t tmpfs -o size=4m none "$1" && exec "$2" "$3" "$1"'
    command = ["unshare", "--mount", "sh", "-c", mount, "sh", tmp_path / "small", sys.executable, code]
    if shutil.which("unshare") is None or subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("a small file system needs the right to mount one")
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    if "mount" in run.stderr and "permi" in run.stderr:
        pytest.skip("a small file system needs the right to mount one")
    assert run.returncode == 0, run.stdout + run.stderr


# A cache in which nothing can be written: reading works in full and leaves nothing, writing says why.
READ_ONLY = """
import os, sys
from pathlib import Path
import numpy.testing
from cachebuilder import assert_readable_is_exact, group, manifest
from fcache.cache_spec import DataError, StreamConfig, find_encoding, open_cache, open_source, open_writer, verify
root = Path(sys.argv[1])
find_encoding("int8")
if len(sys.argv) > 2 and os.geteuid() == 0:
    # Root may write anywhere; what is loaded by now is all that this user needs.
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for mode in ("mmap", "pread"):
    reader = open_cache(root, mode=mode)
    assert len(assert_readable_is_exact(reader, "train", ("semantic",))) == 5
    blocks = open_source(reader, "train", StreamConfig(2, kinds=("semantic",))).blocks(0)
    assert sum(len(b) for b in blocks) == 5
assert not verify(root, deep=True).faults
try:
    open_writer(root, manifest(group()))
except DataError as e:
    assert "cannot write" in str(e) and "choose a writable --cache or fix permissions" in str(e), e
else:
    raise AssertionError("it could be written")
"""


@pytest.fixture
def cache(folder):
    writer = open_writer(folder / "c", manifest(group()))
    write_pending(writer)
    writer.finish()
    return folder / "c"


def test_a_read_only_file_system_is_enough_for_reading(cache, tmp_path):
    before = snapshot(cache)
    bind = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "--mount", "sh", "-c", bind, "sh", cache, sys.executable, READ_ONLY]
    if shutil.which("unshare") is None or subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("a read-only file system needs the right to mount one")
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    if "mount" in run.stderr and "permi" in run.stderr:
        pytest.skip("a read-only file system needs the right to mount one")
    assert run.returncode == 0, run.stderr
    assert snapshot(cache) == before


def test_a_read_only_folder_is_enough_for_reading(cache):
    for path in (cache, *cache.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    cache.parent.chmod(0o755)
    try:
        command = [sys.executable, "-c", READ_ONLY, cache, "as another user"]
        run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
        assert run.returncode == 0, run.stderr
    finally:
        for path in (cache, *cache.rglob("*")):
            path.chmod(0o755)


def test_files_that_may_not_be_read_are_named(cache, monkeypatch):
    opened = os.open

    def refuse(path, *args, **kwargs):
        if "level-4" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DataError, match=r"cannot read .*level-4/c.0.0.0.0: Permission denied; fix its permissions"):
        open_cache(cache).read("train", "level-4", 0)


def test_a_folder_where_a_file_should_be_is_reported(cache):
    path = next(p for p in cache.rglob("c.0.0.0.0") if "level-4" in str(p))
    path.unlink()
    path.mkdir()
    (fault,) = verify(cache).faults
    assert fault.kind == "corrupt"
    with pytest.raises(CorruptError, match=r"level-4/c.0.0.0.0"):
        open_cache(cache).read("train", "level-4", 0)
