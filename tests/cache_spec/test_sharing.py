"""Several processes on one cache: claims, the lock, temporary files."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Thread

import pytest
from cachebuilder import assert_readable_is_exact, group, manifest, write_pending

from fcache.cache_spec import DataError, open_cache, open_writer, verify
from fcache.cache_spec.claims import Claims
from fcache.cache_spec.storage.files import open_partial, process_alive, remove_orphans
from fcache.cache_spec.storage.local import LocalStorage

# Claims, writes and commits until nothing is pending; prints the shards that it wrote.
WORKER = """
import sys, time
from pathlib import Path
from cachebuilder import group, manifest, write_shard
from fcache.cache_spec import open_writer
root, samples, views, pause = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
writer = open_writer(root, manifest(group(samples=samples, views=views, shard_records=1)))
print("ready", flush=True)
while pending := writer.pending():
    for shard in pending:
        if not writer.claims.acquire(shard.group, shard.index):
            continue
        if shard in writer.pending():
            time.sleep(pause)
            write_shard(writer, shard)
            write_shard(writer, shard, "semantic")
            print(shard.index, flush=True)
        writer.claims.release(shard.group, shard.index)
    time.sleep(0.01)
writer.finish()
"""


def start(code, *args):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        env={**os.environ, "PYTHONPATH": ":".join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.split()[1:]


def test_processes_that_start_together_share_the_shards_and_write_each_once(folder):
    root = folder / "c"
    workers = [start(WORKER, root, 12, 2, 0.02) for _ in range(3)]
    written = [finished(w) for w in workers]
    assert sorted(int(i) for w in written for i in w) == list(range(24))
    assert sum(1 for w in written if w) >= 2
    assert not verify(root, deep=True).faults
    assert len(assert_readable_is_exact(open_cache(root), "train", ("semantic",))) == 24
    assert sorted(p.name for p in root.iterdir()) == ["commits", "manifest", "train", "zarr.json"]


def test_a_killed_process_leaves_its_shard_to_another_at_once(folder):
    root = folder / "c"
    victim = start(WORKER, root, 3, 1, 60)
    assert victim.stdout.readline() == "ready\n"
    while not list(root.glob("claims/train/*.json")):
        time.sleep(0.01)
    victim.kill()
    victim.communicate()
    began = time.monotonic()
    assert finished(start(WORKER, root, 3, 1, 0)) == ["0", "1", "2"]
    assert time.monotonic() - began < 60
    assert not verify(root, deep=True).faults
    assert sorted(p.name for p in root.iterdir()) == ["commits", "manifest", "train", "zarr.json"]


def test_processes_that_grow_one_cache_at_the_same_time_lose_nothing(folder):
    root = folder / "c"
    wanted = [(4, 1), (9, 1), (2, 4)]
    for worker in [start(WORKER, root, samples, views, 0) for samples, views in wanted]:
        finished(worker)
    write_pending(open_writer(root, manifest(group(samples=9, views=4, shard_records=1))))
    found = assert_readable_is_exact(open_cache(root), "train", ("semantic",))
    assert found == {(f"train#{i}", v) for i in range(9) for v in range(4)}
    assert not verify(root, deep=True).faults


def test_a_claim_is_held_by_one(folder):
    one, two = claims_in(folder), claims_in(folder)
    assert one.acquire("val/8x8", 3)
    assert not two.acquire("val/8x8", 3)
    assert not one.acquire("val/8x8", 3)
    assert two.acquire("val/8x8", 4)
    assert one.holds("val/8x8", 3)
    assert not two.holds("val/8x8", 3)
    one.release("val/8x8", 3)
    assert not one.holds("val/8x8", 3)
    assert two.acquire("val/8x8", 3)
    two.release_all()
    assert not list((folder / "claims/val_8x8").iterdir())


def claims_in(folder, **options):
    return Claims(LocalStorage(folder), **options)


def acquire_watching(claims, seconds):
    """Asks for shard 0 until it is had; the clock of the watching runs `seconds` further at once."""
    assert not claims.acquire("train", 0)
    for name, seen in claims._seen.items():
        claims._seen[name] = replace(seen, since=seen.since - seconds)
    return claims.acquire("train", 0)


def claim_of(folder, owner, age):
    """A claim as another process left it."""
    assert claims_in(folder).acquire("train", 0)
    (path,) = (folder / "claims/train").iterdir()
    path.write_text(owner if isinstance(owner, str) else json.dumps(owner))
    then = time.time() - age
    os.utime(path, (then, then))
    return path


def dead_pid():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def elsewhere(pid=1):
    return {"host": "another.host", "pid": pid, "token": "theirs"}


def test_a_claim_of_a_dead_process_of_this_host_is_taken_over_at_once(folder):
    claim_of(folder, {"host": socket.gethostname(), "pid": dead_pid(), "token": "theirs"}, 0)
    claims = claims_in(folder)
    assert claims.acquire("train", 0)
    assert claims.holds("train", 0)


def test_a_claim_of_another_host_is_taken_over_when_its_heart_has_stopped(folder):
    path = claim_of(folder, elsewhere(), 100)
    assert not acquire_watching(claims_in(folder), 41)
    then = time.time() - 121
    os.utime(path, (then, then))
    assert not acquire_watching(claims_in(folder), 39)
    assert acquire_watching(claims_in(folder), 41)


@pytest.mark.parametrize("jump", [-86400, 86400])
def test_a_clock_that_jumped_takes_no_claim_from_a_living_process(folder, jump):
    path, claims = claim_of(folder, elsewhere(), jump), claims_in(folder)
    assert not acquire_watching(claims, 41 if jump < 0 else 39)
    # Its holder's clock jumped: it beats on, and the watching begins anew.
    for beat in range(3):
        os.utime(path, (1e9 + 20 * beat, 1e9 + 20 * beat))
        assert not acquire_watching(claims, 39)
    # Then it dies: whatever the clocks say, it is noticed after a while.
    os.utime(path, (4e9, 4e9))
    assert not acquire_watching(claims, 119)
    assert acquire_watching(claims_in(folder), 121)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"host": 1}', '{"host": "h", "pid": "x", "token": "t"}'])
def test_a_claim_that_says_nothing_waits_for_its_time(folder, text):
    path = claim_of(folder, text, 10)
    assert not claims_in(folder).acquire("train", 0)
    os.utime(path, (0, 0))
    assert acquire_watching(claims_in(folder), 41)


def test_a_beat_keeps_a_claim_and_a_stopped_process_learns_that_it_lost_it(folder):
    sleeper, other = claims_in(folder, stale_seconds=0.2), claims_in(folder, stale_seconds=0.2)
    assert sleeper.acquire("train", 0)
    for _ in range(6):
        time.sleep(0.05)
        sleeper.beat()
        # The process is alive and of this host, so that only the heartbeat can be what counts.
        assert not other.acquire("train", 0)
    time.sleep(0.3)
    assert other.acquire("train", 0)
    assert not sleeper.holds("train", 0)
    sleeper.beat()
    sleeper.release("train", 0)
    assert other.holds("train", 0)


def test_only_one_of_many_takes_a_stale_claim_over(folder):
    for _ in range(20):
        claim_of(folder, elsewhere(), 1000)
        claims, won, barrier = [claims_in(folder, stale_seconds=0.01) for _ in range(8)], [], Barrier(8)
        for c in claims:
            assert not c.acquire("train", 0)
        time.sleep(0.02)

        def take(mine, barrier=barrier, won=won):
            barrier.wait()
            if mine.acquire("train", 0):
                won.append(mine)

        threads = [Thread(target=take, args=(c,)) for c in claims]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert sum(c.holds("train", 0) for c in claims) == 1
        for c in claims:
            c.release_all()
        assert not list((folder / "claims/train").iterdir())


def test_the_lock_waits_for_a_living_holder_and_names_it(folder):
    with (
        claims_in(folder).lock(),
        pytest.raises(DataError, match=rf"lock is held by another process \(.*{os.getpid()}.*creates or grows"),
        claims_in(folder).lock(wait_seconds=0.1),
    ):
        pass
    assert not (folder / "lock").exists()


def test_the_lock_of_a_dead_process_is_taken_over(folder):
    owner = {"host": socket.gethostname(), "pid": dead_pid(), "token": "theirs"}
    (folder / "lock").write_text(json.dumps(owner))
    with claims_in(folder).lock(wait_seconds=5):
        assert (folder / "lock").exists()
    assert not (folder / "lock").exists()


def test_temporary_files_of_the_dead_are_removed_and_of_the_living_kept(folder):
    (folder / "partial").mkdir()
    host = socket.gethostname()
    dead = folder / f"partial/{host}~{dead_pid()}~abc"
    foreign, old = folder / "partial/another.host~1~abc", folder / "partial/another.host~1~old"
    for path in (dead, foreign, old, folder / "partial/strange"):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    mine, file = open_partial(folder)
    with file:
        assert remove_orphans(folder) == 2
    assert sorted(p.name for p in (folder / "partial").iterdir()) == sorted([mine.name, foreign.name, "strange"])


def test_the_folder_of_temporary_files_may_vanish_at_any_time(folder, monkeypatch):
    made, vanished = Path.mkdir, []

    def vanish(self, *args, **kwargs):
        made(self, *args, **kwargs)
        if self.name in ("partial", "train") and len(vanished) < 3:
            vanished.append(self)
            self.rmdir()

    monkeypatch.setattr(Path, "mkdir", vanish)
    path, file = open_partial(folder)
    file.close()
    path.unlink()
    assert len(vanished) == 3
    vanished.clear()
    assert claims_in(folder).acquire("train", 0)


def test_processes_are_told_apart(folder):
    assert process_alive(os.getpid())
    assert not process_alive(dead_pid())
    assert not process_alive(2**22 + 12345)
    child = subprocess.Popen([sys.executable, "-c", ""])
    # A zombie until it is waited for.
    time.sleep(0.5)
    assert not process_alive(child.pid)
    child.wait()


def test_finishing_leaves_nothing_of_the_work_behind(folder):
    writer = open_writer(folder / "c", manifest(group()))
    other = claims_in(folder / "c")
    assert other.acquire("train", 2)
    assert writer.claims.acquire("train", 1)
    write_pending(writer)
    writer.finish()
    assert sorted(p.name for p in (folder / "c").iterdir()) == ["commits", "manifest", "train", "zarr.json"]
    # One that lost its claim so goes on and ends in order.
    other.beat()
    assert not other.holds("train", 2)
    other.release_all()


def test_who_takes_over_too_late_gives_the_winners_claim_back(folder, monkeypatch):
    claim_of(folder, elsewhere(), 1000)
    slow, quick = (claims_in(folder, stale_seconds=0.01) for _ in range(2))
    renamed = Path.rename
    assert not slow.acquire("train", 0)
    assert not quick.acquire("train", 0)
    time.sleep(0.02)

    def rename_after_the_other(self, target):
        monkeypatch.setattr(Path, "rename", renamed)
        assert quick.acquire("train", 0)
        return renamed(self, target)

    monkeypatch.setattr(Path, "rename", rename_after_the_other)
    assert not slow.acquire("train", 0)
    assert quick.holds("train", 0)
    assert [p.name for p in (folder / "claims/train").iterdir()] == ["000000.json"]
    assert not list((folder / "partial").iterdir())
