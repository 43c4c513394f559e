"""Streams: which records in which order, into which buffers."""

import os
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
from cachebuilder import features, group, manifest, stored_targets, view_of, write_pending, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st

from fcache.cache_spec import (
    IncompleteError,
    SpecError,
    StreamConfig,
    encoding_names,
    find_encoding,
    open_cache,
    open_source,
    open_writer,
    parse_fraction,
    subset_ids,
)
from fcache.cache_spec.streams.order import epoch_batches, num_batches

KINDS = ("semantic", "instances")


@pytest.fixture(scope="module")
def root(folder_factory):
    """23 training samples in 2 views, and two evaluation buckets."""
    made = folder_factory()
    groups = (
        group(samples=23, views=2, shard_records=4),
        group("val/32x32", 7),
        group("val/32x64", 3, canvas=(32, 64)),
    )
    writer = open_writer(made, manifest(*groups, kinds=KINDS))
    write_pending(writer)
    return made


def names(source, epoch, start=0, epochs=1):
    blocks = source.blocks(epoch, start=start, epochs=epochs)
    return [list(zip(b.ids, b.view_indices, strict=True)) for b in blocks]


def flat(batches):
    return [pair for batch in batches for pair in batch]


def test_every_block_holds_what_was_written(root):
    reader = open_cache(root)
    for split in reader.splits:
        source = open_source(reader, split, StreamConfig(4, kinds=KINDS, all_views=True))
        for block in source.blocks(0):
            pyramid = block.pyramid(np).levels
            for i, (sample, view) in enumerate(zip(block.ids, block.view_indices, strict=True)):
                g = next(g for g in reader.manifest.split(split) if sample in g.ids)
                assert block.views[i] == view_of(g, sample, view)
                for level in g.levels:
                    x = features(level, sample, view)
                    np.testing.assert_allclose(pyramid[level.name][i], x, rtol=0, atol=abs(x).max() / 127)
                for kind in KINDS:
                    for path, value in stored_targets(g, kind, sample, view).items():
                        np.testing.assert_array_equal(block.targets[path][i], value)


@pytest.mark.parametrize("kinds", [(), KINDS])
def test_order_and_content_do_not_depend_on_threads_or_the_way_of_reading(root, kinds):
    def content(mode, threads):
        source = open_source(open_cache(root, mode=mode), "train", StreamConfig(4, kinds=kinds, threads=threads))
        return [
            (b.ids, b.view_indices, {k: c.parts[""].tobytes() for k, c in b.levels.items()})
            for epoch in (0, 1)
            for b in source.blocks(epoch)
        ]

    first = content("mmap", 1)
    for mode in ("mmap", "pread"):
        for threads in (1, 2, 5):
            assert content(mode, threads) == first


def test_an_epoch_reads_one_view_of_each_sample_in_another_order_each_time(root):
    source = open_source(open_cache(root), "train", StreamConfig(4))
    epochs = [flat(names(source, e)) for e in range(4)]
    for e, found in enumerate(epochs):
        assert sorted(found) == sorted((f"train#{i}", e % 2) for i in range(23))
        assert found == flat(names(source, e))
    assert len({tuple(i for i, _ in found) for found in epochs}) == 4
    other = open_source(open_cache(root), "train", StreamConfig(4, seed=1))
    assert flat(names(other, 0)) != epochs[0]


def test_all_views_are_read_when_asked_for(root):
    found = flat(names(open_source(open_cache(root), "train", StreamConfig(4, all_views=True)), 0))
    assert Counter(found) == Counter((f"train#{i}", v) for i in range(23) for v in (0, 1))


def test_sequential_order_is_the_manifests(root):
    config = StreamConfig(4, order="sequential")
    assert flat(names(open_source(open_cache(root), "train", config), 0)) == [(f"train#{i}", 0) for i in range(23)]
    found = flat(names(open_source(open_cache(root), "val", config), 0))
    assert found == [(f"val/32x32#{i}", 0) for i in range(7)] + [(f"val/32x64#{i}", 0) for i in range(3)]


@pytest.mark.parametrize("split", ["train", "val"])
def test_starting_in_the_middle_gives_the_tail(root, split):
    source = open_source(open_cache(root), split, StreamConfig(3))
    whole = names(source, 5)
    assert len(whole) == source.num_blocks(5)
    for start in range(len(whole) + 2):
        assert names(source, 5, start) == whole[start:]


def test_a_batch_never_mixes_buckets(root):
    for block in open_source(open_cache(root), "val", StreamConfig(4)).blocks(0):
        assert len({v.canvas for v in block.views}) == 1
        assert len({i.split("#")[0] for i in block.ids}) == 1


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    batch=st.integers(1, 9),
    processes=st.integers(1, 5),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    epoch=st.integers(0, 3),
)
@settings(max_examples=100)
def test_the_batches_of_all_ranks_are_disjoint_equal_in_number_and_cover_the_epoch(
    sizes, batch, processes, shuffle, drop_last, epoch
):
    def batches(rank, of):
        found = epoch_batches(
            sizes, batch_size=batch, shuffle=shuffle, drop_last=drop_last, key=(0, epoch), world=(rank, of)
        )
        return [(g, tuple(p.tolist())) for g, p in found]

    whole = batches(0, 1)
    records = [(g, i) for g, positions in whole for i in positions]
    assert len(set(records)) == len(records)
    everything = {(g, i) for g, n in enumerate(sizes) for i in range(n)}
    if drop_last:
        assert {len(p) for g, p in whole if sizes[g] >= batch} <= {batch}
        assert len(everything - set(records)) == sum(n % batch for n in sizes if n > batch)
    else:
        assert set(records) == everything
    counted = {of: num_batches(sizes, batch_size=batch, drop_last=drop_last, world=(0, of)) for of in (1, processes)}
    assert counted[1] == len(whole)
    shares = [batches(r, processes) for r in range(processes)]
    assert counted[processes] == len(shares[0])
    assert len({len(s) for s in shares}) == 1
    together = [b for s in shares for b in s]
    assert len(set(together)) == len(together)
    assert set(together) <= set(whole)
    assert len(whole) - len(together) < processes


def test_the_first_views_alone_are_read_as_if_there_were_no_others(root, folder_factory):
    reader = open_cache(root)
    one = open_source(reader, "train", StreamConfig(4, views=1))
    assert {view for epoch in range(3) for block in names(one, epoch) for _, view in block} == {0}
    made = folder_factory()
    write_pending(open_writer(made, manifest(group(samples=23, views=1, shard_records=4), kinds=KINDS)))
    alone = open_source(open_cache(made), "train", StreamConfig(4))
    assert [names(one, epoch) for epoch in range(3)] == [names(alone, epoch) for epoch in range(3)]
    assert (one.info.extent["views"], open_source(reader, "train", StreamConfig(4)).info.extent["views"]) == (1, 2)
    assert names(open_source(reader, "train", StreamConfig(4, views=2)), 1) == names(
        open_source(reader, "train", StreamConfig(4)), 1
    )
    # An evaluation split has one plain view, whatever is asked of the training split.
    assert open_source(reader, "val", StreamConfig(4, views=2)).info.extent["views"] == 1
    with pytest.raises(SpecError, match="has 2 views, not 3; extract it with --views"):
        open_source(reader, "train", StreamConfig(4, views=3))


@given(samples=st.integers(1, 3000), small=st.floats(0.001, 1), large=st.floats(0.001, 1))
def test_a_smaller_subset_lies_in_a_larger_one(samples, small, large):
    ids = [f"sample {i}" for i in range(samples)]
    small, large = sorted((small, large))
    inner, outer = subset_ids(ids, small), subset_ids(ids, large)
    assert set(inner) <= set(outer)
    assert inner == tuple(i for i in ids if i in set(inner))
    assert small * samples - 1e-3 <= len(inner) < small * samples + 1


@pytest.mark.parametrize(("fraction", "count"), [(0.01, 1), (0.07, 7), (0.1, 10), (0.29, 29), (1.0, 100)])
def test_a_subset_has_the_stated_size(fraction, count):
    assert len(subset_ids([str(i) for i in range(100)], fraction)) == count


def test_a_subset_is_the_same_in_every_epoch_and_in_the_record(root):
    source = open_source(open_cache(root), "train", StreamConfig(4, subset=parse_fraction("30 %")))
    assert {i for i, _ in flat(names(source, 0))} == {i for i, _ in flat(names(source, 3))}
    assert len(flat(names(source, 0))) == 7
    assert source.info.extent["subset"] == 0.3


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"batch_size": 0}, "batch_size and threads must be positive"),
        ({"batch_size": 1, "threads": 0}, "must be positive"),
        ({"batch_size": 1, "order": "random"}, "shuffled or sequential, got 'random'"),
        ({"batch_size": 1, "views": 0}, "at least one view"),
        ({"batch_size": 1, "subset": 0.0}, "more than 0 % and at most 100 %"),
        ({"batch_size": 1, "subset": 1.5}, "at most 100 %, got 150"),
        ({"batch_size": 1, "world": (2, 2)}, "0 <= rank < processes"),
        ({"batch_size": 1, "decode": "int8"}, "decoded to fp32 or fp16, or not at all"),
    ],
)
def test_impossible_configurations_are_refused(change, match):
    with pytest.raises(SpecError, match=match):
        StreamConfig(**change)


@pytest.mark.parametrize("text", ["", "ten", "0%", "101%", "-1%", "2", "nan"])
def test_a_fraction_that_is_none_is_refused(text):
    with pytest.raises(SpecError, match="subset"):
        parse_fraction(text)


def test_levels_are_read_that_were_asked_for_and_unknown_ones_are_refused(root):
    block = next(open_source(open_cache(root), "train", StreamConfig(4, levels=("level-8",))).blocks(0))
    assert list(block.levels) == ["level-8"]
    with pytest.raises(SpecError, match="unknown level 'level-9'; did you mean level-"):
        open_source(open_cache(root), "train", StreamConfig(4, levels=("level-9",)))


def bytes_of(block):
    arrays = [c.parts[s] for c in block.levels.values() for s in c.parts] + [block.targets["semantic/map"]]
    return [np.asarray(a).tobytes() for a in arrays]


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_block_holds_until_the_next_but_one_is_asked_for(root, threads):
    source = open_source(open_cache(root), "train", StreamConfig(2, kinds=KINDS, threads=threads))
    before = None
    for epoch in range(3):
        for block in source.blocks(epoch):
            now = bytes_of(block)
            if before is not None:
                assert bytes_of(before[0]) == before[1]
            before = (block, now)


def test_epochs_after_each_other_give_the_blocks_of_each(root):
    source = open_source(open_cache(root), "train", StreamConfig(4))
    each = [names(source, epoch) for epoch in range(1, 5)]
    assert names(source, 1, epochs=4) == [block for epoch in each for block in epoch]
    assert names(source, 1, start=2, epochs=2) == each[0][2:] + each[1]
    assert names(source, 1, epochs=0) == []
    endless = source.blocks(1, start=3, epochs=None)
    found = [list(zip(b.ids, b.view_indices, strict=True)) for b, _ in zip(endless, range(9), strict=False)]
    assert found == (each[0][3:] + each[1] + each[2])[:9]


def watched(source, told):
    """The same source, which calls `told(filler, rows)` in the thread that fills a block."""

    class Watched:
        def __init__(self, filler):
            self.filler = filler

        def fill(self, rows, buffers):
            told(self.filler, rows)
            return self.filler.fill(rows, buffers)

    return source.with_fillers([Watched(f) for f in source.fillers])


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="only Linux has this scheduling policy")
def test_reading_threads_give_way_to_the_one_that_works(root):
    found = {}

    def told(filler, rows):
        found[threading.current_thread().name] = os.sched_getscheduler(0)

    source = open_source(open_cache(root), "train", StreamConfig(2, threads=2))
    before = os.sched_getscheduler(0)
    for _ in watched(source, told).blocks(0):
        time.sleep(0.01)
    readers = {policy for name, policy in found.items() if name.startswith("fcache-read")}
    assert readers == {os.SCHED_BATCH}
    assert os.sched_getscheduler(0) == before == os.SCHED_OTHER


def test_the_next_epoch_is_read_ahead_while_one_ends(root):
    source = open_source(open_cache(root), "train", StreamConfig(4, threads=2))
    count, filled = source.num_blocks(0), []
    blocks = watched(source, lambda filler, rows: filled.append(filler.frame(rows)[0])).blocks(0, epochs=None)
    for _ in range(count):
        next(blocks)
    deadline = time.monotonic() + 30
    while len(filled) < count + 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    ahead = [tuple(name for name, _ in block) for block in names(source, 1)[:2]]
    assert sorted(filled[count:]) == sorted(ahead)
    blocks.close()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_block_holds_over_the_end_of_an_epoch(root, threads):
    source = open_source(open_cache(root), "train", StreamConfig(2, kinds=KINDS, threads=threads))
    before = None
    for block in source.blocks(0, epochs=3):
        if before is not None:
            assert bytes_of(before[0]) == before[1]
        before = block, bytes_of(block)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_promise_holds_across_an_iteration_that_was_left(root, threads):
    source = open_source(open_cache(root), "train", StreamConfig(2, kinds=KINDS, threads=threads))
    for left_after in (1, 2, 3, 5):
        blocks = source.blocks(0)
        for _ in range(left_after):
            last = next(blocks)
        content = bytes_of(last)
        blocks.close()
        assert bytes_of(last) == content
        following = source.blocks(1)
        next(following)
        assert bytes_of(last) == content
        following.close()


def test_buffers_are_reused_over_batches_and_epochs(root):
    made = []

    def allocate(shape, dtype):
        made.append(np.empty(shape, dtype))
        return made[-1]

    source = open_source(open_cache(root), "train", StreamConfig(2, threads=2, allocate=allocate))
    for block in source.blocks(0):
        assert any(np.shares_memory(block.levels["level-4"].parts[""], a) for a in made)
    after_one = len(made)
    for epoch in range(1, 4):
        for _ in source.blocks(epoch):
            pass
    assert len(made) == after_one == 4 * (4 + 5)


def test_two_iterations_at_once_do_not_disturb_each_other(root):
    source = open_source(open_cache(root), "train", StreamConfig(2, kinds=KINDS))
    alone = [bytes_of(b) for b in source.blocks(0)]
    for one, two, expected in zip(source.blocks(0), source.blocks(0), alone, strict=True):
        assert bytes_of(one) == bytes_of(two) == expected


def test_many_threads_may_use_one_reader(root):
    reader = open_cache(root, mode="pread")
    expected = names(open_source(reader, "train", StreamConfig(4)), 0)
    found, errors = [], []

    def run():
        try:
            for _ in range(5):
                found.append(names(open_source(reader, "train", StreamConfig(4)), 0))
                reader.refresh()
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=run) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    assert all(f == expected for f in found)


MANY = """
import resource, sys
from pathlib import Path
import numpy as np
from cachebuilder import group, manifest, write_pending
from fcache.cache_spec import StreamConfig, open_cache, open_source, open_writer
root = Path(sys.argv[1])
write_pending(open_writer(root, manifest(group(samples=60, shard_records=1), kinds=())))
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
for mode in ("mmap", "pread"):
    source = open_source(open_cache(root, mode=mode), "train", StreamConfig(4, threads=2))
    for epoch in range(2):
        assert sum(len(b) for b in source.blocks(epoch)) == 60
"""


def test_a_cache_of_more_files_than_a_process_may_open_streams(folder):
    paths = [p for p in sys.path if p]
    run = subprocess.run(
        [sys.executable, "-c", MANY, folder / "c"],
        env={"PYTHONPATH": ":".join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_growth_is_seen_by_a_new_source_only(folder):
    made = folder / "c"
    write_pending(open_writer(made, manifest(group(samples=3), kinds=())))
    reader = open_cache(made)
    source = open_source(reader, "train", StreamConfig(2))
    write_pending(open_writer(made, manifest(group(samples=5, views=2), kinds=())))
    reader.refresh()
    assert len(flat(names(source, 0))) == 3
    assert len(flat(names(open_source(reader, "train", StreamConfig(2)), 0))) == 3
    assert len(flat(names(open_source(open_cache(made), "train", StreamConfig(2)), 0))) == 5


def test_a_reader_that_was_opened_before_a_growth_is_first_used_after_it(folder):
    made = folder / "c"
    write_pending(open_writer(made, manifest(group(samples=3), kinds=())))
    reader = open_cache(made)
    write_pending(open_writer(made, manifest(group(samples=5, views=2), kinds=())))
    assert len(flat(names(open_source(reader, "train", StreamConfig(2)), 0))) == 3


def test_the_extent_says_what_was_used(root):
    reader = open_cache(root)
    info = open_source(reader, "val", StreamConfig(2, kinds=KINDS)).info
    assert info.extent["samples"] == 10
    assert info.extent["shards"] == {"val/32x32": 4, "val/32x64": 2}
    assert info.role == "evaluation"
    assert all(level.shape[1:] == (0, 0) for level in info.levels)
    assert info.extent["committed"] == open_source(reader, "val", StreamConfig(3, kinds=KINDS)).info.extent["committed"]
    assert info.extent["committed"] != open_source(reader, "train", StreamConfig(2)).info.extent["committed"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_order_can_be_asked_for_and_read_apart(root, split):
    source = open_source(open_cache(root), split, StreamConfig(3, kinds=KINDS))
    for epoch in range(3):
        expected = [(b.ids, b.view_indices, bytes_of(b)) for b in source.blocks(epoch)]
        order = source.order(epoch)
        assert len(order) == len(expected) == source.num_blocks(epoch)
        assert [(b.ids, b.view_indices, bytes_of(b)) for b in source.read(reversed(order))] == expected[::-1]
        for (number, rows), (ids, view_indices, _) in zip(order, expected, strict=True):
            found = source.records[number]
            assert tuple(found.group.ids[i] for i in found.samples[rows]) == ids
            assert tuple(found.views[rows]) == view_indices
            assert source.frame(number, rows)[::2] == (ids, view_indices)


@pytest.mark.parametrize("decode", ["fp32", "fp16"])
@pytest.mark.parametrize("encoding", [n for n in encoding_names() if find_encoding(n).fit is None])
def test_what_the_readers_threads_decode_is_what_is_decoded_afterwards(folder, encoding, decode):
    write_pending(open_writer(folder / "c", manifest(group(samples=9, encoding=encoding), kinds=("semantic",))))
    coded, decoded = (
        open_source(open_cache(folder / "c"), "train", StreamConfig(2, kinds=("semantic",), decode=d, threads=3))
        for d in (None, decode)
    )
    for epoch in range(2):
        for one, two in zip(coded.blocks(epoch), decoded.blocks(epoch), strict=True):
            assert (one.ids, one.views) == (two.ids, two.views)
            np.testing.assert_array_equal(one.targets["semantic/map"], two.targets["semantic/map"])
            for name, level in two.levels.items():
                assert (level.encoding, list(level.parts)) == (decode, [""])
                expected = one.levels[name].decode(np)
                if decode == "fp16":
                    expected = expected.astype(np.float16).astype(np.float32)
                assert level.parts[""].dtype == np.dtype(decode.replace("fp", "float"))
                assert level.decode(np).tobytes() == expected.tobytes()


def test_only_decoded_levels_lie_in_buffers_made_for_a_device(root):
    made = []

    def allocate(shape, dtype):
        made.append((shape, dtype))
        return np.empty(shape, dtype)

    source = open_source(open_cache(root), "train", StreamConfig(2, threads=1, decode="fp32", allocate=allocate))
    for epoch in range(2):
        for block in source.blocks(epoch):
            assert all(level.parts[""].dtype == np.float32 for level in block.levels.values())
    assert np.dtype("int8") not in [dtype for _, dtype in made]
    assert made.count(((2, 3, 8, 8), np.float32)) == made.count(((2, 5, 4, 4), np.float32)) == 3


def test_features_too_large_for_fp16_are_an_error_when_they_are_decoded_to_it(folder, monkeypatch):
    import cachebuilder

    def huge(level, sample, view):
        return np.full(level.shape, 7e4, np.float32)

    monkeypatch.setattr(cachebuilder, "features", huge)
    write_pending(open_writer(folder / "c", manifest(group(samples=3), kinds=())))
    source = open_source(open_cache(folder / "c"), "train", StreamConfig(2, decode="fp16"))
    with pytest.raises(SpecError, match="train/level-4 holds features that do not fit into fp16; decode to fp32"):
        list(source.blocks(0))
    fine = open_source(open_cache(folder / "c"), "train", StreamConfig(2, decode="fp32"))
    assert all((b.levels["level-4"].parts[""] > 6e4).all() for b in fine.blocks(0))


def test_a_subset_of_which_nothing_is_committed_is_incomplete(folder):
    g = group(samples=40, shard_records=1)
    writer = open_writer(folder / "c", manifest(g, kinds=()))
    chosen = subset_ids(g.ids, 0.1)
    write_shard(writer, next(s for s in writer.pending() if g.ids[s.sample] not in chosen))
    reader = open_cache(folder / "c", allow_partial=True)
    with pytest.raises(IncompleteError, match="nothing of this subset of split 'train' is committed yet"):
        open_source(reader, "train", StreamConfig(2, subset=0.1))
