"""Every detector on synthetic scenes in COCO's layout, from two pretrained backbones and a random one: box and mask AP.

    FCACHE_TEST_DATA=DIR python benchmarks/coco_scenes.py [--work DIR] [--only NAME] [--table]

200 scenes to train on and 60 to test on, 128 x 128 pixels, seven classes. A row is one `fcache train-head` call that
trains all detectors in one pass with the recipe `coco-small` at inputs of 128 and ITERATIONS iterations, on two cached
views of every scene. One row more has the first row's heads on an fp32 cache, which equals training beside the running
backbone bit for bit (`tests/test_parity.py`). Random weights, which only say what pretraining is worth, get two heads.
A run that is done is not made again, so the script may be stopped and continued; --table only writes the results of
what is there, in results/coco_scenes.json and .md.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from camvid_heads import BACKBONES, PRETRAINED, RESULTS, SEEDS, fcache, spread

from fcache.extractor import write_coco_scenes

RECIPE = "coco-small"
SIDE, TRAIN, VAL = 128, 200, 60
VIEWS, ITERATIONS = 2, 250
# Label in runs, and in tables.
HEADS = {
    "maskrcnn": "Mask R-CNN, FPN",
    "maskrcnn:neck=fpn-residual,layers=1": "Mask R-CNN, FPN with residual blocks",
    "maskrcnn:neck=bifpn,layers=2": "Mask R-CNN, 2x BiFPN",
    "cascade": "Cascade Mask R-CNN",
    "htc-without-semantic": "HTC without its semantic branch",
}
FEW = ("maskrcnn", "maskrcnn:neck=bifpn,layers=2")
EXACT = PRETRAINED[0]
METRICS = ("box_ap", "box_ap50", "mask_ap", "mask_ap50")


def scenes(work: Path) -> Path:
    """The scenes, drawn if they are not there."""
    root = work / "scenes"
    if not root.exists():
        write_coco_scenes(root, train=TRAIN, val=VAL, size=(SIDE, SIDE))
    return root


def extract(name: str, cache: Path, data: Path, work: Path, *more: object) -> Path:
    """The cache of a backbone, extracted (again: then nothing happens)."""
    model, weights = BACKBONES[name]
    path = weights if weights.startswith("random:") else data / "weights" / weights
    fcache(
        "extract", "--model", model, "--weights", path, "--dataset", "coco", "--data-root", scenes(work),
        "--recipe", RECIPE, "--input-size", SIDE, SIDE, "--views", VIEWS, "--precision", "fp32", "--cache", cache,
        *more,
    )  # fmt: skip
    return cache


def train(cache: Path, out: Path, heads: Sequence[str], seed: int) -> None:
    """Heads trained in one pass with one seed; those that are done are not trained again."""
    chosen = [argument for head in heads for argument in ("--head", head)]
    fcache(
        "train-head", "--cache", cache, *chosen, "--recipe", RECIPE, "--iters", ITERATIONS, "--seed", seed,
        "--out", out, "--resume", "--allow-random-backbone",
    )  # fmt: skip


def cached_row(name: str, seed: int, data: Path, work: Path) -> None:
    """The detectors on two cached views, int8."""
    heads = tuple(HEADS) if name in PRETRAINED else FEW
    train(extract(name, work / f"{folder(name)}.fcache", data, work), work / "runs" / folder(name), heads, seed)


def live_row(name: str, data: Path, work: Path) -> None:
    """The same on features as the backbone gives them, views and seed as in the first cached row."""
    cache = extract(name, work / f"{folder(name)}-fp32.fcache", data, work, "--encoding", "fp32")
    train(cache, work / "runs" / f"{folder(name)}-fp32", tuple(HEADS), 0)


def folder(name: str) -> str:
    """The name of a backbone in paths."""
    return name.replace(" ", "-")


def scores(runs: Path) -> list[dict[str, Any]]:
    """What the finished runs of a folder scored and cost, by seed."""
    found = [json.loads(p.read_text()) for p in runs.glob("*/run.json")]
    rows = [
        {"head": r["label"], "seed": r["train"]["seed"], "cost": r["cost"], "minutes": r["cost"]["seconds"] / 60}
        | {m: r["evaluations"][-1]["metrics"][m] for m in METRICS}
        for r in found
        if r["status"] == "finished" and r["iterations"] == ITERATIONS
    ]
    return sorted(rows, key=lambda row: (row["head"], row["seed"]))


def table(rows: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """Heads by backbones: AP over the seeds, and what live features change for seed 0 (boxes / masks)."""
    lines = [
        "| backbone | head | parameters | box AP | AP50 | mask AP | AP50 | seeds | live features |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in BACKBONES:
        for head, shown in HEADS.items():
            found = [row for row in rows["cached"][name] if row["head"] == head]
            live = [row for row in rows["live"][name] if row["head"] == head]
            if not found:
                continue
            gain = ""
            if live and found[0]["seed"] == live[0]["seed"]:
                gain = " / ".join(f"{live[0][m] - found[0][m]:+.3f}" for m in ("box_ap", "mask_ap"))
            cells = [
                name,
                shown,
                f"{found[0]['cost']['parameters']:,}",
                *(spread([f[m] for f in found]) for m in METRICS),
            ]
            lines.append(f"| {' | '.join([*cells, str(len(found)), gain])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("coco-study"))
    parser.add_argument("--only", choices=BACKBONES, action="append")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if "FCACHE_TEST_DATA" not in os.environ:
        print("coco_scenes: skipped, FCACHE_TEST_DATA does not name a folder with weights")
        return
    data, work = Path(os.environ["FCACHE_TEST_DATA"]), options.work
    # Seed by seed, so that what is there can be compared at any time.
    names = options.only or BACKBONES
    for seed in () if options.table else SEEDS:
        for name in names:
            cached_row(name, seed, data, work)
        if seed == 0 and EXACT in names:
            live_row(EXACT, data, work)
    places = {"cached": "", "live": "-fp32"}
    rows = {k: {n: scores(work / "runs" / f"{folder(n)}{end}") for n in BACKBONES} for k, end in places.items()}
    about = {"machine": platform.machine(), "processors": os.cpu_count(), "date": time.strftime("%Y-%m")}
    about |= {"recipe": RECIPE, "side": SIDE, "train": TRAIN, "val": VAL, "views": VIEWS, "iterations": ITERATIONS}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "coco_scenes.json").write_text(json.dumps({**about, **rows}, indent=1) + "\n")
    (RESULTS / "coco_scenes.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
