"""How fast cached pyramids become torch tensors: shuffled batches of 16 out of the page cache.

    python benchmarks/warm.py [--records 128] [--rounds 9]

Five tables, each against the limit for its own bytes and work: fp16 and int8 as they are stored, against `np.memmap`
copied record by record from one flat file into preallocated buffers; int8 with zstd against a plain loop that decodes
the same frames into preallocated buffers; int8 decoded by the reader's threads, against numpy in a plain loop.
A limit has the calling thread alone. fcache copies in 1 or 2 threads, and in the calling thread while that would only
wait, so that it may pass the limit; the limit with two threads is a row of its own. Every variant is compared bit for
bit, then timed between rounds of the limit. CPU seconds count all threads.

A peer that is not installed is left out. `pip install 'fcache[bench]'` installs all but MosaicML Streaming, which asks
for an older numpy than it needs: `pip install --no-deps mosaicml-streaming brotli python-snappy cramjam zstd xxhash
catalogue`.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from storage.limits import copy_limit, decode_limit, zstd_limit
from storage.ours import cache_batches
from storage.peers import PACKAGES, PEERS, store
from storage.report import arguments, machine, publish, table, work_folder
from storage.rounds import Batches, Row, check, sandwich, speed, timed
from storage.workload import Workload

ZARR = "zarr-python, plain, a record at a time"
COLUMNS = {
    "MB/s": "{mb_per_s:.0f}",
    "share of the limit (range)": "{ratio:.2f} ({low:.2f} to {high:.2f})",
    "times zarr-python's loop": "{times_zarr:.1f}",
    "CPU seconds a GB": "{cpu_s_per_gb:.3f}",
    "rounds": "{rounds}",
}


def main() -> None:
    args = arguments(__doc__, records=128, rounds=9)
    torch.set_num_threads(1)
    m = machine(*PACKAGES)
    with work_folder(args.folder) as work:
        result = measure(work, Workload(args.records), args.rounds)
    publish("warm", result, tables(result), args.out, m=m)


def measure(work: Path, workload: Workload, rounds: int) -> dict:
    """The rows of the tables."""
    int8 = replace(workload, encoding="int8")
    rows = {}
    for title, kind, decode in (
        ("fp16", workload, None),
        ("int8", int8, None),
        ("int8 with zstd", replace(int8, compression="zstd"), None),
        ("int8, decoded to fp16", int8, "fp16"),
        ("int8, decoded to fp32", int8, "fp32"),
    ):
        rows[title] = one_table(stores(work, kind), kind, decode, rounds)
        if kind == workload:
            # The largest; the others share theirs.
            shutil.rmtree(stores(work, kind))
    return {
        "what": f"Shuffled batches of {workload.batch} of {workload.records} records, warm, as torch tensors.",
        "rows": rows,
    }


def stores(work: Path, workload: Workload) -> Path:
    """A folder with the cache and the flat file of a workload, made if it is not there yet."""
    folder = work / f"{workload.encoding}-{workload.compression}"
    if not folder.exists():
        folder.mkdir()
        same = list(work.glob(f"{workload.encoding}-*/flat.bin"))
        if same:
            os.link(same[0], folder / "flat.bin")
        else:
            workload.write_flat(folder / "flat.bin")
        workload.write_cache(folder / "cache", workload.flat(folder / "flat.bin"))
        # What is not yet written would be written while something is timed.
        os.sync()
    return folder


def one_table(work: Path, workload: Workload, decode: str | None, rounds: int) -> dict[str, Row]:
    """The rows of one table: the limit, the same in two threads, fcache, and the peers for fp16.

    `work` is the folder of `stores`; with `decode` the reader decodes to it.
    """
    source = workload.flat(work / "flat.bin")
    truth = workload.decode(source, decode) if decode else source
    name, make = "np.memmap, copied", copy_limit
    if decode:
        name, make = "numpy, decoding in a loop", partial(decode_limit, to=decode)
    elif workload.compression == "zstd":
        name, make = "zstd, decoding in a loop", zstd_limit
    limit, both = make(work, workload, 1), make(work, workload, 2)
    check(limit, truth, workload, name)
    base = partial(timed, limit)
    ours = partial(cache_batches, work / "cache", workload, decode=decode)
    variants: dict[str, Callable[[], Batches]] = {
        f"{name}, 2 threads": lambda: both,
        "fcache, 1 thread": partial(ours, threads=1),
        "fcache, 2 threads": partial(ours, threads=2),
        "fcache, 2 threads, positional reads": partial(ours, threads=2, mode="pread"),
    }
    rows: dict[str, Row] = {}
    for variant, open_variant in variants.items():
        # One stream is open at a time, as in a training.
        batches = open_variant()
        check(batches, truth, workload, variant)
        rows[variant] = sandwich(partial(timed, batches), base, rounds)
    if workload.encoding == "fp16":
        rows |= peer_rows(work, workload, source, base, rounds // 2 + 1)
    rows[name] = {**speed([base(r) for r in range(rounds)]), "ratio": 1.0, "low": 1.0, "high": 1.0}
    if ZARR in rows:
        for row in rows.values():
            if "ratio" in row:
                row["times_zarr"] = row["ratio"] / rows[ZARR]["ratio"]
    return rows


def peer_rows(work: Path, workload: Workload, source: np.ndarray, base, rounds: int) -> dict[str, Row]:
    """The peers, one after another; a store goes when its last reader was timed."""
    rows: dict[str, Row] = {}
    for name, peer in PEERS.items():
        if peer.missing:
            rows[f"{name} (not installed)"] = {}
            continue
        folder = store(name, peer, work, source, workload)
        batches = peer.open(folder, workload)
        check(batches, source, workload, name)
        rows[name] = sandwich(partial(timed, batches), base, rounds)
        if not peer.store:
            shutil.rmtree(folder)
    shutil.rmtree(work / "plain")
    return rows


def tables(result: dict) -> str:
    """The tables as Markdown, fastest first."""
    found = []
    for title, rows in result["rows"].items():
        ordered = dict(sorted(rows.items(), key=lambda item: -item[1].get("ratio", 0)))
        found.append(table(title, COLUMNS, ordered))
    return "\n\n".join(found)


if __name__ == "__main__":
    main()
