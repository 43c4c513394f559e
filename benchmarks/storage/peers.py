"""Other ways to store and read the same fp16 records, by name."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from storage import formats
from storage.formats import Read
from storage.rounds import Batches
from storage.workload import Workload, shuffled

PACKAGES = ("zarrs", "tensorstore", "h5py", "safetensors", "webdataset", "litdata", "mosaicml-streaming", "numcodecs")


@dataclass(frozen=True)
class Peer:
    """`write(folder, source, workload)` stores the records of a flat file.

    `read(folder, workload)` gives a function from record numbers to a batch; without random access `stream` gives
    batches in an order of its own. `modules` must be installed. A peer that names a `store` reads what another way of
    writing wrote: "cache" (fcache's own files) or "plain" (zarr without shards), else its own.
    """

    modules: tuple[str, ...]
    read: Callable[[Path, Workload], Read] | None = None
    write: Callable[[Path, np.ndarray, Workload], None] | None = None
    store: str = ""
    stream: Callable[[Path, Workload], Batches] | None = None

    def open(self, folder: Path, workload: Workload) -> Batches:
        """Shuffled batches in the calling thread."""
        if self.stream is not None:
            return self.stream(folder, workload)
        return batches_of(workload, self.read(folder, workload))

    @property
    def missing(self) -> list[str]:
        """The modules that are not installed."""
        return [name for name in self.modules if find_spec(name) is None]


def batches_of(workload: Workload, read: Read) -> Batches:
    """Shuffled batches by a function that reads one."""

    def batches(epoch: int) -> Iterator[tuple[Sequence[int], dict[str, torch.Tensor]]]:
        for numbers in shuffled(workload, epoch):
            numbers = numbers.tolist()
            yield numbers, read(numbers)

    return batches


PEERS = {
    "np.memmap, `m[numbers]`": Peer((), formats.read_npy, formats.write_npy),
    "zarr-python, plain, a record at a time": Peer((), formats.read_zarr, store="plain"),
    "zarr-python, sharded, a record at a time": Peer((), formats.read_zarr, store="cache"),
    "zarrs, plain, a record at a time": Peer(("zarrs",), formats.read_zarrs, store="plain"),
    "zarrs, sharded, a record at a time": Peer(("zarrs",), formats.read_zarrs, store="cache"),
    "tensorstore, sharded, a future a record": Peer(("tensorstore",), formats.read_tensorstore, store="cache"),
    "h5py, `read_direct`": Peer(("h5py",), formats.read_h5py, formats.write_h5py),
    "safetensors, 64 records a file": Peer(("safetensors",), formats.read_safetensors, formats.write_safetensors),
    "WebDataset, shuffle(32)": Peer(("webdataset",), write=formats.write_webdataset, stream=formats.open_webdataset),
    "LitData, `dataset[n]`": Peer(("litdata",), formats.read_litdata, formats.write_litdata),
    "MosaicML Streaming, `dataset[n]`": Peer(("streaming",), formats.read_mosaic, formats.write_mosaic),
}


def store(name: str, peer: Peer, work: Path, source: np.ndarray, workload: Workload) -> Path:
    """The folder that a peer reads; made, and durable, if it is not there yet."""
    if peer.store == "cache":
        return work / "cache" / "train"
    folder = work / (peer.store or "".join(c for c in name if c.isalnum()))
    if not folder.exists():
        folder.mkdir()
        (peer.write or formats.write_plain_zarr)(folder, source, workload)
        os.sync()
    return folder
