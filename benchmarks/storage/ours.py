"""fcache's own batches, through its public reader."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from fcache.cache_spec import StreamConfig, open_cache, open_source
from storage.rounds import Batches
from storage.workload import Workload


def cache_batches(
    where: Path | str, workload: Workload, *, threads: int = 2, mode: str = "auto", decode: str | None = None
) -> Batches:
    """The shuffled stream of a cache's split "train", with the numbers of its records."""
    config = StreamConfig(workload.batch, drop_last=True, threads=threads, decode=decode)
    source = open_source(open_cache(where, mode=mode), "train", config)

    def batches(epoch: int) -> Iterator[tuple[Sequence[int], dict[str, torch.Tensor]]]:
        for block in source.blocks(epoch):
            found = {k + s: torch.from_numpy(x) for k, level in block.levels.items() for s, x in level.parts.items()}
            yield [int(i.removeprefix("sample-")) for i in block.ids], found

    return batches
