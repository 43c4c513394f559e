"""What nothing needs is found and removed; what anybody needs stays."""

import json
import os
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cachebuilder import assert_readable_is_exact, group, manifest, snapshot, write_pending, write_shard
from s3server import make_bucket, s3_environment, s3_server

from fcache.cache_spec import CorruptError, DataError, SpecError, open_cache, open_writer, verify
from fcache.cache_spec.claims import Claims
from fcache.cache_spec.storage.protocol import Storage, open_storage
from fcache.cache_spec.upkeep.cleaning import find_garbage, remove_garbage
from fcache.cache_spec.upkeep.superseding import Superseded, find_caches, find_superseded, remove_superseded

SMALL = manifest(group("train", 3), kinds=("semantic",))
MANIFEST = manifest(group("train", 5, views=2), group("val/32x32", 3), kinds=("semantic", "class"))
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as endpoint, s3_environment(endpoint):
        yield make_bucket(endpoint, "cleaning")


@pytest.fixture(params=["folder", "s3", "memory"])
def storage(request: pytest.FixtureRequest, folder: Path) -> Storage:
    """A complete small cache."""
    pytest.importorskip("obstore")
    name = uuid.uuid4().hex
    if request.param == "s3":
        found = open_storage(f"{request.getfixturevalue('bucket')}/{name}")
    else:
        found = open_storage(folder / name if request.param == "folder" else f"memory://cleaning/{name}")
    return build(found, SMALL)


def build(where: Storage | Path, wanted=MANIFEST, **options) -> Storage:
    found = open_storage(where)
    writer = open_writer(found, wanted)
    write_pending(writer, **options)
    writer.finish()
    return found


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def claim(pid: int, host: str = HOST) -> bytes:
    return json.dumps({"host": host, "pid": pid, "token": "t"}).encode()


def content(storage: Storage) -> dict[str, bytes]:
    return {name: storage.read(name) for name, _ in storage.walk()}


def test_a_complete_cache_has_no_garbage(storage: Storage) -> None:
    before = content(storage)
    assert find_garbage(storage).garbage == find_garbage(storage).foreign == ()
    assert remove_garbage(storage) == ()
    assert content(storage) == before


def test_all_that_nothing_needs_is_found_with_its_bytes_and_removed_and_nothing_else(
    storage: Storage, dead: int
) -> None:
    before = content(storage)
    shard = next(n for n in before if n.startswith("train/level-4/c.0"))
    garbage = {
        f"partial/{HOST}~{dead}~1": ("temporary", b"12345"),
        "claims/train/000000.json": ("claim", claim(dead)),
        "claims/gone/000000.json": ("claim", claim(dead)),
        "lock": ("claim", claim(dead)),
        "manifest/train-0123456789ab.json": ("manifest", b"{}"),
        "commits/train/000099.json": ("leftover", b"{}"),
        "commits/train/semantic/000077.json": ("leftover", b"{}"),
        shard.replace("/c.0", "/c.98"): ("leftover", b"123"),
        f"{shard}.0": ("leftover", b"1"),
    }
    foreign = {
        "notes.txt": b"mine",
        "train/other/c.0.0": b"1",
        "commits/README": b"",
        "train/level-4/c.x": b"1",
        "val/zarr.json": b"{}",
    }
    for name, (_, data) in garbage.items():
        storage.write(name, data)
    for name, data in foreign.items():
        storage.write(name, data)
    found = find_garbage(storage)
    assert {g.name: (g.kind, g.bytes) for g in found.garbage} == {n: (k, len(d)) for n, (k, d) in garbage.items()}
    assert dict(found.foreign) == {name: len(data) for name, data in foreign.items()}
    assert found.bytes == sum(len(data) for _, data in garbage.values())
    assert sorted(remove_garbage(storage), key=lambda g: g.name) == sorted(found.garbage, key=lambda g: g.name)
    assert content(storage) == before | foreign


def test_looking_writes_nothing(folder: Path, dead: int) -> None:
    storage = build(folder / "a", SMALL)
    storage.write(f"partial/{HOST}~{dead}~1", b"1")
    storage.write("claims/train/000000.json", claim(dead))
    before = snapshot(folder / "a")
    assert len(find_garbage(storage).garbage) == 2
    assert snapshot(folder / "a") == before


def test_files_of_a_shard_that_is_not_committed_go_unless_it_is_claimed(storage: Storage) -> None:
    storage.remove("commits/train/000001.json")
    files = {n for n, _ in storage.walk() if "/c.1" in n and not n.startswith("train/targets/")}
    assert len(files) > 4
    claims = Claims(storage)
    assert claims.acquire("train", 1)
    assert find_garbage(storage).garbage == remove_garbage(storage) == ()
    claims.release_all()
    assert {g.name for g in find_garbage(storage).garbage} == files
    assert {g.name for g in remove_garbage(storage)} == files
    assert write_pending(open_writer(storage, SMALL)) == 1
    assert_readable_is_exact(open_cache(storage), "train", ("semantic",))


def test_what_living_processes_hold_stays(storage: Storage) -> None:
    before = content(storage) | {
        f"partial/{HOST}~{os.getpid()}~1": b"1",
        "partial/elsewhere~1~1": b"1",
        "claims/train/000000.json": claim(os.getpid()),
        "claims/train/000001.json": claim(1, host="elsewhere"),
    }
    for name, data in before.items():
        storage.write(name, data)
    assert find_garbage(storage).garbage == remove_garbage(storage) == ()
    assert content(storage) == before


def test_while_a_cache_is_created_or_grown_nothing_is_removed(storage: Storage, dead: int) -> None:
    storage.write(f"partial/{HOST}~{dead}~1", b"1")
    storage.write("manifest/train-0123456789ab.json", b"{}")
    storage.write("commits/train/000099.json", b"{}")
    with Claims(storage).lock():
        assert [g.kind for g in find_garbage(storage).garbage] == ["temporary"]
        with pytest.raises(DataError, match=r"held by another process"):
            remove_garbage(storage)
    assert len(remove_garbage(storage)) == 3


def test_a_damaged_commit_keeps_its_files_for_repair(folder: Path) -> None:
    storage = build(folder / "a", SMALL)
    storage.write("commits/train/000000.json", b"{}")
    assert find_garbage(storage).garbage == ()


def test_the_leftovers_of_a_killed_writer_go_and_it_continues(folder: Path) -> None:
    program = (
        "import os, signal\nfrom pathlib import Path\nfrom cachebuilder import *\n"
        "from fcache.cache_spec import open_writer\nfrom fcache.cache_spec.shardfile import ShardFile\n"
        f"m = manifest(group('train', 3), kinds=('semantic',)); w = open_writer(Path({str(folder / 'a')!r}), m)\n"
        "publish, count = ShardFile.publish, 0\n"
        "def dying(self):\n"
        "    global count\n"
        "    count += 1\n"
        "    publish(self) if count < 12 else os.kill(os.getpid(), signal.SIGKILL)\n"
        "ShardFile.publish = dying\n"
        "for part in m.parts():\n"
        "    for s in w.pending(part): w.claims.acquire(s.group, s.index); write_shard(w, s, part)\n"
    )
    tests = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", program], cwd=tests, timeout=60, check=False)
    storage = open_storage(folder / "a")
    assert {g.kind for g in find_garbage(storage).garbage} == {"temporary", "claim", "leftover"}
    remove_garbage(storage)
    assert find_garbage(storage).garbage == ()
    assert not verify(storage, deep=True).corrupt
    build(storage, SMALL)
    assert {n: d for n, d in content(storage).items() if "/c." in n} == {
        n: d for n, d in content(build(folder / "b", SMALL)).items() if "/c." in n
    }


def test_cleaning_beside_a_writer_harms_nothing(folder: Path) -> None:
    storage = open_storage(folder / "a")
    writer = open_writer(storage, MANIFEST)
    stop, errors = threading.Event(), list[BaseException]()

    def clean() -> None:
        try:
            while not stop.is_set():
                remove_garbage(storage)
        except BaseException as e:
            errors.append(e)

    thread = threading.Thread(target=clean)
    thread.start()
    try:
        for part in MANIFEST.parts():
            for shard in writer.pending(part):
                while not writer.claims.acquire(shard.group, shard.index):
                    pass
                write_shard(writer, shard, part)
                writer.claims.release(shard.group, shard.index)
    finally:
        stop.set()
        thread.join()
    assert errors == []
    found = verify(storage, deep=True)
    assert found.faults == ()


# Superseded caches.


@pytest.fixture
def caches(folder: Path) -> Callable[..., str]:
    def make(name: str, wanted=MANIFEST, **options) -> str:
        build(folder / name, wanted, **options)
        return str(folder / name)

    return make


def size(cache: str) -> int:
    return sum(n for _, n in open_storage(cache).walk())


def test_a_cache_whose_records_lie_in_another_one_is_superseded(caches: Callable[..., str], folder: Path) -> None:
    wide, narrow = caches("x/wide"), caches("narrow", SMALL)
    caches("x/other", manifest(group("train", 3, encoding="fp16"), kinds=("semantic",)))
    assert find_caches(folder) == sorted([wide, narrow, str(folder / "x" / "other")])
    assert find_superseded(find_caches(folder)) == [Superseded(narrow, wide, size(narrow))]


def test_caches_below_a_url_are_found(bucket: str) -> None:
    place = f"{bucket}/{uuid.uuid4().hex}"
    build(open_storage(f"{place}/a"), SMALL)
    build(open_storage(f"{place}/x/b"), MANIFEST)
    open_storage(f"{place}/c").write("zarr.json", b"{}")
    assert find_caches(place) == [f"{place}/a", f"{place}/x/b"]
    assert find_caches(f"{place}/a") == [f"{place}/a"]
    assert [(f.cache, f.by) for f in find_superseded(find_caches(place))] == [(f"{place}/a", f"{place}/x/b")]


@pytest.mark.parametrize(
    "other",
    [
        manifest(group("train", 4), kinds=("semantic",)),
        manifest(group("train", 3, views=3), kinds=("semantic",)),
        manifest(group("train", 3), kinds=("semantic", "depth")),
        manifest(group("train", 3), group("val/32x64", 1), kinds=("semantic",)),
        manifest(group("train", 3, first=9), kinds=("semantic",)),
    ],
    ids=["samples", "views", "targets", "groups", "other samples"],
)
def test_a_cache_with_something_of_its_own_is_not_superseded(caches: Callable[..., str], other) -> None:
    caches_ = [caches("a", manifest(group("train", 3, views=2), kinds=("semantic",))), caches("b", other)]
    assert [f for f in find_superseded(caches_) if f.cache == caches_[1]] == []


def test_a_record_that_the_other_one_quarantined_or_has_not_yet_is_something_of_its_own(
    caches: Callable[..., str], folder: Path
) -> None:
    narrow = caches("narrow", SMALL)
    bad = caches("bad", bad=("train#1",))
    writer = open_writer(folder / "partial", MANIFEST)
    write_shard(writer, writer.pending()[0])
    assert find_superseded([narrow, bad, str(folder / "partial")]) == []
    assert [(f.cache, f.by) for f in find_superseded([bad, caches("good")])] == [(bad, str(folder / "good"))]


def test_of_equal_caches_the_first_stays_and_all_others_name_one_that_stays(caches: Callable[..., str]) -> None:
    a, b, c, narrow = caches("a"), caches("b"), caches("c"), caches("0", SMALL)
    assert [(f.cache, f.by) for f in find_superseded([c, narrow, b, a])] == [(narrow, a), (b, a), (c, a)]


def test_a_cache_that_somebody_writes_to_is_not_superseded(caches: Callable[..., str]) -> None:
    wide, narrow = caches("wide"), caches("narrow", SMALL)
    for cache in (narrow, wide):
        claims = Claims(open_storage(cache))
        assert claims.acquire("train", 0)
        assert find_superseded([wide, narrow]) == []
        claims.release_all()
    open_storage(narrow).write(f"partial/{HOST}~{os.getpid()}~1", bytes(10))
    assert find_superseded([wide, narrow]) == []


def test_removing_a_superseded_cache_leaves_the_other_and_foreign_files(
    caches: Callable[..., str], folder: Path
) -> None:
    wide, narrow = caches("wide"), caches("narrow", SMALL)
    before = snapshot(Path(wide))
    (folder / "narrow" / "notes.txt").write_text("mine")
    found = find_superseded([wide, narrow])
    remove_superseded(found[0])
    assert snapshot(Path(wide)) == before
    assert [str(p.relative_to(folder)) for p in (folder / "narrow").rglob("*")] == ["narrow/notes.txt"]
    with pytest.raises((SpecError, DataError)):
        remove_superseded(found[0])
    assert find_caches(folder) == [wide]
    again = caches("again", SMALL)
    remove_superseded(find_superseded([wide, again])[0])
    assert not Path(again).exists()


def test_nothing_is_removed_for_a_cache_that_is_damaged_inside(caches: Callable[..., str], folder: Path) -> None:
    wide, narrow = caches("wide"), caches("narrow", SMALL)
    shard = next((folder / "wide" / "train" / "level-4").glob("c.0.*"))
    data = bytearray(shard.read_bytes())
    data[0] ^= 1
    shard.write_bytes(data)
    before = snapshot(Path(narrow))
    with pytest.raises(CorruptError, match=r"wide is damaged .* stays"):
        remove_superseded(find_superseded([wide, narrow])[0])
    assert snapshot(Path(narrow)) == before


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no folder"):
        find_caches(tmp_path / "nothing")
