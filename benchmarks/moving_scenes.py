"""What the heads on clips can tell by the order of frames: moving scenes, from two pretrained image backbones.

    FCACHE_TEST_DATA=DIR python benchmarks/moving_scenes.py [--work DIR] [--only NAME] [--seed N] [--table]

A clip shows one figure, and its class is one of eight motions. No frame says which, and no set of frames without their
order tells a motion from its opposite (`fcache.extractor.scenes`), so that a linear head on the mean over frames has
next to nothing to learn. A row is one `fcache train-head` call that trains all heads in one pass with the recipe
`k400-small` on one cached view of each clip (features in float32, which most CPUs compute faster than bfloat16); for
seed 0 the heads are scored with `--tta 4x3` too, 4 clips x 3 crops of a video. Beside them stands Table 4 of "Could
Giant Pretrained Image Models Extract Universal Representations?", which is about another backbone, real videos and
larger heads: only the order of the heads can be compared. A row that is done is not run again, so the script may be
stopped and continued; --table only writes the results of what is there, in results/moving_scenes.json and .md.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from camvid_heads import BACKBONES, PRETRAINED, RESULTS, fcache, once, spread

from fcache.extractor import write_moving_scenes
from fcache.extractor.scenes import MOTIONS

RECIPE = "k400-small"
SEEDS = (0, 1, 2)
TRAIN, VAL, VIEWS = 3200, 400, 1
# Label in runs, shown name, top-1 in Table 4 of the paper (of four blocks; SwinV2-B-22K, frozen, Kinetics-400).
HEADS = {
    "linear": ("linear", 0.703),
    "temporal": ("2 blocks over time", 0.747),
    "global": ("2 global blocks, windows of 8 x 2 x 2", 0.775),
}


def scenes(work: Path) -> Path:
    """The clips, drawn if they are not there."""
    root = work / "scenes"
    if not root.exists():
        write_moving_scenes(root, train=TRAIN, val=VAL)
    return root


def trained_row(name: str, seed: int, data: Path, work: Path) -> dict[str, Any]:
    """All heads trained in one pass with one seed: scores, recall of each motion, costs."""

    def trained() -> dict[str, Any]:
        model, weights = BACKBONES[name]
        cache, out = work / f"{name}.fcache", work / "runs" / name
        fcache(
            "extract", "--model", model, "--weights", data / "weights" / weights, "--dataset", "kinetics400",
            "--data-root", scenes(work), "--recipe", RECIPE, "--views", VIEWS, "--cache", cache, "--precision", "fp32",
        )  # fmt: skip
        chosen = [argument for head in HEADS for argument in ("--head", head)]
        fcache("train-head", "--cache", cache, *chosen, "--recipe", RECIPE, "--seed", seed, "--out", out, "--resume")
        runs = [json.loads(p.read_text()) for p in out.glob(f"*-seed{seed}/run.json")]
        found = {
            r["label"]: {
                **{k: r["evaluations"][-1]["metrics"][k] for k in ("top1", "top5", "mean_per_class")},
                "recall": dict(zip(MOTIONS, r["evaluations"][-1]["per_class"]["recall"], strict=True)),
                "cost": r["cost"],
            }
            for r in runs
        }
        return {"backbone": name, "seed": seed, "heads": found}

    return once(work / "rows" / f"trained-{name}-{seed}.json", trained)


def views_row(name: str, work: Path) -> dict[str, Any]:
    """The heads of seed 0 scored live on 4 clips x 3 crops: of videos, and of their single views."""

    def scored() -> dict[str, Any]:
        runs = sorted((work / "runs" / name).glob("*-seed0"))
        scores = json.loads(fcache("evaluate", *runs, "--tta", "4x3", "--json"))
        return {"backbone": name, "seed": 0, "heads": {s["head"]: s["metrics"] for s in scores}}

    return once(work / "rows" / f"views-{name}-0.json", scored)


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Heads by backbones: top-1 over the seeds, of seed 0 also by twelve views, and the paper's."""
    lines = [
        f"Chance is {1 / len(MOTIONS):.3f}; {TRAIN} training and {VAL} test clips.",
        "",
        "| backbone | head | parameters | top-1 | seeds | 4 x 3 views: mean (single) | Table 4, Kinetics-400 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in PRETRAINED:
        mine = sorted((r for r in rows["trained"] if r["backbone"] == name), key=lambda r: r["seed"])
        views = next((r["heads"] for r in rows["views"] if r["backbone"] == name), {})
        for head, (shown, paper) in HEADS.items():
            if not (found := [r["heads"][head] for r in mine]):
                continue
            twelve = f"{views[head]['top1']:.3f} ({views[head]['clip/top1']:.3f})" if head in views else ""
            parameters, top1 = f"{found[0]['cost']['parameters']:,}", spread([f["top1"] for f in found])
            cells = [name, shown, parameters, top1, str(len(found)), twelve, f"{paper:.3f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("moving-study"))
    parser.add_argument("--only", choices=PRETRAINED, action="append")
    parser.add_argument("--seed", type=int, action="append", help="default: 0, 1 and 2")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if "FCACHE_TEST_DATA" not in os.environ:
        print("moving_scenes: skipped, FCACHE_TEST_DATA does not name a folder with weights")
        return
    data, work = Path(os.environ["FCACHE_TEST_DATA"]), options.work
    for name in [] if options.table else options.only or PRETRAINED:
        for seed in options.seed or SEEDS:
            trained_row(name, seed, data, work)
        if 0 in (options.seed or SEEDS):
            views_row(name, work)
    kinds = ("trained", "views")
    rows = {k: [json.loads(p.read_text()) for p in sorted((work / "rows").glob(f"{k}-*.json"))] for k in kinds}
    about = {"machine": platform.machine(), "processors": os.cpu_count(), "date": time.strftime("%Y-%m")}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "moving_scenes.json").write_text(json.dumps({**about, **rows}, indent=1) + "\n")
    (RESULTS / "moving_scenes.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
