"""A split kept in memory gives the blocks that its cache gives."""

import itertools
import re

import numpy as np
import pytest
import torch
from cachebuilder import group, manifest, write_pending

from fcache.cache_spec import (
    SpecError,
    StreamConfig,
    encoding_names,
    find_encoding,
    open_cache,
    open_source,
    open_writer,
)
from fcache.cache_spec.streams.holding import HeldFiller, hold
from fcache.heads import ResidentSource, events, make_resident, resident, to_batch

KINDS = ("semantic", "instances")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """23 training samples in 2 views, and two evaluation buckets."""
    made = tmp_path_factory.mktemp("resident") / "c"
    groups = (
        group(samples=23, views=2, shard_records=4),
        group("val/32x32", 7),
        group("val/32x64", 3, canvas=(32, 64)),
    )
    write_pending(open_writer(made, manifest(*groups, kinds=KINDS)))
    return made


# What keeps a split as tensors (on a GPU, here on the CPU), and what keeps it in RAM.
KEEP = {"tensors": lambda source: ResidentSource(source, "cpu"), "ram": hold}


@pytest.fixture(params=list(KEEP))
def keep(request):
    return KEEP[request.param]


def sources(root, keep, split="train", **config):
    made = [open_source(open_cache(root), split, StreamConfig(3, kinds=KINDS, **config)) for _ in range(2)]
    return made[0], keep(made[1])


def is_kept(source):
    return isinstance(source, ResidentSource) or all(isinstance(f, HeldFiller) for f in source.fillers)


def content(block):
    arrays = {k + s: np.asarray(x) for k, c in block.levels.items() for s, x in c.parts.items()}
    for path, values in block.targets.items():
        if isinstance(values, (np.ndarray, torch.Tensor)):
            arrays[path] = np.asarray(values)
        else:
            arrays |= {f"{path}#{i}": np.asarray(v) for i, v in enumerate(values)}
    coded = {k: (c.level, c.encoding) for k, c in block.levels.items()}
    return (
        block.ids,
        block.views,
        block.view_indices,
        coded,
        {k: (a.dtype, a.shape, a.tobytes()) for k, a in arrays.items()},
    )


@pytest.mark.parametrize(
    ("split", "config"),
    [
        ("train", {}),
        ("train", {"all_views": True, "drop_last": True}),
        ("train", {"subset": 0.5, "seed": 3}),
        ("train", {"order": "sequential", "levels": ("level-8",), "world": (1, 2)}),
        ("train", {"threads": 5}),
        ("val", {}),
        ("val", {"order": "sequential"}),
    ],
)
def test_a_resident_split_gives_the_same_blocks_in_every_epoch(root, keep, split, config):
    cached, kept = sources(root, keep, split, **config)
    assert kept.info == cached.info
    for epoch in range(4):
        assert kept.num_blocks(epoch) == cached.num_blocks(epoch)
        for a, b in itertools.zip_longest(cached.blocks(epoch), kept.blocks(epoch)):
            assert content(a) == content(b)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_resident_split_starts_in_mid_epoch_with_the_same_blocks(root, keep, split):
    cached, kept = sources(root, keep, split)
    for start in range(cached.num_blocks(1) + 2):
        found = [[content(b) for b in s.blocks(1, start=start)] for s in (cached, kept)]
        assert found[0] == found[1]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_resident_split_gives_epochs_after_each_other(root, keep, split):
    cached, kept = sources(root, keep, split)
    found = [[content(b) for b in s.blocks(1, start=2, epochs=3)] for s in (cached, kept)]
    assert len(found[0]) == sum(cached.num_blocks(epoch) for epoch in (1, 2, 3)) - 2
    assert found[0] == found[1]


@pytest.mark.parametrize("decode", ["fp32", "fp16"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_the_readers_threads_decode_from_ram_too(root, split, decode):
    cached, kept = sources(root, hold, split, decode=decode)
    for epoch in range(2):
        for a, b in itertools.zip_longest(cached.blocks(epoch), kept.blocks(epoch)):
            assert content(a) == content(b)
            assert b.levels["level-4"].encoding == decode
    assert [content(b) for b in kept.coded().blocks(1)] == [content(b) for b in cached.coded().blocks(1)]


@pytest.mark.parametrize("encoding", [n for n in encoding_names() if find_encoding(n).fit is None])
def test_every_encoding_is_resident_as_it_is_stored(tmp_path, keep, encoding):
    made = tmp_path / "c"
    write_pending(open_writer(made, manifest(group(samples=5, encoding=encoding), kinds=KINDS)))
    cached, kept = sources(made, keep)
    for a, b in zip(cached.blocks(0), kept.blocks(0), strict=True):
        assert content(a) == content(b)
        one, two = (to_batch(x, torch.device("cpu")).features for x in (a, b))
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_resident_split_reads_nothing_from_its_cache_any_more(root, keep, tmp_path):
    import shutil

    copy = shutil.copytree(root, tmp_path / "copy")
    cached, kept = sources(copy, keep)
    expected = [content(b) for b in cached.blocks(2)]
    for path in copy.rglob("level-*/c.*"):
        path.write_bytes(b"")
    assert [content(b) for b in kept.blocks(2)] == expected


def test_a_resident_block_holds_until_the_next_but_one_is_asked_for(root, keep):
    _, kept = sources(root, keep)
    before = None
    for epoch in range(3):
        for block in kept.blocks(epoch):
            if before is not None:
                assert content(before[0]) == before[1]
            before = block, content(block)


def test_two_iterations_over_a_resident_split_do_not_disturb_each_other(root, keep):
    cached, kept = sources(root, keep)
    for one, two, expected in zip(kept.blocks(0), kept.blocks(0), map(content, cached.blocks(0)), strict=True):
        assert content(one) == content(two) == expected


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_bytes_that_a_split_takes_are_those_of_its_blocks(root, split):
    config = StreamConfig(4, kinds=KINDS, all_views=True)
    source = open_source(open_cache(root), split, config)
    counted = sum(len(data) for b in source.blocks(0) for _, _, data in content(b)[4].values())
    assert source.num_bytes() == counted


def test_what_does_not_fit_is_refused_with_both_numbers(root, monkeypatch):
    source = open_source(open_cache(root), "train", StreamConfig(3))
    monkeypatch.setattr(resident, "free_memory", lambda device: source.num_bytes() - 1)
    expected = (
        f"takes {source.num_bytes() / 1e9:.2f} GB in memory, {(source.num_bytes() - 1) / 1e9:.2f} GB are free in RAM"
    )
    with pytest.raises(SpecError, match=re.escape(expected)):
        make_resident(source, "ram", "cpu")
    monkeypatch.setattr(resident, "free_memory", lambda device: source.num_bytes())
    told = []
    assert is_kept(make_resident(source, "ram", "cpu", report=told.append))
    assert told == [events.SplitKept("train", "RAM", source.num_bytes())]


def test_a_device_without_memory_of_its_own_and_unknown_places_are_refused(root):
    source = open_source(open_cache(root), "train", StreamConfig(3))
    with pytest.raises(SpecError, match="kept on a GPU, the device is cpu; use --resident ram"):
        make_resident(source, "device", "cpu")
    with pytest.raises(SpecError, match="auto, none, ram, device, got 'disk'"):
        make_resident(source, "disk", "cpu")


def test_auto_keeps_in_ram_what_is_costly_to_read_and_fits_in_half_of_what_is_free(tmp_path, root, monkeypatch):
    made = tmp_path / "c"
    write_pending(open_writer(made, manifest(group(samples=5, compression="zstd"), kinds=())))
    costly = open_source(open_cache(made), "train", StreamConfig(2))
    cheap = open_source(open_cache(root), "train", StreamConfig(2))
    for source, where, free, kept in (
        (costly, "auto", 2 * costly.num_bytes(), True),
        (costly, "auto", 2 * costly.num_bytes() - 1, False),
        (costly, "none", 2 * costly.num_bytes(), False),
        (cheap, "auto", 9 * cheap.num_bytes(), False),
    ):
        monkeypatch.setattr(resident, "free_memory", lambda device, free=free: free)
        assert is_kept(make_resident(source, where, "cpu")) == kept


def test_free_memory_is_some_of_what_the_machine_has():
    import os

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < resident.free_memory(torch.device("cpu")) <= total
