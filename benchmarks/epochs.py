"""How much of its time a training waits for data, when it computes for a given time a batch.

    python benchmarks/epochs.py [--records 192] [--epochs 3]

Epochs follow each other, as in a training; the first one is not counted. Every loader is first run alone: the mean
time between its batches is its read time. Then the main thread works after each batch, for
- a loader's own read time, or twice that, asleep: the work is a GPU's, and all cores are free to read;
- the processor time in which one core copies fcache's batch, the same for all loaders, asleep; computing with torch
  (matrix products, which release the interpreter's lock); or in plain Python (which holds it). What computes has a
  core of its own then, and the others have to read as much in that time.
Warm means that everything lies in the page cache. Loaders with worker processes have two of them, as fcache has two
threads.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from storage.loaders import LOADERS, Batch
from storage.pages import evict, files_below
from storage.peers import PACKAGES, PEERS, store
from storage.report import arguments, machine, publish, table, work_folder
from storage.rounds import Row
from storage.workload import Workload

OURS = "fcache, 2 threads"
COLUMNS = {
    "read, ms a batch": "{read_ms:.1f}",
    "wait at its read time": "{wait_1:.1%}",
    "at twice that": "{wait_2:.1%}",
    "at one core's time, asleep": "{wait_asleep:.1%}",
    "torch": "{wait_torch:.1%}",
    "Python": "{wait_python:.1%}",
}
COLD = {"read, ms a batch": "{read_ms:.1f}", "wait at its read time": "{wait_1:.1%}", "at twice that": "{wait_2:.1%}"}
# Medians of this many runs of each kind, which begin with batches that are not counted.
RUNS = 3
SETTLING = 6
LEAST_SECONDS = 1.0


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
    count = workload.records // workload.batch
    rows: dict[str, Row] = {}
    core = 0.0
    for name, loader in LOADERS.items():
        peer = PEERS[loader.store] if loader.store else None
        if peer and peer.missing:
            rows[f"{name} (not installed)"] = {}
            continue
        folder = store(loader.store, peer, work, source, workload) if peer else work / "cache" / "train"
        # What was just written would go to the disk meanwhile.
        os.sync()
        stream = loader.open(folder, workload)(None)
        for _ in range(count):
            next(stream)
        core = core or statistics.median(run(stream, count * epochs, 0.0, time.sleep)[2] for _ in range(RUNS))
        rows[name] = one(stream, count * epochs, core)
    return {
        "what": f"{count} batches an epoch, {epochs} epochs, medians of {RUNS} runs. One core copies a batch in "
        f"{core * 1e3:.1f} ms of processor time.",
        "core_ms": core * 1e3,
        "rows": rows,
        "cold": cold(work / "cache" / "train", workload),
    }


def cold(folder: Path, workload: Workload) -> dict[str, Row]:
    """fcache with nothing in the page cache when an epoch begins."""
    rows: dict[str, Row] = {}
    for name in (OURS, "fcache, 2 threads, positional reads"):

        def epoch(seconds: float, name: str = name) -> tuple[float, float, float]:
            evict(files_below(folder))
            # Opened anew: pages that a reader has mapped cannot leave memory.
            stream = LOADERS[name].open(folder, workload)(1)
            return run(stream, workload.records // workload.batch - SETTLING, seconds, time.sleep, least=0.0)

        read = statistics.median(epoch(0.0)[1] for _ in range(RUNS))
        waits = {f"wait_{n}": statistics.median(epoch(n * read)[0] for _ in range(RUNS)) for n in (1, 2)}
        rows[name] = {"read_ms": read * 1e3, **waits}
    return rows


def one(stream: Iterator[Batch], count: int, core: float, *, least: float = LEAST_SECONDS) -> Row:
    """The row of a loader; `core` are the seconds that every loader's consumer takes."""
    read = statistics.median(run(stream, count, 0.0, time.sleep, least=least)[1] for _ in range(RUNS))
    row: Row = {"read_ms": read * 1e3}
    for name, seconds, work in (
        ("wait_1", read, time.sleep),
        ("wait_2", 2 * read, time.sleep),
        ("wait_asleep", core, time.sleep),
        ("wait_torch", core, with_torch),
        ("wait_python", core, in_python),
    ):
        row[name] = statistics.median(run(stream, count, seconds, work, least=least)[0] for _ in range(RUNS))
    return row


def run(
    stream: Iterator[Batch], count: int, seconds: float, work: Callable[[float], None], *, least: float = LEAST_SECONDS
) -> tuple[float, float, float]:
    """`count` batches, or more in `least` seconds: the share of the time that was waited, and seconds and processor
    seconds a batch.
    """

    def step() -> float:
        asked = time.perf_counter()
        batch = next(stream)
        waited = time.perf_counter() - asked
        sum(float(x[-1].flatten()[-1]) for x in batch.values())
        if seconds:
            work(seconds)
        return waited

    # What was read ahead for the work before, or was not.
    for _ in range(SETTLING):
        step()
    waits, started, processor = [], time.perf_counter(), time.process_time()
    while len(waits) < count or time.perf_counter() - started < least:
        waits.append(step())
    taken = time.perf_counter() - started
    return sum(waits) / taken, taken / len(waits), (time.process_time() - processor) / len(waits)


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
