"""How fast cached pyramids become torch tensors: shuffled batches of 16, against a memory copy and zarr-python's loop.

Everything lies in the page cache. The limit is `np.memmap`, copied record by record into preallocated buffers by the
calling thread. Each of our rounds is timed between two rounds of the limit, and its ratio is to their mean, so that a
busy machine slows both. Ours copies in 1 or 2 threads, and in the calling thread while that would only wait; the limit
has the calling thread alone, so that ours may pass it. CPU seconds count all threads. Every variant is compared bit for
bit before it is timed.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import torch
import zarr

from fcache.cache_spec import (
    BackboneSpec,
    FeatureSpec,
    Group,
    LevelSpec,
    Manifest,
    SplitRecipe,
    StreamConfig,
    View,
    index_arrays,
    open_cache,
    open_source,
    open_writer,
)
from fcache.cache_spec.order import epoch_batches

BATCH = 16
ZARR = "zarr-python, a record at a time"
LEVELS = (
    LevelSpec("level-4", "C H W", (96, 128, 128), 4),
    LevelSpec("level-8", "C H W", (192, 64, 64), 8),
    LevelSpec("level-16", "C H W", (384, 32, 32), 16),
    LevelSpec("level-32", "C H W", (768, 16, 16), 32),
)
RECORD_BYTES = sum(2 * int(np.prod(level.shape)) for level in LEVELS)

Batches = Callable[[int], Iterator[dict[str, torch.Tensor]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="where to make the caches (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix="fcache-streaming-", dir=args.folder))
    try:
        result = measure(work, args.records, args.rounds)
    finally:
        shutil.rmtree(work)
    print(table(result))
    args.out.mkdir(parents=True, exist_ok=True)
    stem = f"streaming_{result['machine']['short']}_{date.today():%Y-%m}"
    (args.out / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / f"{stem}.md").write_text(table(result) + "\n")


def measure(work: Path, records: int, rounds: int) -> dict[str, object]:
    """All variants in turn, each checked and then timed."""
    make_stores(work, records)
    limit = memmap_copies(work, records)
    check(limit, work, records, "np.memmap copied")
    variants = {
        "fcache, 1 thread": partial(cache_batches, work, 1, "mmap"),
        "fcache, 2 threads": partial(cache_batches, work, 2, "mmap"),
        "fcache, 2 threads, positional reads": partial(cache_batches, work, 2, "pread"),
        ZARR: partial(zarr_batches, work, records),
    }
    size = records // BATCH * BATCH * RECORD_BYTES / 1e6
    rows: dict[str, dict[str, float]] = {}
    limits: list[tuple[float, float]] = []
    for name, make in variants.items():
        # One stream is open at a time, as in a training.
        variant = make()
        check(variant, work, records, name)
        times, ratios = [], []
        before = timed(limit, 0)
        for r in range(rounds):
            spent, after = timed(variant, r), timed(limit, r)
            times.append(spent)
            ratios.append((before[0] + after[0]) / 2 / spent[0])
            limits.append(after)
            before = after
        rows[name] = {
            **summary(times, size),
            "ratio": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
        }
    rows["np.memmap copied"] = {**summary(limits, size), "ratio": 1.0, "low": 1.0, "high": 1.0}
    for row in rows.values():
        row["times_zarr_python"] = row["ratio"] / rows[ZARR]["ratio"]
    return {
        "claim": "shuffled batches of 16, 512x512 SwinV2-T pyramid in fp16, cached in memory, into torch tensors",
        "command": f"python benchmarks/streaming.py --records {records} --rounds {rounds}",
        "record_mb": RECORD_BYTES / 1e6,
        "rounds": rounds,
        "machine": machine(),
        "rows": rows,
    }


def summary(times: list[tuple[float, float]], size: float) -> dict[str, float]:
    """Medians of (seconds, CPU seconds) for `size` MB."""
    return {
        "mb_per_s": size / statistics.median(t for t, _ in times),
        "cpu_s_per_gb": statistics.median(c for _, c in times) / size * 1000,
    }


def make_stores(work: Path, records: int) -> None:
    """A cache through the public writer, and one flat file with the same records."""
    rng = np.random.default_rng(0)
    spec = FeatureSpec(
        BackboneSpec("swinv2-t", {}, "0" * 64, (0.5,) * 3, (0.5,) * 3, "fp32", tuple(x.free() for x in LEVELS)),
        SplitRecipe({"kind": "plain"}, "fp16"),
        SplitRecipe({"kind": "plain"}, "fp16"),
        seed=0,
    )
    ids = tuple(f"sample-{i}" for i in range(records))
    group = Group("train", "train", "training", (512, 512), LEVELS, "fp16", 32, BATCH, ids, ids, 1, ())
    writer = open_writer(work / "cache", Manifest(spec, (), (group,)))
    view = View((1.0, 0.0, 0.0, 0.0, 1.0, 0.0), (512, 512), (512, 512), (512, 512))
    with (work / "flat.bin").open("wb") as flat:
        for shard in writer.pending():
            shard_writer = writer.write(shard)
            for position in range(shard.count):
                levels = {x.name: rng.standard_normal(x.shape, dtype=np.float32).astype("f2") for x in LEVELS}
                arrays = {name: x[None] for name, x in levels.items()}
                arrays |= index_arrays([view], [shard.sample + position], [0])
                shard_writer.append([position], arrays)
                for x in levels.values():
                    flat.write(x.tobytes())
            shard_writer.commit(facts={}, fingerprint={})
    writer.finish()


def order(records: int, epoch: int) -> list[np.ndarray]:
    """The record numbers of each batch, as the cache's own stream has them."""
    found = epoch_batches([records], batch_size=BATCH, shuffle=True, drop_last=True, key=(0, epoch), world=(0, 1))
    return [positions for _, positions in found]


def memmap_copies(work: Path, records: int) -> Batches:
    """The limit: one copy from the page cache, into buffers that were there before."""
    source = np.memmap(work / "flat.bin", dtype=np.float16, mode="r").reshape(records, -1)
    buffer = np.zeros((BATCH, source.shape[1]), dtype=np.float16)
    levels, start = {}, 0
    for level in LEVELS:
        end = start + int(np.prod(level.shape))
        levels[level.name] = torch.from_numpy(buffer)[:, start:end].unflatten(1, level.shape)
        start = end

    def batches(epoch: int) -> Iterator[dict[str, torch.Tensor]]:
        for positions in order(records, epoch):
            for row, record in enumerate(positions):
                np.copyto(buffer[row], source[record])
            yield levels

    return batches


def cache_batches(work: Path, threads: int, mode: str) -> Batches:
    """Ours, through the public reader."""
    config = StreamConfig(BATCH, drop_last=True, threads=threads)
    source = open_source(open_cache(work / "cache", mode=mode), "train", config)

    def batches(epoch: int) -> Iterator[dict[str, torch.Tensor]]:
        for block in source.blocks(epoch):
            yield {name: torch.from_numpy(level.parts[""]) for name, level in block.levels.items()}

    return batches


def zarr_batches(work: Path, records: int) -> Batches:
    """What a user of zarr-python writes: one read a record and level, then a stack."""
    group = zarr.open_group(work / "cache" / "train", mode="r")
    arrays = {level.name: group[level.name] for level in LEVELS}

    def batches(epoch: int) -> Iterator[dict[str, torch.Tensor]]:
        for positions in order(records, epoch):
            yield {
                name: torch.from_numpy(np.stack([array[int(record)] for record in positions]))
                for name, array in arrays.items()
            }

    return batches


def check(batches: Batches, work: Path, records: int, name: str) -> None:
    """Every batch of one epoch, bit for bit."""
    source = np.memmap(work / "flat.bin", dtype=np.float16, mode="r").reshape(records, -1)
    for positions, batch in zip(order(records, 0), batches(0), strict=True):
        found = np.concatenate([x.reshape(len(positions), -1).numpy() for x in batch.values()], axis=1)
        if not np.array_equal(found.view(np.uint16), source[positions].view(np.uint16)):
            raise SystemExit(f"{name} reads other numbers than were written")


def timed(batches: Batches, epoch: int) -> tuple[float, float]:
    """Seconds and CPU seconds of one epoch; one element of every level is touched."""
    start, cpu, total = time.perf_counter(), time.process_time(), 0.0
    for batch in batches(epoch):
        total += sum(float(x[-1].flatten()[-1]) for x in batch.values())
    return time.perf_counter() - start, time.process_time() - cpu


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "short": f"{cores}cpu",
        "cpu": model,
        "cores": cores,
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "zarr": zarr.__version__,
        "load_average": os.getloadavg()[0],
    }


def table(result: dict) -> str:
    """The result as Markdown."""
    m = result["machine"]
    lines = [
        f"{result['claim']}; {result['rounds']} interleaved rounds, medians.",
        f"{m['cpu']}, {m['cores']} cores, {m['system']}, Python {m['python']}, torch {m['torch']}, zarr {m['zarr']}; "
        f"load average {m['load_average']:.1f}.",
        "",
        "| | MB/s | share of the memmap copy (range) | times zarr-python's loop | CPU seconds a GB |",
        "|---|---|---|---|---|",
    ]
    for name, row in sorted(result["rows"].items(), key=lambda item: -item[1]["ratio"]):
        lines.append(
            f"| {name} | {row['mb_per_s']:.0f} | {row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f}) | "
            f"{row['times_zarr_python']:.1f} | {row['cpu_s_per_gb']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
