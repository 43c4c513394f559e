"""How much of an epoch a training waits for data, when it computes for a given time a batch.

    python benchmarks/epochs.py [--records 192] [--epochs 3]

Every loader is first run alone: the mean time between its batches, after the first, is its read time. Then the main
thread computes for 0.5, 1 and 2 times that after each batch, and once for as long as fcache's read time, the same for
all. It computes with torch (matrix products, which release the interpreter's lock) or in plain Python (which holds it).
Shares are of the epoch after its first batch, medians over epochs; the time to the first batch is a column of its own.
Everything lies in the page cache. Loaders with worker processes have two of them, as fcache has two threads.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from storage.loaders import LOADERS, Epoch
from storage.pages import evict, files_below
from storage.peers import PACKAGES, PEERS, store
from storage.report import arguments, machine, publish, table, work_folder
from storage.rounds import Row
from storage.workload import Workload

OURS = "fcache, 2 threads"
SHARES = (0.5, 1.0, 2.0)
# A fast loader ends a small epoch in some ten milliseconds.
LEAST_SECONDS = 0.5
COLUMNS = {
    "read, ms a batch": "{read_ms:.1f}",
    "wait at 0.5": "{wait_0_5:.1%}",
    "wait at 1": "{wait_1:.1%}",
    "wait at 2": "{wait_2:.1%}",
    "wait at 1, Python": "{wait_python:.1%}",
    "wait at fcache's read time": "{wait_same:.1%}",
    "first batch, ms": "{first_ms:.0f}",
}
COLD = {"read, ms a batch": "{read_ms:.1f}", "wait at 1": "{wait_1:.1%}", "wait at 2": "{wait_2:.1%}"}


def main() -> None:
    args = arguments(__doc__, records=192, epochs=3)
    torch.set_num_threads(1)
    m = machine(*PACKAGES)
    with work_folder(args.folder) as work:
        result = measure(work, Workload(args.records), args.epochs)
    body = table("Warm", COLUMNS, result["rows"]) + "\n\n" + table("Cold, fcache", COLD, result["cold"])
    publish("epochs", result, body, args.out, m=m)


def measure(work: Path, workload: Workload, epochs: int) -> dict:
    """A row a loader, and fcache with nothing in the page cache."""
    flat = work / "flat.bin"
    workload.write_flat(flat)
    source = workload.flat(flat)
    workload.write_cache(work / "cache", source)
    rows: dict[str, Row] = {}
    for name, loader in LOADERS.items():
        peer = PEERS[loader.store] if loader.store else None
        if peer and peer.missing:
            rows[f"{name} (not installed)"] = {}
            continue
        folder = store(loader.store, peer, work, source, workload) if peer else work / "cache" / "train"
        same = rows[OURS]["read_ms"] / 1e3 if rows else 0.0
        rows[name] = one(loader.open(folder, workload), epochs, same)
    rows[OURS]["wait_same"] = rows[OURS]["wait_1"]
    return {
        "what": f"{workload.records // workload.batch} batches an epoch, {epochs} epochs.",
        "rows": rows,
        "cold": cold(work / "cache" / "train", workload, epochs),
    }


def cold(folder: Path, workload: Workload, epochs: int) -> dict[str, Row]:
    """fcache with nothing in the page cache when an epoch begins."""
    rows: dict[str, Row] = {}
    for name in (OURS, "fcache, 2 threads, positional reads"):

        def epoch(number: int, name: str = name) -> Iterator[dict[str, torch.Tensor]]:
            evict(files_below(folder))
            # Opened anew: pages that a reader has mapped cannot leave memory.
            return LOADERS[name].open(folder, workload)(number)

        read = several(epoch, epochs, 0.0, with_torch)[2]
        rows[name] = {"read_ms": read * 1e3}
        rows[name] |= {f"wait_{n}": several(epoch, epochs, n * read, with_torch)[0] for n in (1, 2)}
    return rows


def one(epoch: Epoch, epochs: int, same: float) -> Row:
    """The row of a loader; `same` are seconds that every loader's consumer computes for, once they are known."""
    # Not counted: workers start, and what the system dropped comes back into memory.
    run(epoch, 0, 0.0, with_torch)
    read = several(epoch, epochs, 0.0, with_torch)[2]
    row: Row = {"read_ms": read * 1e3}
    for name, seconds, compute in (
        *((f"wait_{share:g}".replace(".", "_"), share * read, with_torch) for share in SHARES),
        ("wait_python", read, in_python),
        *([("wait_same", same, with_torch)] if same else []),
    ):
        row[name], first, _ = several(epoch, epochs, seconds, compute)
        row.setdefault("first_ms", first * 1e3)
    return row


def several(epoch: Epoch, epochs: int, seconds: float, compute: Callable[[float], None]) -> tuple[float, float, float]:
    """The medians of `run` over `epochs` epochs, or over more while they take less than `LEAST_SECONDS`."""
    found, started = [], time.perf_counter()
    while len(found) < epochs or time.perf_counter() - started < LEAST_SECONDS:
        found.append(run(epoch, len(found), seconds, compute))
    share, first, mean = (statistics.median(values) for values in zip(*found, strict=True))
    return share, first, mean


def run(epoch: Epoch, number: int, seconds: float, compute: Callable[[float], None]) -> tuple[float, float, float]:
    """One epoch: the share of it after the first batch that was waited for, the first wait, the mean of the others."""
    batches, waits = iter(epoch(number)), []
    begun = started = time.perf_counter()
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            break
        waits.append(time.perf_counter() - asked)
        if len(waits) == 1:
            begun = time.perf_counter()
        sum(float(x[-1].flatten()[-1]) for x in batch.values())
        compute(seconds)
    waited = sum(waits[1:])
    return waited / (time.perf_counter() - begun), begun - started, waited / (len(waits) - 1)


def with_torch(seconds: float) -> None:
    """Matrix products of some hundred microseconds each, until `seconds` have passed."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        torch.mm(_LEFT, _LEFT, out=_RIGHT)


def in_python(seconds: float) -> None:
    """Plain Python until `seconds` have passed."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        sum(range(100))


_LEFT, _RIGHT = torch.ones(192, 192), torch.empty(192, 192)

if __name__ == "__main__":
    main()
