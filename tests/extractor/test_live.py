from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fcache.cache_spec import StreamConfig, find_encoding, open_cache, open_source
from fcache.extractor import Job, SeenPhotos, extract, open_live, open_photos

MakeJob = Callable[..., Job]
BACKBONES = {"mobilenetv2_050": (64, 64), "swinv2-t": (64, 64), "vit_tiny_patch16_224": (64, 64)}


@pytest.mark.parametrize("model", BACKBONES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_fp32_cache_equals_the_live_source_bit_for_bit(make_job: MakeJob, model: str, precision: str) -> None:
    job = make_job(model=model, encoding="fp32", precision=precision, limit=4, shard_records=4)
    extract(job, report=lambda e: None)
    for split in job.splits:
        cached = open_source(
            open_cache(job.cache), split, StreamConfig(batch_size=2, order="sequential", kinds=("semantic",))
        )
        live = open_live(job, split, batch_size=2, order="sequential")
        assert live.num_blocks(0) == cached.num_blocks(0) == 2
        for epoch in range(2):
            for a, b in zip(cached.blocks(epoch), live.blocks(epoch), strict=True):
                assert (a.ids, a.views, a.view_indices) == (b.ids, b.views, b.view_indices)
                for name, level in b.levels.items():
                    found = torch.from_numpy(a.levels[name].decode(np))
                    assert torch.equal(found, level.decode(torch)), (split, name)
                    assert found.std() > 0
                for path, values in b.targets.items():
                    for x, y in zip(a.targets[path], values, strict=True):
                        np.testing.assert_array_equal(x, y)


def test_cached_objects_equal_the_live_ones_bit_for_bit(make_job: MakeJob, coco_scenes: Path) -> None:
    job = make_job(dataset="coco", root=coco_scenes, view_recipe="coco-small", encoding="fp32", shard_records=4)
    extract(job, report=lambda e: None)
    names = set()
    for split in job.splits:
        options = StreamConfig(batch_size=2, order="sequential", kinds=("instances",))
        cached = open_source(open_cache(job.cache), split, options)
        live = open_live(job, split, batch_size=2, order="sequential")
        assert cached.info.target("instances") == live.info.target("instances")
        for epoch in range(2):
            for a, b in zip(cached.blocks(epoch), live.blocks(epoch), strict=True):
                assert (a.ids, a.views) == (b.ids, b.views)
                assert set(a.targets) == set(b.targets)
                for path, values in b.targets.items():
                    names.add(path)
                    for x, y in zip(a.targets[path], values, strict=True):
                        assert x.dtype == y.dtype
                        np.testing.assert_array_equal(x, y)
                for level in b.levels:
                    assert torch.equal(torch.from_numpy(a.levels[level].decode(np)), b.levels[level].decode(torch))
    assert len(names) == 8


@pytest.mark.parametrize("encoding", ["bf16", "fp16", "int8"])
def test_a_coded_cache_equals_the_live_source_within_the_stated_error(make_job: MakeJob, encoding: str) -> None:
    job = make_job(encoding=encoding, limit=4, shard_records=4)
    extract(job, report=lambda e: None)
    cached = open_source(open_cache(job.cache), "train", StreamConfig(batch_size=2, order="sequential"))
    live = open_live(job, "train", batch_size=2, order="sequential")
    for a, b in zip(cached.blocks(0), live.blocks(0), strict=True):
        for name, level in b.levels.items():
            x = level.decode(torch).numpy()
            error = np.abs(a.levels[name].decode(np) - x)
            assert (error <= find_encoding(encoding).error(x, a.levels[name].level, {}, np)).all()
            assert error.max() > 0


def test_live_and_cached_shuffle_alike(make_job: MakeJob) -> None:
    job = make_job()
    extract(job, report=lambda e: None)
    cached = open_source(open_cache(job.cache), "train", StreamConfig(batch_size=4, seed=3, drop_last=True))
    live = open_live(job, "train", batch_size=4, seed=3, drop_last=True)
    for epoch in range(3):
        order = [(b.ids, b.view_indices) for b in cached.blocks(epoch)]
        assert order == [(b.ids, b.view_indices) for b in live.blocks(epoch)]
        assert len(order) == live.num_blocks(epoch) == 2
        assert [b.ids for b in live.blocks(epoch, start=1)] == [ids for ids, _ in order[1:]]
    assert [b.ids for b in live.blocks(0, start=1, epochs=2)] == [b.ids for b in cached.blocks(0, start=1, epochs=2)]


def test_a_photo_has_the_features_of_its_evaluation_record(make_job: MakeJob, scenes: Path) -> None:
    job = make_job(encoding="fp32", batch_size=1, shard_records=1)
    extract(job, report=lambda e: None)
    source = open_source(open_cache(job.cache), "val", StreamConfig(batch_size=1, order="sequential"))
    block = next(iter(source.blocks(0)))
    (found,) = open_photos(job).read([scenes / "images" / "validation" / f"{block.ids[0]}.jpg"])
    assert isinstance(found, SeenPhotos)
    assert found.photos[0].image.shape == (64, 80, 3)
    (live,) = found.views.blocks()
    assert live.views == block.views
    for name, level in live.levels.items():
        assert torch.equal(level.decode(torch), torch.from_numpy(block.levels[name].decode(np)))
