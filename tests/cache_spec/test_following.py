"""A split that is followed while it is written: an epoch reads what was committed when it began."""

import json
import shutil

import numpy as np
import pytest
from cachebuilder import group, manifest, write_pending, write_shard

from fcache.cache_spec import (
    IncompatibleError,
    SpecError,
    StreamConfig,
    follow_source,
    open_cache,
    open_source,
    open_writer,
)

KINDS = ("semantic",)
GROUPS = (group(samples=10, views=2, shard_records=2), group("val/32x32", 3), group("val/32x64", 2, canvas=(32, 64)))
CONFIG = StreamConfig(2, kinds=KINDS, seed=3)


@pytest.fixture
def writer(folder):
    """The writer of a cache that holds nothing yet."""
    return open_writer(folder / "c", manifest(*GROUPS, kinds=KINDS))


def write(writer, count, split="train", parts=("features", *KINDS), bad=()):
    """Commits the next `count` shards of a split."""
    for part in parts:
        for shard in [s for s in writer.pending(part) if s.group.split("/")[0] == split][:count]:
            write_shard(writer, shard, part, bad=bad)


def partial(folder):
    return open_cache(folder / "c", allow_partial=True)


def followed(folder, split="train", config=CONFIG):
    return follow_source(partial(folder), split, config)


def content(source, epoch, start=0):
    return [
        (b.ids, b.view_indices, {k: c.parts[""].tobytes() for k, c in b.levels.items()})
        for b in source.blocks(epoch, start=start)
    ]


def through_json(extent):
    return json.loads(json.dumps(extent))


def test_nothing_is_taken_before_a_shard_of_all_parts_is_committed(folder, writer):
    source = followed(folder)
    assert not source.take(0)
    write(writer, 1, parts=("features",))
    assert not source.take(0)
    with pytest.raises(SpecError, match="epoch 0 of split 'train' has no committed set yet"):
        source.num_blocks(0)
    write(writer, 1, parts=KINDS)
    assert source.take(0)
    assert [set(b.ids) for b in source.blocks(0)] == [{"train#0", "train#1"}]


def test_an_epoch_has_the_blocks_of_a_source_opened_when_it_was_taken(folder, writer):
    source = followed(folder)
    for epoch, count in enumerate((1, 2, 0, 4, 9)):
        write(writer, count)
        assert source.take(epoch)
        then = open_source(partial(folder), "train", CONFIG)
        assert source.num_blocks(epoch) == then.num_blocks(epoch)
        expected = content(then, epoch)
        assert content(source, epoch) == expected
        write(writer, 1)
        assert content(source, epoch, start=1) == expected[1:]
        assert source.take(epoch)
        assert content(source, epoch) == expected


def test_what_is_recorded_names_the_set_of_each_epoch_once(folder, writer):
    source = followed(folder)
    digests = []
    for epoch, count in enumerate((2, 0, 3, 0, 9, 0)):
        write(writer, count)
        assert source.take(epoch)
        digests.append(open_source(partial(folder), "train", CONFIG).info.extent["committed"])
    found = source.extent["epochs"]
    assert [(e["epoch"], e["samples"], e["shards"]) for e in found] == [
        (0, 4, {"train": [[0, 2]]}),
        (2, 10, {"train": [[0, 5]]}),
        (4, 10, {"train": [[0, 10]]}),
    ]
    assert [e["committed"] for e in found] == [digests[e["epoch"]] for e in found]
    assert len(set(digests)) == 3


def test_a_whole_split_is_recorded_as_that_of_a_plain_source(folder, writer):
    write_pending(writer)
    for split in ("train", "val"):
        source = followed(folder, split)
        assert source.take(0)
        assert source.extent == open_source(partial(folder), split, CONFIG).info.extent
        again = followed(folder, split)
        again.restore(through_json(source.extent), epochs=None)
        assert content(again, 0) == content(source, 0)


def test_a_whole_split_is_not_looked_at_again(folder, writer):
    write_pending(writer)
    source = followed(folder)
    assert source.take(0)
    shutil.rmtree(folder / "c" / "commits")
    assert source.take(1)


@pytest.mark.parametrize("begun", [1, 2, 3])
def test_a_restored_source_goes_on_with_the_sets_it_had_and_then_looks_again(folder, writer, begun):
    source = followed(folder)
    expected = []
    for epoch in range(begun):
        write(writer, 1 + epoch)
        assert source.take(epoch)
        expected.append(content(source, epoch))
    recorded = through_json(source.extent)
    write(writer, 2)
    again = followed(folder)
    again.restore(recorded, epochs=begun)
    for epoch in range(begun):
        assert again.take(epoch)
        assert content(again, epoch) == expected[epoch]
    assert again.extent == source.extent
    assert again.take(begun)
    assert content(again, begun) == content(open_source(partial(folder), "train", CONFIG), begun)
    assert again.extent["epochs"][:-1] == source.extent["epochs"]


def test_sets_restored_for_good_never_grow(folder, writer):
    source = followed(folder)
    write(writer, 3)
    assert source.take(0)
    recorded = through_json(source.extent)
    write(writer, 2)
    again = followed(folder)
    again.restore(recorded, epochs=None)
    assert again.take(7)
    assert {i for b in again.blocks(7) for i in b.ids} == {f"train#{i}" for i in range(6)}
    assert again.extent == recorded


def test_shards_that_changed_or_are_gone_are_not_trained_on_again(folder, writer):
    source = followed(folder)
    write(writer, 3)
    assert source.take(0)
    recorded = through_json(source.extent)
    changed = recorded | {"epochs": [recorded["epochs"][0] | {"committed": "0" * 64}]}
    with pytest.raises(IncompatibleError, match="from epoch 0 on are gone or hold something else"):
        followed(folder).restore(changed, epochs=1)
    (folder / "c" / "commits" / "train" / "000001.json").unlink()
    with pytest.raises(IncompatibleError, match="gone or hold something else now; train again with another --out"):
        followed(folder).restore(recorded, epochs=1)


def test_two_histories_that_differ_are_not_joined(folder, writer):
    sources = []
    for _ in range(2):
        write(writer, 2)
        sources.append(followed(folder))
        assert sources[-1].take(0)
    one, other = (through_json(s.extent) for s in sources)
    again = followed(folder)
    again.restore(one, epochs=1)
    again.restore(one, epochs=1)
    with pytest.raises(IncompatibleError, match="different committed sets"):
        again.restore(other, epochs=2)


def test_an_evaluation_split_is_taken_when_it_is_complete(folder, writer):
    source = followed(folder, "val")
    write(writer, 2, split="val")
    assert not source.take(0)
    write(writer, 99, split="val")
    assert source.take(0)
    assert sum(len(b) for b in source.blocks(0)) == 5


def test_a_set_without_a_usable_sample_is_waited_for_but_not_in_vain(folder, writer):
    everything = [f"train#{i}" for i in range(10)]
    source = followed(folder)
    write(writer, 1, bad=everything)
    assert not source.take(0)
    write(writer, 99, bad=everything)
    with pytest.raises(Exception, match="no record of split 'train'"):
        source.take(0)


def test_epochs_are_read_in_one_go_once_nothing_more_will_come(folder, writer):
    source = followed(folder)
    write(writer, 3)
    assert source.take(0)
    assert source.steady(0) == 1
    with pytest.raises(SpecError, match="not known yet"):
        source.blocks(0, epochs=None)
    write_pending(writer)
    assert source.take(1)
    assert (source.steady(0), source.steady(1), source.steady(9)) == (1, None, None)
    # What is complete stays as it is: no epoch after it need be taken.
    found = [b.ids for b in source.blocks(1, epochs=3)]
    assert found == [b.ids for epoch in (1, 2, 3) for b in source.blocks(epoch)]
    assert len(source.extent["epochs"]) == 2


def test_buffers_are_reused_while_a_split_grows(folder, writer):
    made = []

    def allocate(shape, dtype):
        made.append(shape)
        return np.empty(shape, dtype)

    source = followed(folder, config=StreamConfig(2, kinds=KINDS, allocate=allocate))
    write(writer, 5)
    assert source.take(0)
    assert len(list(source.blocks(0))) == 5
    after_one = len(made)
    for epoch in range(1, 4):
        write(writer, 2)
        assert source.take(epoch)
        assert list(source.blocks(epoch))
    assert len(made) == after_one


def test_a_reader_for_whole_splits_is_not_followed(folder, writer):
    write(writer, 1)
    with pytest.raises(SpecError, match="allow_partial=True"):
        follow_source(open_cache(folder / "c"), "train", CONFIG)


def test_a_source_over_named_shards_reads_these_only(folder, writer):
    from fcache.cache_spec import CacheSource

    write_pending(writer)
    source = CacheSource(partial(folder), "train", StreamConfig(2, all_views=True), shards={"train": (1, 7)})
    found = {(i, v) for b in source.blocks(0) for i, v in zip(b.ids, b.view_indices, strict=True)}
    assert found == {("train#2", 0), ("train#3", 0), ("train#4", 1), ("train#5", 1)}
