"""Linear head and UPerNet on CamVid from three backbones: two pretrained ones and one with random weights.

    FCACHE_TEST_DATA=DIR python benchmarks/camvid_heads.py [--work DIR] [--only NAME]

Every row is one `fcache train-head` call that trains both heads in one pass with the recipe `camvid-small`; a row that
is done is not run again, so the script may be stopped and continued. Writes results/camvid_heads.json and .md.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
HEADS = ("linear", "upernet")
BACKBONES = {
    "mobilenetv2_100": ("mobilenetv2_100", "mobilenetv2_100.tv_int8_dequant.safetensors"),
    "vit_tiny_patch16_224": ("vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"),
    "mobilenetv2_100 random": ("mobilenetv2_100", "random:0"),
}


def fcache(*arguments: object) -> None:
    """Run the command line, with one thread: a second one on a busy machine only waits."""
    command = [sys.executable, "-m", "fcache.cli", *map(str, arguments)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)


def cache_of(name: str, data: Path, work: Path) -> Path:
    """The cache of a backbone, extracted (again: then nothing happens)."""
    model, weights = BACKBONES[name]
    cache = work / f"{name.replace(' ', '-')}.fcache"
    path = weights if weights.startswith("random:") else data / "weights" / weights
    fcache(
        "extract", "--model", model, "--weights", path, "--dataset", "ade20k", "--data-root", data / "camvid",
        "--recipe", "camvid-small", "--cache", cache,
    )  # fmt: skip
    return cache


def row(name: str, seed: int, cache: Path, work: Path) -> dict[str, Any]:
    """Both heads trained with one seed: their scores and costs."""
    out = work / "runs" / name.replace(" ", "-")
    heads = [argument for head in HEADS for argument in ("--head", head)]
    started = time.monotonic()
    fcache(
        "train-head", "--cache", cache, *heads, "--recipe", "camvid-small", "--seed", seed, "--out", out,
        "--resume", "--allow-random-backbone",
    )  # fmt: skip
    found: dict[str, Any] = {"backbone": name, "seed": seed, "minutes": (time.monotonic() - started) / 60}
    for head in HEADS:
        run = json.loads((out / f"{head}-seed{seed}" / "run.json").read_text())
        found[head] = {"miou": run["evaluations"][-1]["metrics"]["miou"], "cost": run["cost"]}
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation of mIoU over the seeds."""
    lines = [f"| backbone | {' | '.join(HEADS)} | seeds |", "|---|" + "---|" * (len(HEADS) + 1)]
    for name in BACKBONES:
        mine = [r for r in rows if r["backbone"] == name]
        if mine:
            cells = []
            for head in HEADS:
                values = [r[head]["miou"] for r in mine]
                spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{spread}")
            lines.append(f"| {name} | {' | '.join(cells)} | {len(mine)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("camvid-study"))
    parser.add_argument("--only", choices=BACKBONES, action="append")
    options = parser.parse_args()
    if "FCACHE_TEST_DATA" not in os.environ:
        print("camvid_heads: skipped, FCACHE_TEST_DATA does not name a folder with camvid and weights")
        return
    data, work = Path(os.environ["FCACHE_TEST_DATA"]), options.work
    for name in options.only or BACKBONES:
        cache = cache_of(name, data, work)
        for seed in SEEDS:
            file = work / "rows" / f"{name.replace(' ', '-')}-{seed}.json"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(row(name, seed, cache, work)))
    rows = [json.loads(p.read_text()) for p in sorted((work / "rows").glob("*.json"))]
    machine = {"machine": platform.machine(), "processors": os.cpu_count(), "date": time.strftime("%Y-%m-%d")}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "camvid_heads.json").write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n")
    (RESULTS / "camvid_heads.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
