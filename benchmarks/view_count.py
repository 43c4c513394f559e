"""How many stored views a head needs: mIoU on CamVid with K of them, against a fresh view in every epoch.

    FCACHE_TEST_DATA=DIR python benchmarks/view_count.py [--work DIR] [--only NAME] [--table]

One cache holds a view for every epoch of the recipe `camvid-small`. Trained on all of them a head never sees a view
twice: that is live training, since cached and live views are equal bit for bit (`tests/extractor/test_live.py`). The
other rows use its first K views (`train-head --views K`) with the same seeds, iterations and order of photos. A row
that is done is not run again, so the script may be stopped and continued; --table only writes the results of what is
there.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

from camvid_heads import BACKBONES, RESULTS, fcache

from fcache.heads import load_recipe

RECIPE = "camvid-small"
HEADS = ("linear", "upernet")
SEEDS = (0, 1, 2)
COUNTS = (1, 2, 4, 8)
PRETRAINED = tuple(name for name, (_, weights) in BACKBONES.items() if not weights.startswith("random:"))


def epochs(data: Path) -> int:
    """Epochs that the recipe begins on the training photos; the last batch of an epoch is left out if it is short."""
    config = load_recipe(RECIPE).train
    photos = len(list((data / "camvid/images/training").iterdir()))
    return -(-config.iterations // (photos // config.batch_size))


def cache_of(name: str, data: Path, work: Path) -> Path:
    """The cache of a backbone with a view an epoch, extracted (again: then nothing happens)."""
    model, weights = BACKBONES[name]
    cache = work / f"{name}.fcache"
    fcache(
        "extract", "--model", model, "--weights", data / "weights" / weights, "--dataset", "ade20k",
        "--data-root", data / "camvid", "--recipe", RECIPE, "--views", epochs(data), "--cache", cache,
    )  # fmt: skip
    return cache


def row(name: str, count: int, seed: int, cache: Path, work: Path) -> dict[str, Any]:
    """Both heads trained with one seed on the first `count` views: their scores."""
    out = work / "runs" / name / f"{count}-views"
    heads = [argument for head in HEADS for argument in ("--head", head)]
    started = time.monotonic()
    fcache(
        "train-head", "--cache", cache, *heads, "--recipe", RECIPE, "--views", count, "--seed", seed, "--out", out,
        "--resume",
    )  # fmt: skip
    found: dict[str, Any] = {"backbone": name, "views": count, "seed": seed}
    for head in HEADS:
        run = json.loads((out / f"{head}-seed{seed}" / "run.json").read_text())
        found[head] = run["evaluations"][-1]["metrics"]["miou"]
    return {**found, "minutes": (time.monotonic() - started) / 60}


def table(rows: list[dict[str, Any]], fresh: int) -> str:
    """Mean and standard deviation of mIoU over the seeds, and the mean paired difference to fresh views."""
    lines = [f"| backbone | views | {' | '.join(HEADS)} | seeds |", "|---|---|" + "---|" * (len(HEADS) + 1)]
    for name in PRETRAINED:
        for count in (*COUNTS, fresh):
            mine = {r["seed"]: r for r in rows if (r["backbone"], r["views"]) == (name, count)}
            live = {r["seed"]: r for r in rows if (r["backbone"], r["views"]) == (name, fresh)}
            if not mine:
                continue
            cells = []
            for head in HEADS:
                values = [r[head] for r in mine.values()]
                cell = f"{statistics.mean(values):.3f}"
                if len(values) > 1:
                    cell += f" ± {statistics.stdev(values):.3f}"
                if count != fresh and (pairs := [mine[s][head] - live[s][head] for s in mine if s in live]):
                    cell += f" ({statistics.mean(pairs):+.3f})"
                cells.append(cell)
            shown = f"{count}, fresh in every epoch" if count == fresh else str(count)
            lines.append(f"| {name} | {shown} | {' | '.join(cells)} | {len(mine)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("view-study"))
    parser.add_argument("--only", choices=PRETRAINED, action="append")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if "FCACHE_TEST_DATA" not in os.environ:
        print("view_count: skipped, FCACHE_TEST_DATA does not name a folder with camvid and weights")
        return
    data, work = Path(os.environ["FCACHE_TEST_DATA"]), options.work
    fresh = epochs(data)
    for name in [] if options.table else options.only or PRETRAINED:
        cache = cache_of(name, data, work)
        # Seed by seed, so that what is there can be compared at any time.
        for seed in SEEDS:
            for count in (*COUNTS, fresh):
                file = work / "rows" / f"{name}-{count}-{seed}.json"
                if not file.exists():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(json.dumps(row(name, count, seed, cache, work)))
    rows = [json.loads(p.read_text()) for p in sorted((work / "rows").glob("*.json"))]
    about = {"machine": platform.machine(), "processors": os.cpu_count(), "date": time.strftime("%Y-%m")}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "view_count.json").write_text(json.dumps({**about, "epochs": fresh, "rows": rows}, indent=1) + "\n")
    (RESULTS / "view_count.md").write_text(table(rows, fresh))
    print(table(rows, fresh))


if __name__ == "__main__":
    main()
