"""Ways to write the same fp16 records durably: raw files, fcache, and the peers, a shard at a time where they can."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Thread

import numpy as np
import torch
import zarr

from fcache.cache_spec import open_writer
from storage import formats
from storage.workload import Workload

Write = Callable[[Path, np.ndarray, Workload], None]


@dataclass(frozen=True)
class Writer:
    """`write(folder, source, workload)` stores the records of `source`; `read` reads them back as a check.

    `create(folder, workload)` makes what has no records yet, once, whatever their number.
    """

    modules: tuple[str, ...]
    write: Write
    read: Callable[[Path, Workload], formats.Read]
    durable: bool = False
    create: Callable[[Path, Workload], object] | None = None


def write_raw(folder: Path, source: np.ndarray, workload: Workload) -> None:
    """A file a shard and level, written record by record, then made durable."""
    for first, last in shards(workload):
        for level in workload.levels:
            with (folder / f"{level.name}.{first:09d}").open("wb") as file:
                for i in range(first, last):
                    file.write(source[level.name][i].data)
                file.flush()
                os.fsync(file.fileno())


def write_raw_hashed(folder: Path, source: np.ndarray, workload: Workload) -> None:
    """The same, with the SHA-256 of every file made by another thread meanwhile."""
    queue: Queue[memoryview | None] = Queue(8)

    def digest() -> None:
        sha = hashlib.sha256()
        while (data := queue.get()) is not None:
            sha.update(data)

    for first, last in shards(workload):
        for level in workload.levels:
            thread = Thread(target=digest)
            thread.start()
            with (folder / f"{level.name}.{first:09d}").open("wb") as file:
                for i in range(first, last):
                    data = np.ascontiguousarray(source[level.name][i]).reshape(-1).view(np.uint8).data
                    queue.put(data)
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
            queue.put(None)
            thread.join()


def read_raw(folder: Path, workload: Workload) -> formats.Read:
    """The raw files, read with numpy."""
    files = {x.name: sorted(folder.glob(f"{x.name}.*")) for x in workload.levels}
    arrays = {
        x.name: np.concatenate([np.fromfile(f, "<f2") for f in files[x.name]]).reshape(-1, *x.shape)
        for x in workload.levels
    }
    return lambda numbers: {k: torch.from_numpy(a[numbers]) for k, a in arrays.items()}


def create_fcache(folder: Path, workload: Workload) -> None:
    """Manifest and array metadata, each of them durable."""
    open_writer(folder / "cache", workload.manifest)


def write_fcache(folder: Path, source: np.ndarray, workload: Workload) -> None:
    """The public writer."""
    workload.write_cache(folder / "cache", source)


def read_fcache(folder: Path, workload: Workload) -> formats.Read:
    """The cache through zarr-python: what was written is also what others read."""
    return formats.read_zarr(folder / "cache" / "train", workload)


def write_zarr(folder: Path, source: np.ndarray, workload: Workload) -> None:
    """zarr-python, a whole shard at a time."""
    n = workload.shard_records
    for level in workload.levels:
        shape = (-(-workload.records // n) * n, *level.shape)
        array = zarr.create_array(
            folder / level.name, shape=shape, shards=(n, *level.shape), chunks=(1, *level.shape), dtype="f2",
            compressors=None,
        )  # fmt: skip
        for first, last in shards(workload):
            array[first:last] = source[level.name][first:last]


def write_zarrs(folder: Path, source: np.ndarray, workload: Workload) -> None:
    """The same through zarrs."""
    with zarr.config.set(formats.ZARRS):
        write_zarr(folder, source, workload)


def write_tensorstore(folder: Path, source: np.ndarray, workload: Workload) -> None:
    """tensorstore, a whole shard at a time, zarr v3 with the same layout."""
    import tensorstore

    n = workload.shard_records
    for level in workload.levels:
        endian = {"name": "bytes", "configuration": {"endian": "little"}}
        inner = {"chunk_shape": [1, *level.shape], "codecs": [endian], "index_codecs": [endian, {"name": "crc32c"}]}
        metadata = {
            "shape": [-(-workload.records // n) * n, *level.shape],
            "data_type": "float16",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [n, *level.shape]}},
            "codecs": [{"name": "sharding_indexed", "configuration": inner}],
        }
        store = {"driver": "file", "path": f"{folder / level.name}/"}
        spec = {"driver": "zarr3", "kvstore": store, "metadata": metadata, "create": True}
        array = tensorstore.open(spec).result()
        for first, last in shards(workload):
            array[first:last].write(source[level.name][first:last]).result()


def shards(workload: Workload) -> list[tuple[int, int]]:
    """First record and end of every shard."""
    n = workload.shard_records
    return [(i, min(i + n, workload.records)) for i in range(0, workload.records, n)]


def make_durable(folder: Path) -> None:
    """fsync of every file below a folder."""
    for path in folder.rglob("*"):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


RAW = "raw files"
WRITERS = {
    RAW: Writer((), write_raw, read_raw, durable=True),
    "raw files, SHA-256 in another thread": Writer((), write_raw_hashed, read_raw, durable=True),
    "fcache": Writer((), write_fcache, read_fcache, durable=True, create=create_fcache),
    "zarr-python, a shard at a time": Writer((), write_zarr, formats.read_zarr),
    "zarr-python, plain": Writer((), formats.write_plain_zarr, formats.read_zarr),
    "zarrs, a shard at a time": Writer(("zarrs",), write_zarrs, formats.read_zarr),
    "tensorstore, a shard at a time": Writer(("tensorstore",), write_tensorstore, formats.read_tensorstore),
    "h5py": Writer(("h5py",), formats.write_h5py, formats.read_h5py),
    "np.memmap": Writer((), formats.write_npy, formats.read_npy, durable=False),
}
