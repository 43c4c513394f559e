"""Every detector on synthetic scenes in COCO's layout, from two pretrained backbones and a random one: box and mask AP.

    FCACHE_TEST_DATA=DIR python benchmarks/coco_scenes.py [--work DIR] [--only NAME] [--table]

200 scenes to train on and 60 to test on, 128 x 128 pixels, seven classes. A row is one `fcache train-head` call that
trains all detectors in one pass with the recipe `coco-small` at inputs of 128 and ITERATIONS iterations, on two cached
views of every scene. One row more has the first row's heads on an fp32 cache, which equals training beside the running
backbone bit for bit (`tests/test_parity.py`). Random weights, which only say what pretraining is worth, get two heads.
A row that is done is not run again, so the script may be stopped and continued; --table only writes the results of what
is there, in results/coco_scenes.json and .md.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from camvid_heads import BACKBONES, PRETRAINED, RESULTS, SEEDS, fcache, once, spread

from fcache.extractor import write_coco_scenes

RECIPE = "coco-small"
SIDE, TRAIN, VAL = 128, 200, 60
VIEWS, ITERATIONS = 2, 200
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


def train(cache: Path, out: Path, heads: Sequence[str], seed: int) -> dict[str, Any]:
    """Heads trained in one pass with one seed: their scores and costs by label."""
    chosen = [argument for head in heads for argument in ("--head", head)]
    fcache(
        "train-head", "--cache", cache, *chosen, "--recipe", RECIPE, "--iters", ITERATIONS, "--seed", seed,
        "--out", out, "--resume", "--allow-random-backbone",
    )  # fmt: skip
    runs = [json.loads(p.read_text()) for p in out.glob(f"*-seed{seed}/run.json")]
    return {r["label"]: {**{m: r["evaluations"][-1]["metrics"][m] for m in METRICS}, "cost": r["cost"]} for r in runs}


def cached_row(name: str, seed: int, data: Path, work: Path) -> dict[str, Any]:
    """The detectors on two cached views, int8."""
    label = name.replace(" ", "-")
    heads = tuple(HEADS) if name in PRETRAINED else FEW

    def trained() -> dict[str, Any]:
        cache = extract(name, work / f"{label}.fcache", data, work)
        return {"backbone": name, "seed": seed, "heads": train(cache, work / "runs" / label, heads, seed)}

    return once(work / "rows" / f"cached-{label}-{seed}.json", trained)


def live_row(name: str, data: Path, work: Path) -> dict[str, Any]:
    """The same on features as the backbone gives them, views and seed as in the cached row."""

    def trained() -> dict[str, Any]:
        cache = extract(name, work / f"{name}-fp32.fcache", data, work, "--encoding", "fp32")
        return {"backbone": name, "seed": 0, "heads": train(cache, work / "runs" / f"{name}-fp32", tuple(HEADS), 0)}

    return once(work / "rows" / f"live-{name}-0.json", trained)


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Heads by backbones: AP over the seeds, and what live features change for seed 0 (boxes / masks)."""
    lines = [
        "| backbone | head | parameters | box AP | AP50 | mask AP | AP50 | seeds | live features |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in BACKBONES:
        mine = sorted((r for r in rows["cached"] if r["backbone"] == name), key=lambda r: r["seed"])
        live = next((r["heads"] for r in rows["live"] if r["backbone"] == name), {})
        for head, shown in HEADS.items():
            found = [r["heads"][head] for r in mine if head in r["heads"]]
            if not found:
                continue
            gain = ""
            if head in live and mine[0]["seed"] == 0:
                gain = " / ".join(f"{live[head][m] - found[0][m]:+.3f}" for m in ("box_ap", "mask_ap"))
            scores = [spread([f[m] for f in found]) for m in METRICS]
            cells = [name, shown, f"{found[0]['cost']['parameters']:,}", *scores, str(len(found)), gain]
            lines.append(f"| {' | '.join(cells)} |")
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
    kinds = ("cached", "live")
    rows = {k: [json.loads(p.read_text()) for p in sorted((work / "rows").glob(f"{k}-*.json"))] for k in kinds}
    about = {"machine": platform.machine(), "processors": os.cpu_count(), "date": time.strftime("%Y-%m")}
    about |= {"recipe": RECIPE, "side": SIDE, "train": TRAIN, "val": VAL, "views": VIEWS, "iterations": ITERATIONS}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "coco_scenes.json").write_text(json.dumps({**about, **rows}, indent=1) + "\n")
    (RESULTS / "coco_scenes.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
