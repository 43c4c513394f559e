"""How much memory a reader needs as the records grow 10 and 100 times.

    python benchmarks/memory.py [--records 640] [--channels 16384]

Every row is a process of its own that opens a cache, streams one shuffled epoch and checks every record. "Own" is
anonymous memory, what the process itself allocated; "all" adds the pages of mapped files, which the system takes back
when it needs them. Records are small (32 kB), so that what grows with their number shows.
"""

import os
import shutil
from pathlib import Path

import torch
from storage.bulk import Bulk
from storage.process import in_new_process
from storage.report import arguments, machine, publish, table, work_folder
from storage.rounds import Row

from fcache.cache_spec import StreamConfig, open_cache, open_source

COLUMNS = {
    "own memory, MB": "{own_mb:.1f}",
    "to the smallest": "{own_ratio:.3f}",
    "own beyond imports, MB": "{growth_mb:.1f}",
    "bytes a record more": "{bytes_a_record:.0f}",
    "all memory, MB": "{all_mb:.0f}",
    "to the smallest ": "{all_ratio:.2f}",
    "stored, MB": "{stored_mb:.0f}",
}


def main() -> None:
    args = arguments(__doc__, records=640, channels=16384)
    torch.set_num_threads(1)
    m = machine()
    with work_folder(args.folder) as work:
        result = measure(work, args.records, args.channels)
    publish("memory", result, table("Memory of a reader", COLUMNS, result["rows"]), args.out, m=m)


def measure(work: Path, records: int, channels: int) -> dict:
    """A row a size and way of reading."""
    found: dict[str, dict[int, Row]] = {"mmap": {}, "pread": {}}
    for number in (records, 10 * records, 100 * records):
        bulk = Bulk(number, channels)
        bulk.write_cache(work / "cache")
        os.sync()
        for mode, rows in found.items():
            _, usage = in_new_process(stream, work / "cache", mode, bulk)
            first = next(iter(rows.values()), None)
            own, whole = usage.anonymous / 1e6, usage.total / 1e6
            rows[number] = {
                "own_mb": own,
                "own_ratio": own / first["own_mb"] if first else 1.0,
                "growth_mb": usage.growth / 1e6,
                "all_mb": whole,
                "all_ratio": whole / first["all_mb"] if first else 1.0,
                "stored_mb": number * channels * 2 / 1e6,
            }
            if first:
                rows[number]["bytes_a_record"] = (own - first["own_mb"]) * 1e6 / (number - records)
        shutil.rmtree(work / "cache")
    named = {f"{mode}, {n:,} records": row for mode, rows in found.items() for n, row in rows.items()}
    return {"what": "One epoch of a cache in a process of its own.", "rows": named}


def stream(root: Path, mode: str, bulk: Bulk) -> None:
    """One epoch, every record checked."""
    torch.set_num_threads(1)
    seen = 0
    source = open_source(open_cache(root, mode=mode), "train", StreamConfig(bulk.workload.batch))
    for block in source.blocks(0):
        values = torch.from_numpy(block.levels["level-32"].parts[""])
        expected = [int(i.removeprefix("sample-")) % 2048 for i in block.ids]
        if values[:, 0].tolist() != expected or values[:, 1:].count_nonzero():
            raise SystemExit("a record is not what was written")
        seen += len(block.ids)
    if seen != bulk.records:
        raise SystemExit(f"{seen} of {bulk.records} records were read")


if __name__ == "__main__":
    main()
