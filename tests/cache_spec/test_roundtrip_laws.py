"""Any cache, written in any order and stopped anywhere, reads as written or says that it is incomplete."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from cachebuilder import assert_readable_is_exact, group, manifest, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st

from fcache.cache_spec import (
    IncompleteError,
    LevelSpec,
    Manifest,
    Shard,
    StreamConfig,
    encoding_names,
    open_cache,
    open_source,
    open_writer,
    verify,
)
from fcache.cache_spec.commits import read_commits
from fcache.cache_spec.layout import FEATURES
from fcache.cache_spec.targets import KINDS

SIZES = st.integers(1, 6)


@st.composite
def level_sets(draw: st.DrawFn) -> tuple[LevelSpec, ...]:
    levels = []
    frames = draw(st.integers(1, 3))
    for i in range(draw(st.integers(1, 3))):
        dims = draw(st.sampled_from(["C", "C H W", "T C H W", "T C"]))
        shape = tuple(frames if d == "T" else draw(SIZES) for d in dims.split())
        levels.append(LevelSpec(f"level-{i}", dims, shape, 4 << i))
    return tuple(levels)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    levels, encoding = draw(level_sets()), draw(st.sampled_from(encoding_names()))
    paths = draw(st.sampled_from([("train",), ("val/32x32",), ("train", "val/8x12", "val/32x32")]))
    groups = [
        group(
            path,
            draw(st.integers(1, 5)),
            views=draw(st.integers(1, 3)) if path == "train" else 1,
            shard_records=draw(st.integers(1, 4)),
            encoding=encoding,
            levels=levels,
            compression=draw(st.sampled_from(["none", "zstd"])),
            canvas=(8, 12) if path == "val/8x12" else (32, 32),
        )
        for path in paths
    ]
    return manifest(*groups, kinds=draw(st.sets(st.sampled_from(sorted(KINDS)), max_size=3)))


def all_work(wanted: Manifest, root: Path) -> list[tuple[Shard, str]]:
    writer = open_writer(root, wanted)
    return [(shard, part) for part in wanted.parts() for shard in writer.pending(part)]


@given(data=st.data())
@settings(max_examples=25)
def test_whatever_is_written_in_any_order_reads_back_exactly(data, folder_factory):
    wanted, root = data.draw(manifests()), folder_factory()
    work = all_work(wanted, root)
    for shard, part in data.draw(st.permutations(work)):
        write_shard(open_writer(root, wanted), shard, part)
    reader = open_cache(root, mode=data.draw(st.sampled_from(["mmap", "pread"])))
    kinds = tuple(t.kind for t in wanted.targets)
    for split in reader.splits:
        seen = assert_readable_is_exact(reader, split, kinds)
        assert seen == {(i, v) for g in wanted.split(split) for i in g.ids for v in range(g.views)}
    assert not verify(root, deep=True).faults
    shutil.rmtree(root)


@given(data=st.data())
@settings(max_examples=25)
def test_a_cache_stopped_anywhere_is_refused_and_its_committed_part_is_exact(data, folder_factory):
    wanted, root = data.draw(manifests()), folder_factory()
    order = data.draw(st.permutations(all_work(wanted, root)))
    done = data.draw(st.integers(0, len(order) - 1))
    bad = set(data.draw(st.lists(st.sampled_from([i for g in wanted.groups for i in g.ids]), max_size=2)))
    writer = open_writer(root, wanted)
    for shard, part in order[:done]:
        write_shard(writer, shard, part, bad=bad)
    shard, part = order[done]
    # As a process leaves it that is killed now; it lets go at the end, for this one lives.
    unfinished = writer.write(shard, part)

    kinds = tuple(t.kind for t in wanted.targets)
    committed = {(s.group, s.index, part) for s, part in order[:done]}
    faults = verify(root, deep=True)
    assert len(faults.missing) == len(order) - done
    assert not faults.corrupt
    for split in dict.fromkeys(g.split for g in wanted.groups):
        expected = {
            (i, s.view)
            for g in open_cache(root).manifest.split(split)
            for s in g.shards()
            if all((g.path, s.index, p) in committed for p in (FEATURES, *kinds))
            for i in g.ids[s.sample : s.sample + s.count]
            if i not in bad
        }
        complete = all((s.group, s.index, p) in committed for s, p in order if s.group.split("/")[0] == split)
        partial = open_cache(root, allow_partial=True)
        if not complete:
            with pytest.raises(IncompleteError, match="not committed"):
                open_cache(root).records(split, kinds)
        if expected:
            assert assert_readable_is_exact(partial, split, kinds) == expected
            blocks = open_source(partial, split, StreamConfig(2, kinds=kinds, all_views=True)).blocks(0)
            streamed = [(i, v) for b in blocks for i, v in zip(b.ids, b.view_indices, strict=True)]
            assert sorted(streamed) == sorted(expected)
        else:
            with pytest.raises(IncompleteError, match="no record"):
                partial.records(split, kinds)

    # The same command again finishes it, and what was committed is not written again.
    again = open_writer(root, replace(wanted))
    for part in wanted.parts():
        for shard in again.pending(part):
            assert (shard.group, shard.index, part) not in committed
            write_shard(again, shard, part, bad=bad)
    unfinished.abort()
    again.finish()
    assert not verify(root, deep=True).faults
    assert not (root / "partial").exists()
    shutil.rmtree(root)


def test_a_shard_whose_samples_were_all_quarantined_is_complete_and_empty(folder):
    wanted = manifest(group(samples=4, shard_records=2))
    writer = open_writer(folder / "c", wanted)
    for part in wanted.parts():
        for shard in writer.pending(part):
            write_shard(writer, shard, part, bad=["train#0", "train#1"])
    reader = open_cache(folder / "c")
    assert assert_readable_is_exact(reader, "train", ("semantic",)) == {("train#2", 0), ("train#3", 0)}
    assert set(reader.quarantined("train")) == {"train#0", "train#1"}
    assert not verify(folder / "c", deep=True).faults


def test_a_sample_quarantined_by_one_part_is_left_out_of_streams_that_ask_for_that_part_only(folder):
    wanted = manifest(group(samples=4))
    writer = open_writer(folder / "c", wanted)
    for shard in writer.pending():
        write_shard(writer, shard)
    for shard in writer.pending("semantic"):
        write_shard(writer, shard, "semantic", bad=["train#3"])
    reader = open_cache(folder / "c")
    assert len(assert_readable_is_exact(reader, "train", ())) == 4
    assert len(assert_readable_is_exact(reader, "train", ("semantic",))) == 3


def test_writing_the_same_shard_twice_leaves_the_same_bytes(folder):
    wanted = manifest(group(samples=2))
    writer = open_writer(folder / "c", wanted)
    (shard,) = writer.pending()
    write_shard(writer, shard)
    first = read_commits(writer.storage, "train", FEATURES)[0]
    write_shard(writer, shard)
    assert read_commits(writer.storage, "train", FEATURES)[0].content == first.content


def test_a_rewrite_with_other_content_removes_the_old_commit_before_it_replaces_a_file(folder, monkeypatch):
    wanted = manifest(group(samples=2))
    root = folder / "c"
    writer = open_writer(root, wanted)
    (shard,) = writer.pending()
    write_shard(writer, shard)

    def stop(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fcache.cache_spec.shardfile.ShardFile.publish", stop)
    with pytest.raises(KeyboardInterrupt):
        write_shard(writer, shard, bad=["train#1"])
    assert writer.pending() == [shard]
    assert not list((root / "partial").iterdir())
