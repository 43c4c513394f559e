"""What encodings do to heads: linear and FPN-like heads on CamVid from two pretrained backbones.

    FCACHE_TEST_DATA=DIR python benchmarks/encoding_quality.py --work DIR [--table]

A head is trained on decoded training features and scored on live validation features (float32, what a deployed backbone
gives) and on coded ones. Initial weights, order of batches and learning rates depend on the seed only, so that a
difference to float32 is that of the encoding. Confusion matrices are kept photo by photo: for each goal the encoding is
chosen on the even photos and reported on the odd ones. One file a trained head, so the script may be stopped and
continued; --table only writes the results of what is there.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numcodecs.zstd import Zstd
from PIL import Image
from torch import Tensor, nn

from fcache.cache_spec import LevelSpec, find_encoding
from fcache.extractor.backbones import load_backbone
from fcache.extractor.forward import features_of

RESULTS = Path(__file__).parent / "results"
BACKBONES = {
    "mobilenetv2_100": "mobilenetv2_100.tv_int8_dequant.safetensors",
    "vit_tiny_patch16_224": "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors",
}
# In the order in which they are run: what the goals need first.
ENCODINGS = ("fp32", "rot:0.5", "rot:1", "rot:1.25", "int4", "int8", "rot:1.5", "pool+int4")
SEEDS = range(5)
CANVAS, CLASSES, FITTED = (352, 480), 11, 64
ITERATIONS, BATCH, RATE = {"linear": 300, "fpn": 200}, 4, {"linear": 5e-3, "fpn": 2e-3}
# Times smaller than fp16, and the mean difference that may be lost on the way, in points of mIoU.
GOALS = ((6.0, -0.15), (12.0, -0.5))
ZSTD = Zstd(level=1)
Features = dict[str, np.ndarray]


class Linear(nn.Module):
    """Per level BatchNorm and a 1x1 convolution to the classes, resized to stride 4 and summed."""

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in channels)
        self.classify = nn.ModuleList(nn.Conv2d(c, CLASSES, 1) for c in channels)

    def forward(self, levels: list[Tensor]) -> Tensor:
        maps = [f(n(x)) for x, n, f in zip(levels, self.norms, self.classify, strict=True)]
        return sum(resized(m, (CANVAS[0] // 4, CANVAS[1] // 4)) for m in maps)  # type: ignore[return-value]


class Fpn(nn.Module):
    """BatchNorm, 32-channel laterals, pyramid pooling on top, a top-down path, a 3x3 block; plus the linear head."""

    WIDTH = 32

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        w = self.WIDTH
        self.linear = Linear(channels)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in channels)
        self.laterals = nn.ModuleList(nn.Conv2d(c, w, 1) for c in channels)
        self.pools = nn.ModuleList(nn.Conv2d(w, w // 4, 1) for _ in (1, 2, 4))
        self.top = nn.Sequential(nn.Conv2d(w + 3 * (w // 4), w, 3, padding=1, bias=False), nn.BatchNorm2d(w), nn.ReLU())
        self.fuse = nn.Sequential(nn.Conv2d(w, w, 3, padding=1, bias=False), nn.BatchNorm2d(w), nn.ReLU())
        self.classify = nn.Conv2d(w, CLASSES, 1)

    def forward(self, levels: list[Tensor]) -> Tensor:
        maps = [f(n(x)) for x, n, f in zip(levels, self.norms, self.laterals, strict=True)]
        top, size = maps[-1], (maps[-1].shape[2], maps[-1].shape[3])
        pooled = [resized(f(F.adaptive_avg_pool2d(top, n)), size) for n, f in zip((1, 2, 4), self.pools, strict=True)]
        path = self.top(torch.cat([top, *pooled], dim=1))
        for m in reversed(maps[:-1]):
            path = resized(path, (m.shape[2], m.shape[3])) + m
        logits = self.classify(self.fuse(F.relu(path)))
        return resized(logits, (CANVAS[0] // 4, CANVAS[1] // 4)) + self.linear(levels)


HEADS: dict[str, Callable[[list[int]], nn.Module]] = {"linear": Linear, "fpn": Fpn}


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False) if x.shape[2:] != size else x


def make_features(data: Path, name: str, folder: Path) -> None:
    """The float32 features of the middle 352 rows of all photos, and their labels, as .npy files."""
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    weights = data / "weights" / BACKBONES[name]
    backbone = load_backbone(name, weights=str(weights), input_size=CANVAS, precision="fp32")
    for split in ("training", "validation"):
        files = sorted((data / "camvid" / "images" / split).iterdir())
        found: dict[str, list[np.ndarray]] = {}
        for file in files:
            pixels = cropped(np.asarray(Image.open(file).convert("RGB"))).transpose(2, 0, 1).copy()
            for level, x in features_of([torch.from_numpy(pixels)], CANVAS, backbone).items():
                found.setdefault(level, []).append(x.numpy()[0])
        for level, maps in found.items():
            np.save(folder / f"{split}-{level}.npy", np.stack(maps))
        masks = [data / "camvid" / "annotations" / split / f"{file.stem}.png" for file in files]
        np.save(folder / f"{split}.npy", np.stack([cropped(np.asarray(Image.open(m))) for m in masks]))
    specs = [(s.name, list(s.shape), s.stride) for s in backbone.levels_at(CANVAS)]
    (folder / "levels.json").write_text(json.dumps(specs))
    (folder / "done").touch()


def cropped(image: np.ndarray) -> np.ndarray:
    first = (image.shape[0] - CANVAS[0]) // 2
    return image[first : first + CANVAS[0]]


def load_features(folder: Path, split: str) -> Features:
    return {level.name: np.load(folder / f"{split}-{level.name}.npy") for level in levels_of(folder)}


def levels_of(folder: Path) -> list[LevelSpec]:
    return [LevelSpec(n, "C H W", tuple(shape), stride) for n, shape, stride in read_json(folder / "levels.json")]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def pooled(x: np.ndarray) -> np.ndarray:
    """The 2x2 means of maps [B, C, H, W] of even size."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).mean(axis=(3, 5))


class Codec:
    """An encoding of this table with what it was fitted to: the first training photos."""

    def __init__(self, name: str, levels: list[LevelSpec], training: Features) -> None:
        self.pool = name.startswith("pool+")
        self.encoding = find_encoding(name.removeprefix("pool+"))
        self.finest = min(level.stride for level in levels)
        self.levels = {level.name: level for level in levels}
        self.tables: dict[str, Mapping[str, np.ndarray]] = {level: {} for level in self.levels}
        if fit := self.encoding.fit:
            for name_, level in self.levels.items():
                sums = fit.add(fit.start(level), training[name_][:FITTED], level)
                self.tables[name_] = fit.tables(sums, level)

    def coded(self, features: Features) -> tuple[Features, float]:
        """Decoded features, and the mean bytes of a record: raw for exact encodings, compressed where it is smaller."""
        size, found = 0, {}
        for name, x in features.items():
            level, small = self.levels[name], x
            halved = self.pool and level.stride == self.finest
            if halved:
                small = pooled(x)
                level = LevelSpec(name, level.dims, small.shape[1:], 2 * level.stride)
            parts, out = [], np.empty(small.shape, np.float32)
            for i in range(len(x)):
                part = self.encoding.encode(small[i : i + 1], level, self.tables[name], np)
                self.encoding.decode(part, level, self.tables[name], np, out=out[i : i + 1])
                parts.append(part)
            specs = self.encoding.parts(level)
            for spec, part in itertools.product(specs, parts):
                raw = np.ascontiguousarray(part[spec.suffix])
                compressed = len(ZSTD.encode(raw)) if spec.layout == "sharded" else raw.nbytes
                size += min(raw.nbytes, compressed)
            if halved:
                out = resized(torch.from_numpy(out), (x.shape[2], x.shape[3])).numpy()
            found[name] = out
        return found, size / len(next(iter(features.values())))


def trained(kind: str, seed: int, levels: list[Tensor], labels: Tensor) -> nn.Module:
    """A head after the last iteration."""
    torch.manual_seed(seed)
    module = HEADS[kind]([x.shape[1] for x in levels])
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE[kind], weight_decay=0.05)
    order = batches(len(labels), torch.Generator().manual_seed(1000 + seed))
    for iteration in range(ITERATIONS[kind]):
        for group in optimizer.param_groups:
            group["lr"] = RATE[kind] * (1 - iteration / ITERATIONS[kind]) ** 0.9
        rows = next(order)
        loss = F.cross_entropy(module([x[rows] for x in levels]), labels[rows], ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module.eval()


def batches(count: int, generator: torch.Generator) -> Iterator[list[int]]:
    left: list[int] = []
    while True:
        if len(left) < BATCH:
            left += torch.randperm(count, generator=generator).tolist()
        yield left[:BATCH]
        left = left[BATCH:]


@torch.inference_mode()
def confusions(module: nn.Module, levels: list[Tensor], labels: Tensor) -> list[list[int]]:
    """One flat confusion matrix a photo; rows are the truth."""
    found = []
    for i in range(len(labels)):
        logits = module([x[i : i + 1] for x in levels])
        guess, truth = resized(logits, (labels.shape[1], labels.shape[2])).argmax(1)[0], labels[i]
        seen = truth >= 0
        found.append(torch.bincount(truth[seen] * CLASSES + guess[seen], minlength=CLASSES**2).tolist())
    return found


def miou(photos: list[list[int]]) -> float:
    """mIoU in points over some photos, of the classes that are there."""
    matrix = np.asarray(photos).sum(axis=0).reshape(CLASSES, CLASSES)
    both, union = np.diag(matrix), matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
    return float(100 * np.mean(both[union > 0] / union[union > 0]))


def run(data: Path, work: Path) -> None:
    """Everything that is not there yet, in the order of `ENCODINGS`."""
    for name in BACKBONES:
        make_features(data, name, work / name)
    for encoding, name in itertools.product(ENCODINGS, BACKBONES):
        folder = work / name
        levels = levels_of(folder)
        files = {(h, s): work / "rows" / f"{name} {encoding} {h} {s}.json" for h in HEADS for s in SEEDS}
        # With one stride for all levels there is no finest one to pool.
        if all(f.exists() for f in files.values()) or ("pool" in encoding and len({x.stride for x in levels}) == 1):
            continue
        training, live = load_features(folder, "training"), load_features(folder, "validation")
        codec = Codec(encoding, levels, training)
        (coded_training, _), (coded, size) = codec.coded(training), codec.coded(live)
        deviations = {k: x.std(axis=(0, 2, 3), keepdims=True) + 1e-12 for k, x in training.items()}
        squares = [float((((coded[k] - x) / deviations[k]) ** 2).mean()) for k, x in live.items()]
        raw = sum(2 * x[0].size for x in live.values())
        facts = {"ratio": raw / size, "bytes": size, "error": statistics.mean(squares) ** 0.5}
        x, v, c = ([torch.from_numpy(f[level.name]) for level in levels] for f in (coded_training, live, coded))
        # Labels on the grid of stride 4 for the loss, on that of stride 2 for scores; 0 is void.
        labels = [np.load(folder / f"{s}.npy").astype(np.int64) - 1 for s in ("training", "validation")]
        grids = torch.from_numpy(labels[0][:, 2::4, 2::4]), torch.from_numpy(labels[1][:, 1::2, 1::2])
        for (head, seed), file in files.items():
            if not file.exists():
                started = time.monotonic()
                module = trained(head, seed, x, grids[0])
                scored = {"live": confusions(module, v, grids[1]), "coded": confusions(module, c, grids[1])}
                row = {"backbone": name, "encoding": encoding, "head": head, "seed": seed, **facts, **scored}
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps({**row, "seconds": time.monotonic() - started}))
        write(work)


def write(work: Path) -> None:
    """results/encoding_quality.json and .md from the rows that are there."""
    rows = [read_json(p) for p in sorted((work / "rows").glob("*.json"))]
    machine = {"machine": platform.machine(), "processors": os.cpu_count(), "date": time.strftime("%Y-%m-%d")}
    protocol = {"iterations": ITERATIONS, "batch": BATCH, "learning_rates": RATE, "canvas": CANVAS, "fitted": FITTED}
    scores = [{**{k: v for k, v in r.items() if k not in ("live", "coded")}, **row_scores(r)} for r in rows]
    table = "\n\n".join(f"### {name}\n\n{table_of(name, rows)}" for name in BACKBONES) + "\n"
    RESULTS.mkdir(exist_ok=True)
    result = {**machine, **protocol, "rows": scores}
    (RESULTS / "encoding_quality.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "encoding_quality.md").write_text(table)


def row_scores(row: dict[str, Any]) -> dict[str, float]:
    halves = {"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}
    return {f"{on} {name}": miou(row[on][half]) for on in ("live", "coded") for name, half in halves.items()}


def differences(rows: list[dict[str, Any]], encoding: str, head: str, key: str) -> list[float]:
    """mIoU minus that of float32 of the same seed, one number a seed."""
    base = {r["seed"]: row_scores(r)[key.replace("coded", "live")] for r in rows if find(r, "fp32", head)}
    found = {r["seed"]: row_scores(r)[key] for r in rows if find(r, encoding, head)}
    return [found[s] - base[s] for s in sorted(found) if s in base]


def find(row: dict[str, Any], encoding: str, head: str) -> bool:
    return row["encoding"] == encoding and row["head"] == head


def table_of(name: str, rows: list[dict[str, Any]]) -> str:
    rows = [r for r in rows if r["backbone"] == name]
    there = [e for e in ENCODINGS if all(differences(rows, e, h, "live all") for h in HEADS)]
    facts = {r["encoding"]: r for r in rows}
    titles = [f"{head}, {on}" for head in HEADS for on in ("live", "coded")]
    lines = [f"| encoding | x smaller than fp16 | error, channel sd | {' | '.join(titles)} | seeds |", "|---" * 8 + "|"]
    for e in sorted(there, key=lambda e: facts[e]["ratio"]):
        cells = [cell(differences(rows, e, h, f"{on} all")) for h in HEADS for on in ("live", "coded")]
        if e == "fp32":
            scores = [[row_scores(r)["live all"] for r in rows if find(r, "fp32", h)] for h in HEADS]
            cells = [f"mIoU {cell(s, sign='')}" if i == 0 else "" for s in scores for i in range(2)]
        seeds = min(len(differences(rows, e, h, "live all")) for h in HEADS)
        lines.append(f"| {e} | {facts[e]['ratio']:.2f} | {facts[e]['error']:.3f} | {' | '.join(cells)} | {seeds} |")
    lines.append("")
    for ratio, allowed in GOALS:
        able = [e for e in there if facts[e]["ratio"] >= ratio]
        if not able:
            continue
        # The best of those that are small enough, by its worse head.
        worst = {e: min(statistics.mean(differences(rows, e, h, "live even")) for h in HEADS) for e in able}
        chosen = max(able, key=lambda e: worst[e])
        odd = {h: differences(rows, chosen, h, "live odd") for h in HEADS}
        reached = all(statistics.mean(d) >= allowed for d in odd.values())
        lines.append(
            f"- at least {ratio:g} times smaller, at most {-allowed:g} lost: `{chosen}` "
            f"({facts[chosen]['ratio']:.2f} times) was chosen on the even photos ({worst[chosen]:+.2f}); on the odd "
            f"ones, live: linear {cell(odd['linear'])}, fpn {cell(odd['fpn'])}: "
            f"{'reached' if reached else 'not reached'}"
        )
    return "\n".join(lines)


def cell(values: list[float], sign: str = "+") -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("encoding-study"))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        write(options.work)
        return
    if "FCACHE_TEST_DATA" not in os.environ:
        print("encoding_quality: skipped, FCACHE_TEST_DATA does not name a folder with camvid and weights")
        return
    torch.set_num_threads(1)
    run(Path(os.environ["FCACHE_TEST_DATA"]), options.work)


if __name__ == "__main__":
    main()
