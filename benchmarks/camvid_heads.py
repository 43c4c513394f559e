"""Every semantic head on CamVid, from two pretrained backbones: scores over seeds, cached against live, ms + flip.

    FCACHE_TEST_DATA=DIR python benchmarks/camvid_heads.py [--work DIR] [--only NAME] [--table]

A row is one `fcache train-head` call that trains all heads in one pass with the recipe `camvid-small`, on four cached
views. For seed 0 there are two rows more: three of the heads on an fp32 cache, which equals training beside the running
backbone bit for bit (`tests/test_parity.py`), and the scores of that row's heads by `fcache evaluate`, live and with
`--tta ms-flip`. A row that is done is not run again, so the script may be stopped and continued; --table only writes
the results of what is there, in results/camvid_heads.json and .md.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
RECIPE = "camvid-small"
# Of the backbone. Rows that were kept from before the recipe named it say bf16.
PRECISION = "fp32"
SEEDS = (0, 1, 2)
VIEWS = 4
# Label in runs, and in tables.
HEADS = {
    "linear": "linear",
    "fcn": "FCN",
    "upernet": "UPerNet, FPN",
    "upernet:neck=bifpn,layers=2": "UPerNet, 2x BiFPN",
    "mask2former": "Mask2Former",
}
# Those that the live rows train: heads end with the same weights in any group, so that any of them may be left out.
LIVE_HEADS = ("linear", "upernet", "mask2former")
BACKBONES = {
    "mobilenetv2_100": ("mobilenetv2_100", "mobilenetv2_100.tv_int8_dequant.safetensors"),
    "vit_tiny_patch16_224": ("vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"),
    "mobilenetv2_100 random": ("mobilenetv2_100", "random:0"),
}
PRETRAINED = tuple(name for name, (_, weights) in BACKBONES.items() if not weights.startswith("random:"))


def fcache(*arguments: object) -> str:
    """What the command line prints, run with one thread: a second one on a busy machine only waits."""
    command = [sys.executable, "-m", "fcache.cli", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout


def extract(name: str, cache: Path, data: Path, *more: object) -> Path:
    """The cache of a backbone, extracted (again: then nothing happens)."""
    model, weights = BACKBONES[name]
    path = weights if weights.startswith("random:") else data / "weights" / weights
    fcache(
        "extract", "--model", model, "--weights", path, "--dataset", "ade20k", "--data-root", data / "camvid",
        "--recipe", RECIPE, "--cache", cache, *more,
    )  # fmt: skip
    return cache


def train(cache: Path, out: Path, heads: Sequence[str], seed: int, *more: object) -> dict[str, Any]:
    """Heads trained in one pass with one seed: their mIoU and costs by label."""
    chosen = [argument for head in heads for argument in ("--head", head)]
    fcache(
        "train-head", "--cache", cache, *chosen, "--recipe", RECIPE, "--seed", seed, "--out", out, "--resume",
        "--allow-random-backbone", *more,
    )  # fmt: skip
    runs = [json.loads(p.read_text()) for p in out.glob(f"*-seed{seed}/run.json")]
    return {r["label"]: {"miou": r["evaluations"][-1]["metrics"]["miou"], "cost": r["cost"]} for r in runs}


def once(file: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row in a file, worked out if it is not there."""
    if not file.exists():
        started = time.monotonic()
        row = {**work(), "precision": PRECISION, "minutes": (time.monotonic() - started) / 60}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(row))
    return json.loads(file.read_text())


def cached_row(name: str, seed: int, data: Path, work: Path) -> dict[str, Any]:
    """All heads on four cached views; two of them on random weights, which only say what pretraining is worth."""
    label = name.replace(" ", "-")
    heads = tuple(HEADS) if name in PRETRAINED else ("linear", "upernet")

    def trained() -> dict[str, Any]:
        cache = extract(name, work / f"{label}-{VIEWS}.fcache", data)
        return {"backbone": name, "seed": seed, "heads": train(cache, work / "runs" / label, heads, seed)}

    return once(work / "rows" / f"cached-{label}-{seed}.json", trained)


def live_row(name: str, data: Path, work: Path) -> dict[str, Any]:
    """Heads on features as the backbone gives them, views and seed as in the cached row."""

    def trained() -> dict[str, Any]:
        cache = extract(name, work / f"{name}-fp32.fcache", data, "--encoding", "fp32")
        return {"backbone": name, "seed": 0, "heads": train(cache, work / "runs" / f"{name}-fp32", LIVE_HEADS, 0)}

    return once(work / "rows" / f"live-{name}-0.json", trained)


def tta_row(name: str, work: Path) -> dict[str, Any]:
    """The heads of the live row scored beside the running backbone: on one view, and by ms + flip."""

    def scored() -> dict[str, Any]:
        runs = sorted((work / "runs" / f"{name}-fp32").glob("*-seed0"))
        found: dict[str, Any] = {"backbone": name, "seed": 0}
        for views, option in (("one", ("--live",)), ("ms-flip", ("--tta", "ms-flip"))):
            scores = json.loads(fcache("evaluate", *runs, *option, "--json"))
            found[views] = {s["head"]: s["metrics"]["miou"] for s in scores}
        return found

    return once(work / "rows" / f"tta-{name}-0.json", scored)


def spread(values: Sequence[float]) -> str:
    """Mean and, of several, standard deviation."""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Heads by backbones: mIoU over the seeds, of seed 0 the gain by live features, and by ms + flip after that."""
    lines = [
        "| backbone | head | parameters | mIoU, cached | seeds | live features | ms + flip |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in BACKBONES:
        mine = sorted((r for r in rows["cached"] if r["backbone"] == name), key=lambda r: r["seed"])
        live = next((r["heads"] for r in rows["live"] if r["backbone"] == name), {})
        views = next((r for r in rows["tta"] if r["backbone"] == name), {"one": {}, "ms-flip": {}})
        for head, shown in HEADS.items():
            found = [r["heads"][head] for r in mine if head in r["heads"]]
            if not found:
                continue
            gains = [
                f"{live[head]['miou'] - found[0]['miou']:+.3f}" if head in live else "",
                f"{views['ms-flip'][head] - views['one'][head]:+.3f}" if head in views["one"] else "",
            ]
            cells = [name, shown, f"{found[0]['cost']['parameters']:,}", spread([f["miou"] for f in found])]
            lines.append(f"| {' | '.join([*cells, str(len(found)), *gains])} |")
    return "\n".join(lines) + f"\n\n{computed(rows)}\n"


def computed(rows: dict[str, list[dict[str, Any]]]) -> str:
    """In which precision the backbones computed the rows, in words."""
    seeds: dict[tuple[str, str], list[str]] = {}
    for kind, found in rows.items():
        for r in found:
            seeds.setdefault((r["precision"], r["backbone"]), []).append(f"{kind} {r['seed']}")
    said = (f"{name}: {', '.join(which)} in {precision}" for (precision, name), which in sorted(seeds.items()))
    return f"Precision of the backbones, by kind of row and seed. {'; '.join(said)}."


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("camvid-study"))
    parser.add_argument("--only", choices=BACKBONES, action="append")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if "FCACHE_TEST_DATA" not in os.environ:
        print("camvid_heads: skipped, FCACHE_TEST_DATA does not name a folder with camvid and weights")
        return
    data, work = Path(os.environ["FCACHE_TEST_DATA"]), options.work
    for name in [] if options.table else options.only or BACKBONES:
        for seed in SEEDS:
            cached_row(name, seed, data, work)
        if name in PRETRAINED:
            live_row(name, data, work)
            tta_row(name, work)
    kinds = ("cached", "live", "tta")
    rows = {k: [json.loads(p.read_text()) for p in sorted((work / "rows").glob(f"{k}-*.json"))] for k in kinds}
    about = {"machine": platform.machine(), "processors": os.cpu_count(), "date": time.strftime("%Y-%m")}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "camvid_heads.json").write_text(json.dumps({**about, **rows}, indent=1) + "\n")
    (RESULTS / "camvid_heads.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
