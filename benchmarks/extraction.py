"""How near an extraction comes to the slowest of its parts, each run alone.

    python benchmarks/extraction.py [--records 48] [--rounds 5] [--size 256] [--device cuda]

The parts are the bare backbone (normalised batches that lie in memory, the extraction's batch size and precision),
decoding alone (the views of the same photos, by as many decoding processes), and writing alone (the bytes that the
extraction writes, plain files with an fsync each). An extraction is timed from an open job, backbone loaded and
decoders started, until everything is committed. Each round times all four, one after another, in an order that
changes; a ratio is one of a round. On a machine that others use, too, wall times say as much about these: the share
that other programs took of the processors is measured, and the processor time of the thread that runs the backbone is
compared with that of the bare loop. It is what is left of the ratio if nothing is waited for.

Backbones have random weights: they compute as long as trained ones. Photos are drawn scenes.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from storage.report import RESULTS, machine, publish, table, work_folder

from fcache.cli.job import usual_precision
from fcache.extractor import Job
from fcache.extractor.decoding import Request
from fcache.extractor.extraction import Extraction, open_extraction, share
from fcache.extractor.forward import normalised
from fcache.extractor.scenes import write_scenes
from fcache.extractor.work import tasks_of

MODELS = ("swinv2-t", "swinv2-b")
COLUMNS = {
    "extraction, records/s": "{extraction:.2f}",
    "backbone alone": "{backbone:.2f}",
    "decoding alone": "{decoding:.1f}",
    "writing alone": "{writing:.0f}",
    "limit": "{limit}",
    "share of the limit (range)": "{ratio:.3f} ({low:.3f} to {high:.3f})",
    "in processor time": "{cpu:.3f}",
    "other programs' share of the processors": "{others:.0%}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=48, help="default: 48")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--size", type=int, default=256, help="side of the inputs; default: 256")
    parser.add_argument("--workers", type=int, default=1, help="decoding processes; default: 1")
    parser.add_argument("--model", action="append", help=f"default: {', '.join(MODELS)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="where to make the caches (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    m = machine("timm")
    rows = {}
    with work_folder(args.folder) as work:
        for model in args.model or MODELS:
            rows[model] = measure(make_job(work, model, args), args.rounds)
    what = (
        f"{args.records} records of {args.size} x {args.size}, int8, backbone in {usual_precision(args.device)}, "
        f"{args.workers} decoding processes."
    )
    publish("extraction", {"what": what, "rows": rows}, table("Extraction", COLUMNS, rows), args.out, m=m)


def make_job(work: Path, model: str, args: argparse.Namespace) -> Job:
    """The extraction of a model, whose cache does not exist yet."""
    root = work / "scenes"
    if not root.exists():
        write_scenes(root, train=args.records, val=1, size=(args.size, args.size * 4 // 3))
    return Job(
        model=model, dataset="ade20k", root=root, cache=work / f"{model}.fcache", weights="random:0", views=1,
        splits=("train",), input_size=(args.size, args.size), device=args.device, workers=args.workers,
        precision=usual_precision(args.device),
        # Shards end in the midst of the run, as they do in a long one.
        shard_records=8,
    )  # fmt: skip


def measure(job: Job, rounds: int) -> dict:
    """The row of a model: medians of its rates, and the ratio to the slowest part, round by round."""
    seconds: dict[str, list[float]] = {"backbone": [], "decoding": [], "writing": [], "extraction": []}
    ratios, shares, busy = [], [], Others()
    for number in range(rounds + 1):
        with open_extraction(replace(job, cache=f"{job.cache}-{number}")) as extraction:
            requests = [r for task in tasks_of(extraction.writer, extraction.prepared) for r in task.requests]
            parts = {
                "backbone": backbone_alone(extraction),
                "decoding": lambda e=extraction, r=requests: deque(e.decoders.stream(r), maxlen=0),
                "extraction": lambda e=extraction: share(e, report=lambda _: None),
            }
            warm_up(extraction, requests[:1])
            order = list(parts)[number % 3 :] + list(parts)[: number % 3]
            took, cpu = {}, {}
            for name in order:
                took[name], cpu[name] = timed(parts[name])
            took["writing"], _ = timed(writing_alone(Path(extraction.prepared.job.cache)))
            records = sum(g.num_records for g in extraction.writer.manifest.groups)
        shutil.rmtree(f"{job.cache}-{number}")
        if number == 0:
            # Not counted: the first of everything.
            busy = Others()
            continue
        for name, spent in took.items():
            seconds[name].append(spent)
        shares.append(cpu["backbone"] / cpu["extraction"])
        ratios.append(max(took[n] for n in ("backbone", "decoding", "writing")) / took["extraction"])
    rates = {name: records / statistics.median(values) for name, values in seconds.items()}
    limit = min(("backbone", "decoding", "writing"), key=rates.__getitem__)
    found = {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    found["cpu"] = statistics.median(shares)
    return {
        **rates,
        "limit": limit,
        **found,
        "rounds": rounds,
        "seconds": seconds,
        "shares": shares,
        "others": busy.share(),
    }


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a piece of work, the device's part included, and processor seconds of this thread."""
    started, cpu = time.perf_counter(), time.thread_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.thread_time() - cpu


def warm_up(extraction: Extraction, requests: list[Request]) -> None:
    """Starts the decoders, and settles in the backbone what is settled once."""
    images = [torch.from_numpy(d.image) for d in extraction.decoders.stream(requests)]
    group, backbone = extraction.writer.manifest.groups[0], extraction.prepared.backbone
    backbone.forward(normalised(images, group.canvas, backbone))


def backbone_alone(extraction: Extraction, *, every: int = 1) -> Callable[[], None]:
    """The bare loop over batches that lie in memory, of the extraction's sizes, or over every n-th of them."""
    group, backbone = extraction.writer.manifest.groups[0], extraction.prepared.backbone
    sizes = [
        min(group.batch, shard.count - start)
        for shard in group.shards()
        for start in range(0, shard.count, group.batch)
    ][::every]
    batches = {n: torch.rand(n, 3, *group.canvas, device=backbone.device) for n in set(sizes)}

    def run() -> None:
        for n in sizes:
            backbone.forward(batches[n])

    return run


def writing_alone(cache: Path) -> Callable[[], None]:
    """The shard files of a cache once more, from memory: plain files, an fsync each."""
    contents = [path.read_bytes() for path in cache.rglob("c.*")]

    def run() -> None:
        with tempfile.TemporaryDirectory(dir=cache.parent) as folder:
            for number, content in enumerate(contents):
                with open(Path(folder) / str(number), "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())

    return run


class Others:
    """What other programs took of the processors since this was made (Linux)."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return sum(ticks[:8]) - ticks[3] - ticks[4], sum(ticks[:8]), own * os.sysconf("SC_CLK_TCK")

    def share(self) -> float:
        """The share, from 0 to 1; decoding processes that still run count as others."""
        busy, every, own = (now - start for now, start in zip(self._now(), self._start, strict=True))
        return max(0.0, busy - own) / every


if __name__ == "__main__":
    main()
