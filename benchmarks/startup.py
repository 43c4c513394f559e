"""How long a cache of very many records takes to open and to give its first shuffled batch, and with how much memory.

    python benchmarks/startup.py [--records 1000000] [--rounds 5]

Every round is a new process; importing fcache and torch is not counted. The files are in memory. Records are small:
what start-up costs depends on the number of records and shards (64 records each), not on their bytes.
"""

import os
import statistics
import time
from itertools import pairwise
from pathlib import Path

import torch
from storage.bulk import Bulk
from storage.process import in_new_process
from storage.report import arguments, machine, publish, table, work_folder

from fcache.cache_spec import StreamConfig, open_cache, open_source

COLUMNS = {
    "open, s": "{open:.2f}",
    "stream, s": "{source:.2f}",
    "first batch, s": "{batch:.2f}",
    "together, s (range)": "{total:.2f} ({low:.2f} to {high:.2f})",
    "CPU seconds": "{cpu:.2f}",
    "own memory beyond imports, MB": "{growth_mb:.0f}",
    "writing it, s": "{written_s:.0f}",
}


def main() -> None:
    args = arguments(__doc__, records=1_000_000, rounds=5)
    torch.set_num_threads(1)
    m = machine()
    with work_folder(args.folder) as work:
        result = measure(work, args.records, args.rounds)
    publish("startup", result, table("Start-up", COLUMNS, result["rows"]), args.out, m=m)


def measure(work: Path, records: int, rounds: int) -> dict:
    """A row for a hundredth of the records, and one for all."""
    rows = {}
    for number in (max(64, records // 100), records):
        bulk, folder = Bulk(number, 32), work / f"cache-{number}"
        started = time.perf_counter()
        # One process writes a thousand such shards in ten seconds.
        bulk.write_cache(folder, processes=1 if number < 64_000 else os.cpu_count() or 1)
        os.sync()
        spent = time.perf_counter() - started
        # The first is not counted: the system may have dropped what was written first.
        found = [in_new_process(start, folder, bulk.workload.batch) for _ in range(rounds + 1)][1:]
        parts = {k: statistics.median(seconds[k] for seconds, _ in found) for k in found[0][0]}
        totals = [seconds["total"] for seconds, _ in found]
        rows[f"{number:,} records"] = {
            **parts,
            "low": min(totals),
            "high": max(totals),
            "growth_mb": statistics.median(usage.growth for _, usage in found) / 1e6,
            "written_s": spent,
        }
    return {"what": f"A process that opens a cache and takes one batch; medians of {rounds}.", "rows": rows}


def start(root: Path, batch: int) -> dict[str, float]:
    """Seconds of opening, of making the stream and of its first batch; CPU seconds of all of it."""
    times, cpu = [time.perf_counter()], time.process_time()
    reader = open_cache(root)
    times.append(time.perf_counter())
    source = open_source(reader, "train", StreamConfig(batch))
    times.append(time.perf_counter())
    block = next(iter(source.blocks(0)))
    times.append(time.perf_counter())
    cpu = time.process_time() - cpu
    expected = [int(i.removeprefix("sample-")) % 2048 for i in block.ids]
    if block.levels["level-32"].parts[""][:, 0].tolist() != expected:
        raise SystemExit("a record is not what was written")
    opened, made, first = (b - a for a, b in pairwise(times))
    return {"open": opened, "source": made, "batch": first, "total": times[-1] - times[0], "cpu": cpu}


if __name__ == "__main__":
    main()
