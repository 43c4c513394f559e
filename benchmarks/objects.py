"""How fast records stream out of an object store, and how many requests that takes.

    python benchmarks/objects.py [--records 64] [--rounds 3] [--delay 20]

An S3 server (moto) runs in a process of its own on this machine and answers every request at once, or after `--delay`
milliseconds. It is slow and shares the cores, so that only requests a record and ratios mean something, not MB/s.
Rounds are interleaved: every variant once, then again; ratios are to zarr-python's loop of the same round. A variant is
opened anew each round, which counts: opening costs requests, too. All are compared bit for bit before.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import zarr
from storage.ours import cache_batches
from storage.peers import batches_of
from storage.report import arguments, machine, publish, table, work_folder
from storage.rounds import Batches, Row, check, timed
from storage.s3 import BUCKET, Server, open_bucket, s3_server, upload
from storage.workload import Workload

from fcache.cache_spec import LevelSpec

# A quarter of the pyramid of the other benchmarks: 256 x 256 pixels.
LEVELS = (
    LevelSpec("level-4", "C H W", (96, 64, 64), 4),
    LevelSpec("level-8", "C H W", (192, 32, 32), 8),
    LevelSpec("level-16", "C H W", (384, 16, 16), 16),
    LevelSpec("level-32", "C H W", (768, 8, 8), 32),
)
LOOP = "zarr-python, ObjectStore, a record at a time"
COLUMNS = {
    "requests a record": "{requests:.2f}",
    "bytes a byte": "{bytes:.2f}",
    "MB/s": "{mb_per_s:.0f}",
    "times zarr-python's loop (range)": "{ratio:.2f} ({low:.2f} to {high:.2f})",
}


def main() -> None:
    args = arguments(__doc__, records=64, rounds=3, delay=20)
    torch.set_num_threads(1)
    m = machine("obstore", "tensorstore", "moto")
    with work_folder(args.folder) as work, s3_server() as server:
        result = measure(work, server, Workload(args.records, levels=LEVELS), args.rounds, args.delay / 1e3)
    body = "\n\n".join(table(title, COLUMNS, rows) for title, rows in result["rows"].items())
    publish("objects", result, body, args.out, m=m)


def measure(work: Path, server: Server, workload: Workload, rounds: int, delay: float) -> dict:
    """The rows without delay and with it."""
    workload.write_flat(work / "flat.bin")
    source = workload.flat(work / "flat.bin")
    workload.write_cache(work / "cache", source)
    upload(work / "cache", "cache")
    variants = {
        LOOP: partial(zarr_batches, workload, 1),
        "zarr-python, ObjectStore, 16 threads": partial(zarr_batches, workload, 16),
        "fcache": partial(cache_batches, f"s3://{BUCKET}/cache", workload),
    }
    if find_spec("tensorstore"):
        variants["tensorstore, a future a record"] = partial(tensorstore_batches, server, workload)
    for name, make in variants.items():
        check(make(), source, workload, name)
    found = {}
    for seconds in (0.0, delay):
        times: dict[str, list[tuple[float, float, int]]] = {name: [] for name in variants}
        asked: dict[str, dict[str, float]] = {}
        for r in range(rounds):
            for name, make in variants.items():
                server.delay(seconds)
                started = time.perf_counter()
                _, cpu, size = timed(make(), r)
                times[name].append((time.perf_counter() - started, cpu, size))
                asked[name] = server.delay(seconds)
        found[f"{seconds * 1e3:.0f} ms a request"] = {
            name: row(spent, times[LOOP], asked[name], workload) for name, spent in times.items()
        }
    return {"what": f"{workload.records} records of {workload.fields.itemsize / 1e6:.2f} MB over S3.", "rows": found}


def row(spent: list, loop: list, asked: dict[str, float], workload: Workload) -> Row:
    """The row of a variant; `loop` are the times of zarr-python's loop in the same rounds."""
    ratios = [base[0] / own[0] * own[2] / base[2] for base, own in zip(loop, spent, strict=True)]
    records = spent[-1][2] / workload.fields.itemsize
    return {
        "requests": asked["requests"] / records,
        "bytes": asked["bytes"] / spent[-1][2],
        "mb_per_s": statistics.median(size / seconds for seconds, _, size in spent) / 1e6,
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
    }


def zarr_batches(workload: Workload, threads: int) -> Batches:
    """zarr-python over obstore: one read a record and level, in turn or from threads."""
    from zarr.storage import ObjectStore

    store = ObjectStore(open_bucket("cache/train"), read_only=True)
    arrays = {x.name: zarr.open_array(store, path=x.name, mode="r") for x in workload.levels}
    pool = ThreadPoolExecutor(threads)
    loop: Callable = map if threads == 1 else pool.map
    return batches_of(workload, partial(read_arrays, arrays, loop))


def read_arrays(arrays: dict[str, zarr.Array], loop: Callable, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
    """One batch: all records of all levels through `loop`."""
    wanted = [(name, n) for name in arrays for n in numbers]
    rows = list(loop(lambda item: arrays[item[0]][item[1]], wanted))
    n = len(numbers)
    return {name: torch.from_numpy(np.stack(rows[i * n : (i + 1) * n])) for i, name in enumerate(arrays)}


def tensorstore_batches(server: Server, workload: Workload) -> Batches:
    """tensorstore's own S3 driver: all reads of a batch are asked for at once."""
    import tensorstore

    arrays = {}
    for level in workload.levels:
        store = {
            "driver": "s3",
            "bucket": BUCKET,
            "endpoint": server.url,
            "aws_region": "us-east-1",
            "aws_credentials": {"type": "environment"},
            "path": f"cache/train/{level.name}/",
        }
        arrays[level.name] = tensorstore.open({"driver": "zarr3", "kvstore": store}, read=True).result()

    def read(numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        futures = {k: [a[n].read() for n in numbers] for k, a in arrays.items()}
        return {k: torch.from_numpy(np.stack([f.result() for f in fs])) for k, fs in futures.items()}

    return batches_of(workload, read)


if __name__ == "__main__":
    main()
