"""The whole path: a head trained from a cache is the head trained with the backbone in the loop."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fcache.cache_spec import StreamConfig, open_cache, open_source
from fcache.extractor import Job, extract, open_live
from fcache.extractor.scenes import write_scenes
from fcache.heads import TrainConfig, choose_heads, train
from fcache.heads.runs import Run, load_weights

CONFIG = TrainConfig(iterations=6, batch_size=4, lr=2e-3, warmup=2, clip=1.0, checkpoint_every=0)
HEADS = ["linear", "upernet:width=16,dropout=0.2"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "data"
    write_scenes(root, train=8, val=4, size=(64, 80))
    return root


def make_job(scenes: Path, cache: Path, *, model: str, encoding: str) -> Job:
    return Job(
        model=model, dataset="ade20k", root=scenes, cache=cache, weights="random:0", views=2, precision="fp32",
        view_recipe="ade20k-small", input_size=(64, 64), encoding=encoding, shard_records=4, batch_size=4, workers=0,
    )  # fmt: skip


def train_on_cache(job: Job, out: Path) -> list[Run]:
    extract(job, report=lambda event: None)
    reader = open_cache(job.cache)

    def stream(split: str, *, drop_last: bool) -> object:
        config = StreamConfig(batch_size=4, order="sequential", kinds=("semantic",), drop_last=drop_last)
        return open_source(reader, split, config)

    return run_heads(stream("train", drop_last=True), stream("val", drop_last=False), out)


def train_live(job: Job, out: Path) -> list[Run]:
    # The batches of the extraction: kernels may sum in another order for another batch.
    sources = [open_live(job, split, batch_size=4, order="sequential") for split in ("train", "val")]
    return run_heads(*sources, out)


def run_heads(source: object, validation: object, out: Path) -> list[Run]:
    heads = choose_heads(HEADS, source.info, CONFIG)
    return train(source, heads, CONFIG, out=out, validation=validation, allow_random_backbone=True)


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("model", ["mobilenetv2_050", "swinv2-t"])
def test_training_from_an_fp32_cache_ends_with_the_weights_of_live_training(
    scenes: Path, tmp_path: Path, model: str
) -> None:
    job = make_job(scenes, tmp_path / "cache", model=model, encoding="fp32")
    cached, live = train_on_cache(job, tmp_path / "cached"), train_live(job, tmp_path / "live")
    for a, b in zip(cached, live, strict=True):
        assert equal(load_weights(a), load_weights(b))
        assert a.metrics == b.metrics
        assert a.losses == b.losses
        assert a.losses[0] != a.losses[-1]


def test_training_from_a_coded_cache_stays_near_live_training(scenes: Path, tmp_path: Path) -> None:
    exact = train_on_cache(
        make_job(scenes, tmp_path / "fp32", model="mobilenetv2_050", encoding="fp32"), tmp_path / "exact"
    )
    # Losses of six steps against those from exact features: bf16 rounds at 2^-9, fp16 at 2^-12, int8 at 2^-8 of a
    # channel's largest value.
    for encoding, tolerance in (("fp16", 1e-3), ("bf16", 8e-3), ("int8", 8e-3)):
        job = make_job(scenes, tmp_path / encoding, model="mobilenetv2_050", encoding=encoding)
        for a, b in zip(exact, train_on_cache(job, tmp_path / f"runs-{encoding}"), strict=True):
            np.testing.assert_allclose(list(b.losses), list(a.losses), rtol=tolerance)
            assert list(b.losses) != list(a.losses)
