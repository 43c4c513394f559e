"""How the peers write and read records, each as its own users or its fastest call would have it.

A `write_` stores the records of a flat file in a folder. A `read_` gives a function from record numbers to a batch of
torch tensors; WebDataset has no random access, it shuffles in a buffer.
"""

import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import zarr

from storage.rounds import Batches
from storage.workload import Workload

FILE_RECORDS = 64
Read = Callable[[Sequence[int]], dict[str, torch.Tensor]]
ZARRS = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}


def buffers(workload: Workload) -> dict[str, np.ndarray]:
    """Arrays for one batch, their pages in memory."""
    found = {}
    for name in workload.fields.names:
        dtype, shape = workload.fields[name].subdtype
        found[name] = np.zeros((workload.batch, *shape), dtype)
        found[name].fill(1)
    return found


def as_levels(records: torch.Tensor, workload: Workload) -> dict[str, torch.Tensor]:
    """Levels as views of whole records, float16 [B, n]."""
    found, start = {}, 0
    for level in workload.levels:
        end = start + int(np.prod(level.shape))
        found[level.name] = records[:, start:end].unflatten(1, level.shape)
        start = end
    return found


def whole(source: np.ndarray) -> np.ndarray:
    """A flat file's records as float16 [N, n]."""
    return source.view(np.float16).reshape(len(source), -1)


def write_npy(folder: Path, source: np.ndarray, workload: Workload) -> None:
    for level in workload.levels:
        shape = (workload.records, *level.shape)
        out = np.lib.format.open_memmap(folder / f"{level.name}.npy", "w+", np.float16, shape)
        for i in range(workload.records):
            out[i] = source[level.name][i]
        out.flush()


def read_npy(folder: Path, workload: Workload) -> Read:
    maps = {x.name: np.load(folder / f"{x.name}.npy", mmap_mode="r") for x in workload.levels}
    return lambda numbers: {k: torch.from_numpy(m[numbers]) for k, m in maps.items()}


def write_plain_zarr(folder: Path, source: np.ndarray, workload: Workload) -> None:
    for level in workload.levels:
        shape = (workload.records, *level.shape)
        array = zarr.create_array(
            folder / level.name, shape=shape, chunks=(1, *level.shape), dtype="f2", compressors=None
        )
        for i in range(workload.records):
            array[i] = source[level.name][i]


def read_zarr(folder: Path, workload: Workload) -> Read:
    # The records of fcache's own files are in the order of their numbers.
    arrays = {x.name: zarr.open_array(folder / x.name, mode="r") for x in workload.levels}
    return lambda numbers: {k: torch.from_numpy(np.stack([a[n] for n in numbers])) for k, a in arrays.items()}


def read_zarrs(folder: Path, workload: Workload) -> Read:
    # An array keeps the pipeline that was set when it was opened.
    with zarr.config.set(ZARRS):
        return read_zarr(folder, workload)


def read_tensorstore(folder: Path, workload: Workload) -> Read:
    import tensorstore

    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
    arrays = {}
    for level in workload.levels:
        store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder / level.name}/"}}
        arrays[level.name] = tensorstore.open(store, context=context, read=True).result()

    def read(numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        futures = {k: [a[n].read() for n in numbers] for k, a in arrays.items()}
        return {k: torch.from_numpy(np.stack([f.result() for f in fs])) for k, fs in futures.items()}

    return read


def write_h5py(folder: Path, source: np.ndarray, workload: Workload) -> None:
    import h5py

    with h5py.File(folder / "records.h5", "w") as file:
        for level in workload.levels:
            shape = (workload.records, *level.shape)
            data = file.create_dataset(level.name, shape, "f2", chunks=(1, *level.shape))
            for i in range(workload.records):
                data[i] = source[level.name][i]


def read_h5py(folder: Path, workload: Workload) -> Read:
    import h5py

    file, out = h5py.File(folder / "records.h5", "r"), buffers(workload)

    def read(numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        for name, buffer in out.items():
            data = file[name]
            for row, n in enumerate(numbers):
                data.read_direct(buffer, np.s_[n], np.s_[row])
        return {k: torch.from_numpy(x) for k, x in out.items()}

    return read


def write_safetensors(folder: Path, source: np.ndarray, workload: Workload) -> None:
    from safetensors.numpy import save_file

    for start in range(0, workload.records, FILE_RECORDS):
        rows = range(start, min(start + FILE_RECORDS, workload.records))
        tensors = {f"{x.name}/{i}": np.array(source[x.name][i]) for i in rows for x in workload.levels}
        save_file(tensors, folder / f"{start // FILE_RECORDS}.safetensors")


def read_safetensors(folder: Path, workload: Workload) -> Read:
    from safetensors import safe_open

    count = -(-workload.records // FILE_RECORDS)
    files = [safe_open(folder / f"{i}.safetensors", "pt") for i in range(count)]
    names = [x.name for x in workload.levels]
    return lambda numbers: {
        k: torch.stack([files[n // FILE_RECORDS].get_tensor(f"{k}/{n}") for n in numbers]) for k in names
    }


def write_webdataset(folder: Path, source: np.ndarray, workload: Workload) -> None:
    records = whole(source)
    for start in range(0, workload.records, FILE_RECORDS):
        with tarfile.open(folder / f"{start // FILE_RECORDS:06d}.tar", "w") as tar:
            for i in range(start, min(start + FILE_RECORDS, workload.records)):
                raw = io.BytesIO()
                np.save(raw, records[i])
                entry = tarfile.TarInfo(f"{i}.npy")
                entry.size = raw.tell()
                raw.seek(0)
                tar.addfile(entry, raw)


def open_webdataset(folder: Path, workload: Workload) -> Batches:
    import webdataset

    urls = sorted(str(p) for p in folder.glob("*.tar"))

    def batches(epoch: int) -> Iterator[tuple[Sequence[int], dict[str, torch.Tensor]]]:
        dataset = webdataset.WebDataset(urls, shardshuffle=False, seed=epoch).shuffle(32).decode()
        numbers: list[int] = []
        rows: list[np.ndarray] = []
        for sample in dataset:
            numbers.append(int(sample["__key__"]))
            rows.append(sample["npy"])
            if len(rows) == workload.batch:
                yield numbers, as_levels(torch.from_numpy(np.stack(rows)), workload)
                numbers, rows = [], []

    return batches


def write_litdata(folder: Path, source: np.ndarray, workload: Workload) -> None:
    from litdata.streaming.writer import BinaryWriter

    records, writer = whole(source), BinaryWriter(str(folder), chunk_size=FILE_RECORDS)
    for i in range(workload.records):
        writer[i] = np.array(records[i])
    writer.done()
    writer.merge()


def read_litdata(folder: Path, workload: Workload) -> Read:
    from litdata import StreamingDataset

    dataset = StreamingDataset(str(folder))
    return lambda numbers: as_levels(torch.from_numpy(np.stack([dataset[n] for n in numbers])), workload)


def write_mosaic(folder: Path, source: np.ndarray, workload: Workload) -> None:
    from streaming import MDSWriter

    records = whole(source)
    kind = {"record": f"ndarray:float16:{records.shape[1]}"}
    with MDSWriter(out=str(folder), columns=kind, size_limit=1 << 28) as writer:
        for i in range(workload.records):
            writer.write({"record": np.array(records[i])})


def read_mosaic(folder: Path, workload: Workload) -> Read:
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(folder), batch_size=workload.batch, shuffle=False)
    return lambda numbers: as_levels(torch.from_numpy(np.stack([dataset[n]["record"] for n in numbers])), workload)
