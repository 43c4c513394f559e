"""fcache's own batches, through its public reader."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch

from fcache.cache_spec import StreamConfig, open_cache, open_source
from storage.workload import Workload


class Stream(Protocol):
    """Batches of an epoch, or of some after each other (None: without end): record numbers, and arrays by name."""

    def __call__(
        self, epoch: int, epochs: int | None = 1
    ) -> Iterator[tuple[Sequence[int], dict[str, torch.Tensor]]]: ...


def cache_batches(
    where: Path | str, workload: Workload, *, threads: int = 2, mode: str = "auto", decode: str | None = None
) -> Stream:
    """The shuffled stream of a cache's split "train", with the numbers of its records."""
    config = StreamConfig(workload.batch, drop_last=True, threads=threads, decode=decode)
    source = open_source(open_cache(where, mode=mode), "train", config)

    def batches(epoch: int, epochs: int | None = 1) -> Iterator[tuple[Sequence[int], dict[str, torch.Tensor]]]:
        for block in source.blocks(epoch, epochs=epochs):
            found = {k + s: torch.from_numpy(x) for k, level in block.levels.items() for s, x in level.parts.items()}
            yield [int(i.removeprefix("sample-")) for i in block.ids], found

    return batches
