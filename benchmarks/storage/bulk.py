"""Caches of very many small records, written through the public writer without waiting for the disk."""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fcache.cache_spec import LevelSpec, index_arrays, open_writer
from storage.workload import VIEW, Workload


@dataclass(frozen=True)
class Bulk:
    """`records` records of one level of [channels] in fp16, all 0 but the first value: the record's number mod 2048."""

    records: int
    channels: int

    @cached_property
    def workload(self) -> Workload:
        """The same as a workload, in shards of 64."""
        levels = (LevelSpec("level-32", "C", (self.channels,), 32),)
        return Workload(self.records, levels=levels, shard_records=64)

    def write_cache(self, root: Path, *, processes: int = 1) -> None:
        """The cache, whole and committed; several processes write a share of the shards each."""
        writer = open_writer(root, self.workload.manifest)
        shares = [(root, self, i, processes) for i in range(processes)]
        if processes == 1:
            write_share(*shares[0])
        else:
            with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
                list(pool.map(write_share, *zip(*shares, strict=True)))
        writer.finish()


def write_share(root: Path, bulk: Bulk, first: int, step: int) -> None:
    """Every `step`-th shard from the `first` on."""
    with without_sync():
        writer = open_writer(root, bulk.workload.manifest)
        for shard in writer.pending():
            if shard.index % step != first:
                continue
            positions, numbers = range(shard.count), np.arange(shard.first, shard.first + shard.count)
            values = np.zeros((shard.count, bulk.channels), np.float16)
            values[:, 0] = numbers % 2048
            samples = list(range(shard.sample, shard.sample + shard.count))
            arrays = index_arrays([VIEW] * shard.count, samples, [0] * shard.count)
            shard_writer = writer.write(shard)
            shard_writer.append(positions, {"level-32": values} | arrays)
            shard_writer.commit(facts={}, fingerprint={})


@contextmanager
def without_sync() -> Iterator[None]:
    """No fsync: these caches live as long as the benchmark, and need not survive a crash."""
    before, os.fsync = os.fsync, lambda fd: None
    try:
        yield
    finally:
        os.fsync = before
