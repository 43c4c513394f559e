"""How much of n devices an extraction by n processes uses: two processes measured, 8 and 64 simulated.

    python benchmarks/scaling.py [--records 64] [--rounds 3] [--size 256] [--model swinv2-b]

Measured: two extraction processes share a cache on two cores; before and after, two bare backbone loops run side by
side, each over half of the batches. The ratio is that of the times of the slower process of each pair. What the
extraction does beyond the backbone (decoding, encoding, digests, writing) is inside its time. As other programs may
use the cores, too, the processor time of all threads is compared as well: on two cores of their own it decides.

Simulated: the events of processes that share one cache as `fcache.extractor.work.claimed` has it, with service times
measured on this machine: what a claim, a claim in vain and a look at all claims and commits take on this disk. A
shard's computation is that of a fast GPU (--gpu-rate records/s); the disk takes writes one after another, at the
measured rate or at one that is named. The ideal is every device computing all the time.
"""

import argparse
import heapq
import random
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from extraction import Others, backbone_alone, make_job
from storage.report import RESULTS, machine, publish, table, work_folder

from fcache.cache_spec.layout import record_bytes
from fcache.extractor import Job
from fcache.extractor.children import child_context
from fcache.extractor.costs import disk_rates
from fcache.extractor.extraction import open_extraction, share
from fcache.extractor.work import SPREAD, _Look, tasks_of

MEASURED = {
    "two extractions, s": "{extraction:.2f}",
    "two bare loops, s": "{bare:.2f}",
    "share of the bare loops (range)": "{ratio:.3f} ({low:.3f} to {high:.3f})",
    "in processor time": "{cpu:.3f}",
    "other programs' share of the processors": "{others:.0%}",
}
SIMULATED = {
    "devices": "{devices}",
    "share of the ideal": "{share:.3f}",
    "claims and looks": "{claiming:.2%}",
    "waiting for the disk": "{disk:.2%}",
    "idle at the end": "{idle:.2%}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=64, help="default: 64")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--size", type=int, default=256, help="side of the inputs; default: 256")
    parser.add_argument("--model", default="swinv2-b")
    parser.add_argument("--gpu-rate", type=float, default=100.0, help="records/s of one simulated device; default: 100")
    parser.add_argument("--folder", type=Path, help="where to make the caches (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.device, args.workers = "cpu", 0
    torch.set_num_threads(1)
    m = machine("timm")
    with work_folder(args.folder) as work:
        job = make_job(work, args.model, args)
        measured = measure(replace(job, shard_records=2), args.rounds)
        costs = claiming_costs(replace(job, cache=work / "claims", shard_records=1, views=64), work)
        rows = simulated(costs, args.gpu_rate)
    result = {
        "what": f"{args.model} in {job.precision}, {args.records} records of {args.size} x {args.size}; simulated: "
        f"{args.gpu_rate:g} records/s a device, shards of 64 records of {costs['record_bytes'] / 1e6:.2f} MB.",
        "rows": {args.model: measured},
        "service": costs,
        "simulated": rows,
    }
    body = table("Two processes on two cores", MEASURED, result["rows"]) + "\n\n" + table("Simulated", SIMULATED, rows)
    publish("scaling", result, body, args.out, m=m)


def measure(job: Job, rounds: int) -> dict[str, Any]:
    """Rounds of two extraction processes, each between two rounds of bare loops."""
    busy, bare, whole = Others(), [side_by_side(job, bare_loop)], list[tuple[float, float]]()
    ratios, shares = list[float](), list[float]()
    for number in range(rounds):
        cache = Path(f"{job.cache}-{number}")
        whole.append(side_by_side(replace(job, cache=cache), extraction_loop))
        shutil.rmtree(cache)
        bare.append(side_by_side(job, bare_loop))
        seconds, cpu = ((bare[-2][i] + bare[-1][i]) / 2 / whole[-1][i] for i in (0, 1))
        ratios.append(seconds)
        shares.append(cpu)
    found = {"extraction": statistics.median(w for w, _ in whole), "bare": statistics.median(b for b, _ in bare)}
    ratio = {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "rounds": rounds}
    ratio["cpu"] = statistics.median(shares)
    return {**found, **ratio, "seconds": {"extraction": whole, "bare": bare}, "others": busy.share()}


def side_by_side(job: Job, work: Callable[..., None]) -> tuple[float, float]:
    """Seconds of the slower of two processes, from a common start, and processor seconds of both together."""
    context = child_context()
    ready, pipes = context.Barrier(2), [context.Pipe() for _ in range(2)]
    processes = [context.Process(target=work, args=(job, ready, theirs)) for _, theirs in pipes]
    for process in processes:
        process.start()
    took = [ours.recv() for ours, _ in pipes]
    for process in processes:
        process.join()
    return max(seconds for seconds, _ in took), sum(cpu for _, cpu in took)


def extraction_loop(job: Job, ready: Any, pipe: Any) -> None:
    torch.set_num_threads(1)
    with open_extraction(job) as extraction:
        settle(extraction)
        ready.wait()
        started, cpu = time.perf_counter(), time.process_time()
        share(extraction, report=lambda _: None)
        pipe.send((time.perf_counter() - started, time.process_time() - cpu))


def bare_loop(job: Job, ready: Any, pipe: Any) -> None:
    torch.set_num_threads(1)
    # Every other batch of the extraction.
    with open_extraction(replace(job, cache=f"{job.cache}-bare")) as extraction:
        loop = backbone_alone(extraction, every=2)
        settle(extraction)
        ready.wait()
        started, cpu = time.perf_counter(), time.process_time()
        loop()
        pipe.send((time.perf_counter() - started, time.process_time() - cpu))


def settle(extraction: Any) -> None:
    """What a backbone settles once."""
    group, backbone = extraction.writer.manifest.groups[0], extraction.prepared.backbone
    backbone.forward(torch.rand(group.batch, 3, *group.canvas, device=backbone.device))


def claiming_costs(job: Job, work: Path) -> dict[str, float]:
    """Seconds on this disk of claiming a shard, of a claim in vain and of a look, and bytes a second of writing."""
    with open_extraction(job) as extraction:
        tasks = tasks_of(extraction.writer, extraction.prepared)
        names = [(t.shard.group, t.shard.index) for t in tasks]
        claims = extraction.writer.claims
        claim = median_of(lambda: [claims.acquire(*n) for n in names], lambda: [claims.release(*n) for n in names])
        with open_extraction(job) as other:
            for name in names:
                assert claims.acquire(*name)
            vain = median_of(lambda: [other.writer.claims.acquire(*n) for n in names])
        look = median_of(lambda: _Look(extraction.writer).again())
        each = record_bytes(extraction.writer.manifest.groups[0].levels, job.encoding)
    writing, _ = disk_rates(work) or (float("inf"), 0.0)
    count = len(names)
    found = {"claim": claim / count, "vain": vain / count, "look_a_shard": look / count}
    return {**found, "writing": writing, "record_bytes": float(each)}


def median_of(work: Callable[[], object], undo: Callable[[], object] = lambda: None) -> float:
    seconds = []
    for _ in range(9):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
        undo()
    return statistics.median(seconds)


@dataclass(frozen=True)
class Service:
    """Service times in seconds: a shard's computation and its spread, its writing, and what claims take."""

    compute: float
    spread: float
    write: float
    claim: float
    vain: float
    look: float


def simulate(devices: int, shards: int, service: Service, *, looks: bool = True) -> dict[str, float]:
    """What becomes of the time of all devices. Events are processed in the order of their times.

    A process takes one of the next free shards of its list, claims and computes it; the disk writes one shard after
    another, and a process waits if more than one of its own is not written yet. One that is not free costs a claim in
    vain, after which a look leaves in the list what is free. Without `looks` every shard is asked for, in order.
    """
    draw = random.Random(0)
    taken = bytearray(shards)
    free = [list(range(shards)) for _ in range(devices)]
    window = [1] * devices
    computing: set[int] = set()
    unwritten: list[list[float]] = [[] for _ in range(devices)]
    disk, ends, claiming, waiting = 0.0, [0.0] * devices, 0.0, 0.0
    events = [(draw.random() * 1e-3, d) for d in range(devices)]
    heapq.heapify(events)
    while events:
        now, d = heapq.heappop(events)
        computing.discard(d)
        if not free[d]:
            ends[d] = max([now, *unwritten[d]])
            continue
        place = free[d].pop(draw.randrange(min(window[d], len(free[d]))))
        if taken[place]:
            spent = service.vain
            if looks:
                free[d] = [p for p in free[d] if not taken[p]]
                window[d] = SPREAD * len(computing) + 1
                spent += service.look
            claiming += spent
            heapq.heappush(events, (now + spent, d))
            continue
        taken[place] = 1
        computing.add(d)
        claiming += service.claim
        done = now + service.claim + service.compute * draw.gauss(1, service.spread)
        # At most one commit may be under way while the next shard is computed.
        if len(unwritten[d]) > 1:
            written = unwritten[d].pop(0)
            waiting += max(0.0, written - done)
            done = max(done, written)
        disk = max(disk, done) + service.write
        unwritten[d].append(disk)
        heapq.heappush(events, (done, d))
    end = max(ends)
    ideal = shards * service.compute / devices
    idle = sum(end - e for e in ends) / devices / end
    return {"share": ideal / end, "claiming": claiming / devices / end, "disk": waiting / devices / end, "idle": idle}


def simulated(costs: dict[str, float], rate: float) -> dict[str, dict[str, Any]]:
    """Rows: 8 and 64 devices, and what limits more of them."""
    shards, records = 2500, 64
    local = Service(
        compute=records / rate, spread=0.05, write=records * costs["record_bytes"] / costs["writing"],
        claim=costs["claim"], vain=costs["vain"], look=costs["look_a_shard"] * shards,
    )  # fmt: skip
    # A parallel file system: every question takes ten times as long, its disks keep up.
    shared = replace(local, write=local.write / 100, claim=10 * local.claim, vain=10 * local.vain, look=10 * local.look)
    rows = {}
    for devices in (1, 8, 64, 256):
        for name, service in (("this disk", local), ("a shared file system", shared)):
            for looks in (True, False) if devices == 64 and service is shared else (True,):
                label = f"{devices}, {name}" + ("" if looks else ", every shard asked for")
                rows[label] = {"devices": devices, **simulate(devices, shards, service, looks=looks)}
    few = simulate(64, 320, shared)
    rows["64, a shared file system, 320 shards"] = {"devices": 64, **few}
    return rows


if __name__ == "__main__":
    main()
