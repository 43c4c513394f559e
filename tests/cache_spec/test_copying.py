"""Copies of caches between folders and object stores."""

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cachebuilder import (
    assert_readable_is_exact,
    feature_spec,
    group,
    manifest,
    records,
    target,
    write_pending,
    write_shard,
)
from s3server import make_bucket, s3_environment, s3_server

from fcache.cache_spec import (
    CorruptError,
    DataError,
    IncompatibleError,
    IncompleteError,
    SpecError,
    find_encoding,
    open_cache,
    open_writer,
    verify,
)
from fcache.cache_spec.claims import Claims
from fcache.cache_spec.storage.protocol import Storage, open_storage
from fcache.cache_spec.store import read_manifest
from fcache.cache_spec.tables import fitted_levels, read_tables, write_tables
from fcache.cache_spec.upkeep.copying import CopyProgress, copy_cache, plan_copy

GROUPS = (group("train", 5, views=2), group("val/32x32", 3))
MANIFEST = manifest(*GROUPS, kinds=("semantic", "class"))
PARTS = (6 + 2) * 3
Place = Callable[[str], Storage]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as endpoint, s3_environment(endpoint):
        yield make_bucket(endpoint, "copies")


@pytest.fixture
def place(request: pytest.FixtureRequest, folder: Path) -> Place:
    """Gives a new, empty storage of a kind."""
    pytest.importorskip("obstore")

    def new(kind: str) -> Storage:
        name = uuid.uuid4().hex
        if kind == "s3":
            return open_storage(f"{request.getfixturevalue('bucket')}/{name}")
        return open_storage(folder / name if kind == "folder" else f"memory://copies/{name}")

    return new


@pytest.fixture
def source(place: Place) -> Storage:
    """A complete cache in memory, with samples that are quarantined."""
    storage = place("memory")
    writer = open_writer(storage, MANIFEST)
    write_pending(writer, bad=("train#1", "val/32x32#2"))
    writer.finish()
    return storage


def content(storage: Storage) -> dict[str, bytes]:
    return {name: storage.read(name) for name, _ in storage.walk()}


def assert_sound(storage: Storage) -> None:
    """What it offers is exact, nothing is damaged, and nothing lies about that no cache needs."""
    assert not verify(storage, deep=True).corrupt
    reader = open_cache(storage, allow_partial=True)
    for split in reader.splits:
        with suppress(IncompleteError):  # nothing of the split is there yet
            assert_readable_is_exact(reader, split, ("semantic", "class"))
    assert {n.split("/")[0] for n, _ in storage.walk()}.isdisjoint({"partial", "claims", "lock"})


@pytest.mark.parametrize(
    ("one", "other"), [("memory", "folder"), ("folder", "folder"), ("folder", "s3"), ("s3", "memory")]
)
def test_a_copy_equals_its_source_file_by_file(place: Place, source: Storage, one: str, other: str) -> None:
    first, second = place(one), place(other)
    copy_cache(source, first)
    before = content(first)
    result = copy_cache(first, second)
    assert (result.copied, result.skipped, result.missing, result.busy, result.faults) == (PARTS, 0, 0, 0, ())
    assert content(second) == content(source) == content(first) == before
    assert result.bytes == sum(n for name, n in second.walk() if "/c." in name)
    assert_sound(second)


def test_a_copy_of_a_complete_copy_writes_nothing(source: Storage, folder: Path) -> None:
    copy_cache(source, folder / "b")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    result = copy_cache(source, folder / "b")
    assert (result.copied, result.bytes, result.skipped) == (0, 0, PARTS)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("stop", range(0, 40, 3))
def test_a_copy_that_stops_anywhere_is_a_cache_with_pending_shards_and_continues(
    source: Storage, place: Place, stop: int
) -> None:
    there, calls = place("memory"), 0

    def interrupt(progress: CopyProgress) -> None:
        nonlocal calls
        calls += 1
        if calls > stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_cache(source, there, report=interrupt)
    done = PARTS - len(verify(there).missing)
    assert_sound(there)
    result = copy_cache(source, there)
    assert (result.skipped, result.copied) == (done, PARTS - done)
    assert content(there) == content(source)


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_a_copy_that_is_killed_continues(source: Storage, place: Place, kind: str) -> None:
    local, there = place("folder"), place(kind)
    copy_cache(source, local)
    program = (
        "import sys, time\nfrom fcache.cache_spec.upkeep.copying import copy_cache\n"
        "def report(p): print(p.parts, flush=True); time.sleep(0.02)\n"
        f"copy_cache({local.url!r}, {there.url!r}, report=report)\n"
    )
    for lines in (1, 6, 15):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(lines):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not verify(there, deep=True).corrupt
    copy_cache(local, there)
    assert_sound(there)
    assert content(there) == content(source)


def damage(folder: Path, how: str) -> None:
    shard = next(p for p in sorted((folder / "train" / "level-4").glob("c.1.*")))
    data = shard.read_bytes()
    if how == "flipped":
        shard.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif how == "short":
        shard.write_bytes(data[:-1])
    elif how == "long":
        shard.write_bytes(data + b"0")
    elif how == "missing":
        shard.unlink()
    elif how == "commit":
        commit = folder / "commits" / "train" / "000001.json"
        commit.write_bytes(commit.read_bytes().replace(b"a", b"b", 1))
    else:
        (folder / "commits" / "train" / "000001.json").write_bytes(
            (folder / "commits" / "train" / "000000.json").read_bytes()
        )


@pytest.mark.parametrize("how", ["flipped", "short", "long", "missing", "commit", "misplaced"])
def test_a_damaged_shard_is_left_out_and_named(source: Storage, folder: Path, how: str) -> None:
    copy_cache(source, folder / "a")
    damage(folder / "a", how)
    result = copy_cache(folder / "a", folder / "b")
    assert [(f.group, f.part, f.shard, f.kind) for f in result.faults] == [("train", "features", 1, "corrupt")]
    assert result.copied == PARTS - 1
    assert_sound(open_storage(folder / "b"))
    assert [(f.group, f.part, f.shard) for f in verify(folder / "b").missing] == [("train", "features", 1)]
    # From a sound copy the rest comes later.
    assert copy_cache(source, folder / "b").copied == 1
    assert content(open_storage(folder / "b")) == content(source)


def test_a_damaged_commit_at_the_target_is_replaced(source: Storage, folder: Path) -> None:
    copy_cache(source, folder / "b")
    damage(folder / "b", "commit")
    assert copy_cache(source, folder / "b").copied == 1
    assert content(open_storage(folder / "b")) == content(source)


def test_pending_shards_of_the_source_are_pending_at_the_target(place: Place) -> None:
    source, there = place("memory"), place("memory")
    writer = open_writer(source, MANIFEST)
    for part in ("class", "features"):
        for shard in writer.pending(part)[:2]:
            write_shard(writer, shard, part)
    result = copy_cache(source, there)
    assert (result.copied, result.missing) == (4, PARTS - 4)
    assert_sound(there)
    write_pending(writer)
    assert copy_cache(source, there).copied == PARTS - 4
    assert content(there) == content(source)


def test_a_source_that_grew_is_copied_on_top(place: Place) -> None:
    source, there = place("memory"), place("memory")
    small = manifest(group("train", 3), kinds=("semantic",))
    write_pending(open_writer(source, small))
    copy_cache(source, there)
    write_pending(open_writer(source, MANIFEST))
    copy_cache(source, there)
    assert content(there) == content(source)
    assert_sound(there)


def test_what_the_target_has_beyond_the_source_stays(place: Place) -> None:
    source, there = place("memory"), place("memory")
    write_pending(open_writer(source, manifest(group("train", 3), kinds=("semantic",))))
    write_pending(open_writer(there, manifest(group("train", 3), kinds=("semantic",))))
    write_pending(open_writer(there, MANIFEST))
    before = content(there)
    result = copy_cache(source, there)
    assert (result.copied, result.skipped) == (0, 4)
    assert content(there) == before


def test_a_split_is_copied_alone_and_the_other_later(source: Storage, place: Place) -> None:
    there = place("memory")
    result = copy_cache(source, there, splits=("val",))
    assert result.copied == 6
    assert open_cache(there).splits == ("val",)
    copy_cache(source, there)
    assert set(content(there)) == set(content(source))
    assert_sound(there)
    with pytest.raises(SpecError, match=r"no split 'test'"):
        copy_cache(source, there, splits=("test",))


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (manifest(*GROUPS, spec=feature_spec(window=7)), r"arguments"),
        (manifest(group("train", 5, shard_records=3)), r"'train'.*laid out otherwise"),
        (manifest(group("train", 5, first=1)), r"'train'.*laid out otherwise"),
        (replace(MANIFEST, targets=(replace(target("semantic"), class_names=("a", "b")),)), r"'semantic'.*class_names"),
    ],
    ids=["features", "shards", "samples", "targets"],
)
def test_a_cache_of_another_identity_or_layout_is_not_touched(source: Storage, place: Place, other, match) -> None:
    there = place("memory")
    write_pending(open_writer(there, other))
    before = content(there)
    for call in (copy_cache, plan_copy):
        with pytest.raises(IncompatibleError, match=match):
            call(source, there)
    assert content(there) == before


def test_what_is_no_cache_is_not_touched_and_no_source(source: Storage, folder: Path) -> None:
    (folder / "thesis.tex").write_text("years")
    with pytest.raises(SpecError, match=r"not empty .*thesis"):
        copy_cache(source, folder)
    with pytest.raises(SpecError, match=r"no cache at"):
        copy_cache(folder, folder / "b")
    assert os.listdir(folder) == ["thesis.tex"]


def test_a_cache_is_not_copied_onto_itself(source: Storage, folder: Path) -> None:
    copy_cache(source, folder / "a")
    (folder / "link").symlink_to(folder / "a")
    for one, other in ((folder / "a", folder / "a"), (folder / "a", folder / "link"), (source, source.url + "/")):
        with pytest.raises(SpecError, match=r"source and target are both"):
            copy_cache(one, other)


def test_a_plan_writes_nothing_and_says_what_the_copy_does(source: Storage, folder: Path) -> None:
    plan = plan_copy(source, folder / "b")
    assert list(folder.iterdir()) == []
    result = copy_cache(source, folder / "b")
    assert (plan.copy, plan.bytes, plan.skip, plan.missing) == (result.copied, result.bytes, 0, 0)
    plan = plan_copy(source, folder / "b")
    assert (plan.copy, plan.bytes, plan.skip) == (0, 0, PARTS)


def test_progress_ends_with_all_parts_and_bytes(source: Storage, place: Place) -> None:
    told: list[CopyProgress] = []
    copy_cache(source, place("memory"), report=told.append)
    assert [p.bytes for p in told] == sorted(p.bytes for p in told)
    assert told[-1] == CopyProgress(PARTS, PARTS, told[-1].total_bytes, told[-1].total_bytes)


def test_a_shard_that_another_process_writes_at_the_target_is_left_to_it(source: Storage, place: Place) -> None:
    there = place("memory")
    copy_cache(source, there, splits=("val",))
    writer = open_writer(there, MANIFEST)
    other = Claims(there)
    assert other.acquire("train", 2)
    result = copy_cache(source, there)
    assert (result.busy, result.copied) == (3, 6 * 3 - 3)
    write_pending(writer, bad=("train#1",))
    other.release_all()
    assert copy_cache(source, there).copied == 0
    assert_sound(there)


def fitted(storage: Storage, seed: int) -> Storage:
    """A cache that has tables of an encoding that is fitted, and no shard yet."""
    manifest_ = manifest(group("train", 3, encoding="rot:1"))
    found = open_writer(storage, manifest_).manifest
    rng = np.random.default_rng(seed)
    tables = {
        name: {key: rng.random(shape) + 0.5 for key, shape in find_encoding("rot:1").fit.shapes(level).items()}
        for name, level in fitted_levels(found).items()
    }
    write_tables(storage, found, tables, samples=("train/train#0",))
    return storage


def test_fitted_tables_are_copied_before_any_shard_and_never_mixed(place: Place) -> None:
    source, there, other = fitted(place("memory"), 0), place("memory"), fitted(place("memory"), 1)
    copy_cache(source, there)
    assert content(there) == content(source)
    assert read_tables(there, read_manifest(there)).digest == read_tables(source, read_manifest(source)).digest
    assert copy_cache(source, there).copied == 0
    before = content(other)
    for call in (copy_cache, plan_copy):
        with pytest.raises(IncompatibleError, match=r"other fitted tables"):
            call(source, other)
    assert content(other) == before
    name = next(n for n in content(source) if n.startswith("tables/") and "/c." in n)
    source.write(name, bytes(len(source.read(name))))
    with pytest.raises(CorruptError, match=r"tables/"):
        copy_cache(source, place("memory"))


def test_a_target_that_fails_ends_the_copy_and_leaves_no_claims(source: Storage, folder: Path) -> None:
    copy_cache(source, folder / "b", splits=("val",))
    (folder / "b" / "commits" / "train").write_text("in the way")
    with pytest.raises(DataError, match=r"commits/train"):
        copy_cache(source, folder / "b")
    assert not [p for p in (folder / "b" / "claims").rglob("*") if p.is_file()]
    (folder / "b" / "commits" / "train").unlink()
    copy_cache(source, folder / "b")
    assert_sound(open_storage(folder / "b"))


def test_records_are_those_of_the_builder(source: Storage) -> None:
    """The exactness above rests on this: the builder's numbers are not all equal."""
    writer = open_writer(source, MANIFEST)
    shard = next(iter(writer.manifest.group("train").shards()))
    made = records(writer.manifest.group("train"), shard, "features", [0, 1])
    assert made["level-4"][0].tobytes() != made["level-4"][1].tobytes()
