"""Batch sizes of new groups."""

from collections.abc import Callable

import pytest
import torch

from fcache.cache_spec import LevelSpec, open_storage
from fcache.cache_spec.store import read_manifest
from fcache.extractor import Job, extract
from fcache.extractor.batching import batch_by_bytes, largest_batch


def levels(channels: int, side: int) -> tuple[LevelSpec, ...]:
    return (LevelSpec("level-4", "C H W", (channels, side, side), 4),)


def test_on_the_cpu_the_batch_follows_from_bytes() -> None:
    # 1 MiB a record in float32 would allow 64, 6 MiB ten, 32 MiB two.
    assert batch_by_bytes(levels(16, 128)) == 16
    assert batch_by_bytes(levels(96, 128)) == 8
    assert batch_by_bytes(levels(512, 128)) == 2
    assert batch_by_bytes(levels(2048, 256)) == 1


def test_batches_are_doubled_while_a_record_gets_cheaper() -> None:
    asked = []

    def seconds(size: int) -> float:
        asked.append(size)
        return max(1.0, size / 8)

    assert largest_batch(seconds, limit=256) == 8
    assert asked == [1, 2, 4, 8, 16]


def test_batches_stay_below_what_does_not_fit_and_below_the_limit() -> None:
    def seconds(size: int) -> float:
        if size > 32:
            raise torch.OutOfMemoryError
        return 1.0

    assert largest_batch(seconds, limit=256) == 32
    assert largest_batch(seconds, limit=12) == 8


def test_a_model_that_does_not_fit_at_all_is_an_error() -> None:
    def seconds(size: int) -> float:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        largest_batch(seconds, limit=256)


def test_the_batch_of_a_group_is_chosen_once(make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    def batches() -> dict[str, int]:
        return {g.path: g.batch for g in read_manifest(open_storage(make_job().cache)).groups}

    first = make_job(batch_size=None, shard_records=6, splits=("train",), views=1, limit=4)
    extract(first, report=lambda _: None)
    assert batches() == {"train": 6}
    monkeypatch.setattr("fcache.extractor.batching.LARGEST_CPU_BATCH", 2)
    extract(make_job(batch_size=None, shard_records=6, views=1, limit=4), report=lambda _: None)
    assert batches() == {"train": 6, "val/64x96": 2}
