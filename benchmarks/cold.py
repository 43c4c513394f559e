"""How fast cached pyramids are read from the disk: shuffled batches of 16, nothing of them in the page cache.

    python benchmarks/cold.py [--records 64] [--rounds 15]

The limit is the disk: the same files, read one after another with O_DIRECT, 4 MiB at a time by one thread, before and
after each round, so that a noisy disk slows both. Before each round the files leave the page cache, and `mincore` says
that they have left it, else the benchmark stops. Every variant is opened anew each round (not timed), and was compared
bit for bit before.
"""

import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from storage.ours import cache_batches
from storage.pages import evict, files_below, read_past_cache
from storage.peers import PACKAGES, PEERS, store
from storage.report import arguments, machine, publish, table, work_folder
from storage.rounds import Batches, Row, check, sandwich, timed
from storage.workload import Workload

COLUMNS = {
    "MB/s": "{mb_per_s:.0f}",
    "share of sequential reading (range)": "{ratio:.2f} ({low:.2f} to {high:.2f})",
    "CPU seconds a GB": "{cpu_s_per_gb:.2f}",
    "rounds": "{rounds}",
}


def main() -> None:
    args = arguments(__doc__, records=64, rounds=15)
    torch.set_num_threads(1)
    m = machine(*PACKAGES)
    with work_folder(args.folder) as work:
        result = measure(work, Workload(args.records), args.rounds)
    ordered = dict(sorted(result["rows"].items(), key=lambda item: -item[1].get("ratio", 0)))
    publish("cold", result, table("Cold", COLUMNS, ordered), args.out, m=m)


def measure(work: Path, workload: Workload, rounds: int) -> dict:
    """A row a variant."""
    flat = work / "flat.bin"
    workload.write_flat(flat)
    source = workload.flat(flat)
    workload.write_cache(work / "cache", source)
    rows: dict[str, Row] = {}
    cache = work / "cache" / "train"
    rows["O_DIRECT, one after another, 2 threads"] = one(rounds, cache, lambda r: sequential(files_below(cache), 2, r))
    ours = partial(cache_batches, work / "cache", workload)
    for name, open_batches in {
        "fcache, 1 thread": partial(ours, threads=1),
        "fcache, 2 threads": partial(ours, threads=2),
        "fcache, 4 threads": partial(ours, threads=4),
        "fcache, 2 threads, positional reads": partial(
            cache_batches, work / "cache", workload, threads=2, mode="pread"
        ),
    }.items():
        check(open_batches(), source, workload, name)
        rows[name] = one(rounds, cache, partial(epoch, open_batches, cache))
    for name, peer in PEERS.items():
        if peer.missing:
            rows[f"{name} (not installed)"] = {}
            continue
        folder = store(name, peer, work, source, workload)
        check(peer.open(folder, workload), source, workload, name)
        rows[name] = one(rounds, folder, partial(epoch, partial(peer.open, folder, workload), folder))
        if not peer.store:
            shutil.rmtree(folder)
    return {"what": f"{workload.records} records out of no page cache.", "rows": rows}


def one(rounds: int, folder: Path, variant: Callable[[int], tuple[float, float, int]]) -> Row:
    """The row of a variant that reads the files of `folder`."""
    os.sync()
    # Long, for what a disk gives changes from second to second.
    return sandwich(variant, partial(sequential, files_below(folder), 1), rounds, seconds=20.0)


def sequential(paths: list[Path], threads: int, r: int) -> tuple[float, float, int]:
    """Seconds, CPU seconds and bytes of reading files past the page cache."""
    start, cpu = time.perf_counter(), time.process_time()
    size = read_past_cache(paths, threads)
    return time.perf_counter() - start, time.process_time() - cpu, size


def epoch(open_batches: Callable[[], Batches], folder: Path, r: int) -> tuple[float, float, int]:
    """Seconds, CPU seconds and bytes of one epoch of files that are on the disk only."""
    evict(files_below(folder))
    return timed(open_batches(), r)


if __name__ == "__main__":
    main()
