"""How many stored views a head needs: mIoU on CamVid with K of them, against a fresh view in every epoch.

    FCACHE_TEST_DATA=DIR python benchmarks/view_count.py [--work DIR] [--only NAME] [--table]

One cache holds a view for every epoch of the recipe `camvid-small`. Trained on all of them a head never sees a view
twice: that is live training, since cached and live views are equal bit for bit (`tests/extractor/test_live.py`). The
other rows use its first K views (`train-head --views K`) with the same seeds, iterations and order of photos; those of
four views are rows of `camvid_heads.py`, which are run if they are not there. A row that is done is not run again, so
the script may be stopped and continued; --table only writes the results of what is there.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

from camvid_heads import PRETRAINED, RECIPE, RESULTS, SEEDS, VIEWS, cached_row, extract, once, spread, train

from fcache.heads import load_recipe

HEADS = ("linear", "upernet")
COUNTS = (1, 2, 4, 8)


def epochs(data: Path) -> int:
    """Epochs that the recipe begins on the training photos; the last batch of an epoch is left out if it is short."""
    config = load_recipe(RECIPE).train
    photos = len(list((data / "camvid/images/training").iterdir()))
    return -(-config.iterations // (photos // config.batch_size))


def row(name: str, count: int, seed: int, data: Path, work: Path) -> dict[str, Any]:
    """The heads trained with one seed on the first `count` views: their scores."""

    def trained() -> dict[str, Any]:
        cache = extract(name, work / f"{name}.fcache", data, "--views", epochs(data))
        heads = train(cache, work / "runs" / f"{name}-{count}-views", HEADS, seed, "--views", count)
        return {"backbone": name, "seed": seed, "heads": heads}

    file = work / "rows" / f"views-{count}-{name}-{seed}.json"
    return cached_row(name, seed, data, work) if count == VIEWS else once(file, trained)


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
                cell = spread([r[head] for r in mine.values()])
                if count != fresh and (pairs := [mine[s][head] - live[s][head] for s in mine if s in live]):
                    cell += f" ({statistics.mean(pairs):+.3f})"
                cells.append(cell)
            shown = f"{count}, fresh in every epoch" if count == fresh else str(count)
            lines.append(f"| {name} | {shown} | {' | '.join(cells)} | {len(mine)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("camvid-study"))
    parser.add_argument("--only", choices=PRETRAINED, action="append")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if "FCACHE_TEST_DATA" not in os.environ:
        print("view_count: skipped, FCACHE_TEST_DATA does not name a folder with camvid and weights")
        return
    data, work = Path(os.environ["FCACHE_TEST_DATA"]), options.work
    fresh = epochs(data)
    # Seed by seed, so that what is there can be compared at any time.
    for name in [] if options.table else options.only or PRETRAINED:
        for seed in SEEDS:
            for count in (*COUNTS, fresh):
                row(name, count, seed, data, work)
    rows = []
    for count in (*COUNTS, fresh):
        for file in sorted((work / "rows").glob("cached-*.json" if count == VIEWS else f"views-{count}-*.json")):
            found = json.loads(file.read_text())
            if found["backbone"] not in PRETRAINED:
                continue
            scores = {head: found["heads"][head]["miou"] for head in HEADS}
            rows.append({"backbone": found["backbone"], "views": count, "seed": found["seed"], **scores})
    about = {"machine": platform.machine(), "processors": os.cpu_count(), "date": time.strftime("%Y-%m")}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "view_count.json").write_text(json.dumps({**about, "epochs": fresh, "rows": rows}, indent=1) + "\n")
    (RESULTS / "view_count.md").write_text(table(rows, fresh))
    print(table(rows, fresh))


if __name__ == "__main__":
    main()
