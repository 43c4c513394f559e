"""How fast records are written, durably, and with how much memory.

    python benchmarks/writing.py [--records 64] [--rounds 7]

The limit is raw files: one a shard and level, written record by record, and fsync at its end. Everything else is timed
between rounds of the limit until its bytes are durable, too: where a writer does not do that, every file is fsynced at
the end. What fcache does beyond that is inside its time: SHA-256 of every file, renames, and a commit a shard. Creating
a cache, once for any number of records, is a column of its own. What was written is read back and compared bit for bit
before anything is timed. Memory is the growth of the process's own (anonymous) memory at its peak, in a process of its
own.
"""

import shutil
import statistics
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from storage.peers import batches_of
from storage.process import in_new_process
from storage.report import arguments, machine, publish, table, work_folder
from storage.rounds import Row, check, sandwich, speed
from storage.workload import Workload
from storage.writers import RAW, WRITERS, make_durable

COLUMNS = {
    "MB/s": "{mb_per_s:.0f}",
    "share of raw files (range)": "{ratio:.2f} ({low:.2f} to {high:.2f})",
    "to create, ms": "{create_ms:.0f}",
    "CPU seconds a GB": "{cpu_s_per_gb:.2f}",
    "memory, records": "{memory_records:.1f}",
    "rounds": "{rounds}",
}


def main() -> None:
    args = arguments(__doc__, records=64, rounds=7)
    torch.set_num_threads(1)
    m = machine("zarrs", "tensorstore", "h5py")
    with work_folder(args.folder) as work:
        result = measure(work, Workload(args.records), args.rounds)
    ordered = dict(sorted(result["rows"].items(), key=lambda item: -item[1].get("ratio", 0)))
    publish("writing", result, table("Writing", COLUMNS, ordered), args.out, m=m)


def measure(work: Path, workload: Workload, rounds: int) -> dict:
    """A row a writer: read back and compared, timed, and its memory."""
    flat = work / "flat.bin"
    workload.write_flat(flat)
    # In memory, so that nothing is read while something is written.
    source = np.fromfile(flat, workload.fields)
    limit = partial(written, RAW, work / RAW, source, workload)
    rows: dict[str, Row] = {}
    for name, writer in WRITERS.items():
        if any(find_spec(module) is None for module in writer.modules):
            rows[f"{name} (not installed)"] = {}
            continue
        folder = work / "checked"
        folder.mkdir()
        writer.write(folder, source, workload)
        check(batches_of(workload, writer.read(folder, workload)), source, workload, name)
        shutil.rmtree(folder)
        if name == RAW:
            limit(0)
            rows[name] = {**speed([limit(r) for r in range(rounds)]), "ratio": 1.0, "low": 1.0, "high": 1.0}
        else:
            rows[name] = sandwich(partial(written, name, work / "timed", source, workload), limit, rounds)
        if writer.create:
            rows[name]["create_ms"] = (
                statistics.median(created(name, work / "created", workload) for _ in range(5)) * 1e3
            )
        _, usage = in_new_process(write_mapped, name, work / "grown", flat, workload)
        rows[name]["memory_records"] = usage.growth / workload.fields.itemsize
    return {"what": f"{workload.records} records of {workload.fields.itemsize / 1e6:.1f} MB, durable.", "rows": rows}


def written(name: str, folder: Path, source: np.ndarray, workload: Workload, r: int) -> tuple[float, float, int]:
    """Seconds, CPU seconds and bytes of one round of a writer; what it wrote is removed, not timed."""
    folder.mkdir()
    if create := WRITERS[name].create:
        create(folder, workload)
    start, cpu = time.perf_counter(), time.process_time()
    WRITERS[name].write(folder, source, workload)
    if not WRITERS[name].durable:
        make_durable(folder)
    spent = time.perf_counter() - start, time.process_time() - cpu, source.nbytes
    shutil.rmtree(folder)
    return spent


def created(name: str, folder: Path, workload: Workload) -> float:
    """Seconds of creating what has no records yet."""
    folder.mkdir()
    start = time.perf_counter()
    WRITERS[name].create(folder, workload)
    spent = time.perf_counter() - start
    shutil.rmtree(folder)
    return spent


def write_mapped(name: str, folder: Path, flat: Path, workload: Workload) -> None:
    """One round whose records come from a mapped file: only what the writer needs is the process's own memory."""
    folder.mkdir()
    WRITERS[name].write(folder, workload.flat(flat), workload)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
