"""What a machine can do: the same bytes and the same work in plain loops, into buffers that were there before."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numcodecs.zstd import Zstd

from storage.formats import buffers
from storage.rounds import Batches
from storage.workload import Workload, shuffled


def copy_limit(work: Path, workload: Workload, threads: int) -> Batches:
    """One copy of every record from the page cache, into buffers that were there before."""
    source = np.memmap(work / "flat.bin", np.uint8, "r").reshape(workload.records, -1)
    buffer = np.ones((workload.batch, source.shape[1]), np.uint8)

    def copy(rows: Sequence[tuple[int, int]]) -> None:
        for row, number in rows:
            np.copyto(buffer[row], source[number])

    structure = buffer.view(workload.fields)[:, 0]
    found = {name: torch.from_numpy(structure[name]) for name in workload.fields.names}
    return in_threads(workload, threads, copy, found)


def zstd_limit(work: Path, workload: Workload, threads: int) -> Batches:
    """A loop over the frames of the cache's own files, and a copy of the scales, which are not compressed."""
    codec, out, frames = Zstd(), buffers(workload), {}
    source = workload.flat(work / "flat.bin")
    for level in workload.levels:
        frames[level.name] = []
        for shard in range(-(-workload.records // workload.shard_records)):
            key = ".".join(["c", str(shard), *["0"] * len(level.shape)])
            data = np.memmap(work / "cache/train" / level.name / key, np.uint8, "r")
            index = np.frombuffer(data[-(16 * workload.shard_records + 4) : -4].tobytes(), "<u8").reshape(-1, 2)
            frames[level.name] += [data[int(a) : int(a + n)] for a, n in index if a != 2**64 - 1]

    def decode(rows: Sequence[tuple[int, int]]) -> None:
        for row, number in rows:
            for name, buffer in out.items():
                if name in frames:
                    codec.decode(frames[name][number], buffer[row])
                else:
                    np.copyto(buffer[row], source[name][number])

    return in_threads(workload, threads, decode, {name: torch.from_numpy(x) for name, x in out.items()})


def in_threads(workload: Workload, threads: int, fill: Callable, found: dict[str, torch.Tensor]) -> Batches:
    """Batches whose rows are filled by the calling thread and `threads - 1` others, an equal share each."""
    pool = ThreadPoolExecutor(threads)

    def batches(epoch: int) -> Iterator[tuple[Sequence[int], dict[str, torch.Tensor]]]:
        for numbers in shuffled(workload, epoch):
            rows = list(enumerate(numbers.tolist()))
            others = [pool.submit(fill, rows[t::threads]) for t in range(1, threads)]
            fill(rows[::threads])
            for other in others:
                other.result()
            yield numbers, found

    return batches


def decode_limit(work: Path, workload: Workload, threads: int, *, to: str) -> Batches:
    """int8 codes times their scales in float32, for fp16 rounded: numpy, a record and level at a time."""
    source, out = workload.flat(work / "flat.bin"), buffers(workload.decoded(to))
    wide = {x.name: [np.empty(x.shape, np.float32) for _ in range(threads)] for x in workload.levels}

    def decode(rows: Sequence[tuple[int, int]]) -> None:
        for row, number in rows:
            for level in workload.levels:
                # Thread t has the rows t, t + threads, …
                x = wide[level.name][row % threads] if to == "fp16" else out[level.name][row]
                scale = source[f"{level.name}.scale"][number]
                np.multiply(source[level.name][number], scale.reshape(-1, *[1] * (x.ndim - 1)), out=x)
                if to == "fp16":
                    np.copyto(out[level.name][row], x, casting="same_kind")

    return in_threads(workload, threads, decode, {name: torch.from_numpy(x) for name, x in out.items()})
