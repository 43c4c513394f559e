"""SwinV2-G end to end on one machine: `fcache extract --model swinv2-g`, and a head trained from what it wrote.

    python benchmarks/swin_giant.py [--photos 2] [--large 1] [--side 256] [--folder DIR]

No weights of SwinV2-G are public, so they are random:0, all 2,998 M of them. Two extractions and a training, each a
command of its own in a process of its own, whose seconds and peak resident memory the system counts:

- --photos of each split cut to --side pixels, training and evaluation split, one view;
- `train-head` on that cache: a linear head, ten iterations;
- the command as it stands in the README, at the 512 x 512 of the paper's recipe: --large photos of each split; in
  bfloat16 as the others, which a GPU takes by default.

Photos are the ADE20K challenge's in $FCACHE_TEST_DATA/ADEChallengeData2016, or made-up scenes where that is not set.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from storage.report import arguments, machine, publish, table, work_folder

from fcache.cache_spec import open_cache
from fcache.extractor.scenes import write_scenes

# On a CPU features are computed in float32 unless asked otherwise, and the weights alone take 12 GB then.
MODEL = ("--model", "swinv2-g", "--weights", "random:0", "--precision", "bf16", "--dataset", "ade20k")
COLUMNS = {
    "exit": "{status}",
    "seconds": "{seconds:.0f}",
    "CPU seconds": "{cpu:.0f}",
    "peak resident GiB": "{gib:.2f}",
    "records": "{records}",
    "inputs": "{inputs}",
}


# Runs a command and prints its status, CPU seconds and peak memory: started from here it would be said to have had the
# memory of this process, which its own begins with.
COUNTED = """
import json, resource, subprocess, sys
status = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([status, usage.ru_utime + usage.ru_stime, usage.ru_maxrss]))
"""


def run(command: Sequence[str]) -> dict[str, Any]:
    """One `fcache` command: its exit status, seconds, CPU seconds and peak resident memory."""
    line = [sys.executable, "-c", COUNTED, sys.executable, "-m", "fcache.cli", *command]
    started = time.perf_counter()
    said = subprocess.run(line, stdout=subprocess.PIPE, check=True).stdout
    seconds = time.perf_counter() - started
    status, cpu, peak = json.loads(said)
    # Kilobytes on Linux.
    found = {"status": status, "seconds": seconds, "cpu": cpu, "gib": peak / 2**20}
    print(f"{shlex.join(command[:1])}: {found}", file=sys.stderr, flush=True)
    return found


def extraction(data: Path, cache: Path, *options: str) -> dict[str, Any]:
    found = run(["extract", *MODEL, "--data-root", str(data), "--cache", str(cache), "--workers", "0", *options])
    reader = open_cache(str(cache))
    groups = [group for split in reader.splits for group in reader.manifest.split(split)]
    sizes = sorted({f"{g.canvas[0]} x {g.canvas[1]}" for g in groups})
    return found | {"records": sum(len(g.ids) * g.views for g in groups), "inputs": ", ".join(sizes)}


def photos(work: Path) -> tuple[Path, str]:
    """The photos, and what they are."""
    folder = os.environ.get("FCACHE_TEST_DATA")
    if folder:
        return Path(folder) / "ADEChallengeData2016", "photos of the ADE20K challenge"
    write_scenes(work / "scenes", train=4, val=4, size=(512, 683))
    return work / "scenes", "made-up scenes of 512 x 683"


def main() -> None:
    options = arguments(__doc__ or "", photos=2, large=1, side=256)
    m = machine("timm")
    rows: dict[str, dict[str, Any]] = {}
    with work_folder(options.folder) as work:
        data, what = photos(work)
        if options.photos:
            side, small = str(options.side), work / "small.fcache"
            limit = ("--limit", str(options.photos), "--views", "1")
            rows[f"extract, {side} x {side}"] = extraction(data, small, *limit, "--input-size", side, side)
            head = ["--cache", str(small), "--head", "linear", "--recipe", "ade20k-small", "--iters", "10"]
            rows["train-head linear, 10 iterations"] = run(
                ["train-head", *head, "--set", "batch_size=1", "--out", str(work / "runs"), "--allow-random-backbone"]
            )
        if options.large:
            limit = ("--limit", str(options.large), "--views", "1")
            rows["extract, as it stands"] = extraction(data, work / "full.fcache", *limit)
    result = {"what": f"SwinV2-G (random:0) in bf16, {what}, one view, int8.", "rows": rows}
    publish("swin_giant", result, table("Commands", COLUMNS, rows), options.out, m=m)
    if any(row["status"] for row in rows.values()):
        raise SystemExit("a command failed")


if __name__ == "__main__":
    main()
