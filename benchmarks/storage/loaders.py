"""Loaders as their users run them, ahead of the consumer where they can, epoch after epoch."""

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fcache.cache_spec.streams.order import span
from storage.formats import as_levels
from storage.ours import cache_batches
from storage.peers import PEERS
from storage.workload import Workload, shuffled

Batch = dict[str, torch.Tensor]
Epoch = Callable[[int], Iterator[Batch]]
# The batches of that many epochs, of None without end.
Epochs = Callable[[int | None], Iterator[Batch]]
WORKERS = 2


@dataclass(frozen=True)
class Loader:
    """`open(folder, workload)` reads what the peer `store` wrote, or fcache's own files ("")."""

    open: Callable[[Path, Workload], Epochs]
    store: str = ""


def fcache(mode: str, folder: Path, workload: Workload) -> Epochs:
    """Ours: two threads ahead, in the process."""
    batches = cache_batches(folder.parent, workload, mode=mode)
    return lambda epochs: (batch for _, batch in batches(0, epochs))


def in_turn(epoch: Epoch) -> Epochs:
    """Epochs of a loader that knows one at a time."""
    return lambda epochs: itertools.chain.from_iterable(map(epoch, span(0, epochs)))


def in_process(name: str, folder: Path, workload: Workload) -> Epochs:
    """A peer's batches when they are asked for: nothing is read ahead."""
    batches = PEERS[name].open(folder, workload)
    return in_turn(lambda number: (batch for _, batch in batches(number)))


class _Rows(Dataset):  # pragma: no cover - runs in worker processes
    """Whole batches of a peer by record numbers; every worker opens the files itself."""

    def __init__(self, name: str, folder: Path, workload: Workload) -> None:
        self.name, self.folder, self.workload = name, folder, workload
        self.read: Callable[[list[int]], dict[str, torch.Tensor]] | None = None

    def __getitem__(self, numbers: list[int]) -> dict[str, torch.Tensor]:
        if self.read is None:
            self.read = PEERS[self.name].read(self.folder, self.workload)
        return self.read(numbers)


def in_workers(name: str, folder: Path, workload: Workload) -> Epochs:
    """A peer in torch's DataLoader: two worker processes that read whole batches."""
    order: list[list[int]] = []
    loader = DataLoader(
        _Rows(name, folder, workload), sampler=order, batch_size=None, num_workers=WORKERS, persistent_workers=True
    )

    def epoch(number: int) -> Iterator[Batch]:
        order[:] = [numbers.tolist() for numbers in shuffled(workload, number)]
        return iter(loader)

    return in_turn(epoch)


def litdata(folder: Path, workload: Workload) -> Epochs:
    """LitData's own loader, shuffling, two worker processes."""
    from litdata import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(str(folder), shuffle=True, drop_last=True)
    # Its records are read-only arrays, of which torch warns in every worker.
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")
    loader = StreamingDataLoader(dataset, batch_size=workload.batch, num_workers=WORKERS, persistent_workers=True)
    return in_turn(lambda number: (as_levels(torch.as_tensor(batch), workload) for batch in loader))


def mosaic(folder: Path, workload: Workload) -> Epochs:
    """MosaicML's dataset, shuffling, in torch's DataLoader with two worker processes."""
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(folder), batch_size=workload.batch, shuffle=True)
    loader = DataLoader(
        dataset, batch_size=workload.batch, num_workers=WORKERS, persistent_workers=True, drop_last=True
    )
    return in_turn(lambda number: (as_levels(batch["record"], workload) for batch in loader))


def webdataset(folder: Path, workload: Workload) -> Epochs:
    """WebDataset's own loader, a shard a worker process, shuffling in a buffer."""
    import webdataset as wds

    urls = sorted(str(p) for p in folder.glob("*.tar"))
    dataset = wds.WebDataset(urls, shardshuffle=False).shuffle(32).decode().to_tuple("npy")
    loader = wds.WebLoader(
        dataset.batched(workload.batch, partial=False), batch_size=None, num_workers=min(WORKERS, len(urls)),
        persistent_workers=True,
    )  # fmt: skip
    return in_turn(lambda number: (as_levels(torch.as_tensor(np.asarray(batch)), workload) for (batch,) in loader))


NPY, SHARDED = "np.memmap, `m[numbers]`", "zarr-python, sharded, a record at a time"
LOADERS: dict[str, Loader] = {
    "fcache, 2 threads": Loader(partial(fcache, "mmap")),
    "fcache, 2 threads, positional reads": Loader(partial(fcache, "pread")),
    "np.memmap, nothing ahead": Loader(partial(in_process, NPY), NPY),
    "np.memmap, DataLoader": Loader(partial(in_workers, NPY), NPY),
    "zarr-python, sharded, DataLoader": Loader(partial(in_workers, SHARDED), SHARDED),
    "WebDataset, WebLoader": Loader(webdataset, "WebDataset, shuffle(32)"),
    "LitData, StreamingDataLoader": Loader(litdata, "LitData, `dataset[n]`"),
    "MosaicML Streaming, DataLoader": Loader(mosaic, "MosaicML Streaming, `dataset[n]`"),
}
