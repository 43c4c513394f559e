"""Rounds: every variant is checked bit for bit, then timed between rounds of the limit, in one process."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from storage.workload import Workload, equal_bits

# An epoch: the record numbers of each batch, and its arrays by name.
Batches = Callable[[int], Iterator[tuple[Sequence[int], dict[str, torch.Tensor]]]]
Row = dict[str, Any]


def check(batches: Batches, truth: np.ndarray, workload: Workload, name: str) -> None:
    """Every batch of one epoch, bit for bit; every record at most once, and all but less than a batch of them."""
    seen: list[int] = []
    for numbers, batch in batches(0):
        numbers = [int(n) for n in numbers]
        seen += numbers
        if not equal_bits({k: x.numpy() for k, x in batch.items()}, truth[numbers]):
            raise SystemExit(f"{name} reads other numbers than were written")
    if len(set(seen)) != len(seen) or len(seen) <= workload.records - workload.batch:
        raise SystemExit(f"{name} gave {len(set(seen))} of {workload.records} records in {len(seen)} rows")


def timed(batches: Batches, epoch: int) -> tuple[float, float, int]:
    """Seconds, CPU seconds and bytes of one epoch; one element of every array is touched."""
    size, total = 0, 0.0
    start, cpu = time.perf_counter(), time.process_time()
    for _, batch in batches(epoch):
        for x in batch.values():
            size += x.nbytes
            total += float(x[-1].flatten()[-1])
    return time.perf_counter() - start, time.process_time() - cpu, size


def sandwich(
    variant: Callable[[int], tuple], limit: Callable[[int], tuple], rounds: int, *, seconds: float = 8.0
) -> Row:
    """Medians of `rounds` rounds of `variant`, each between two of `limit`: ratios are to the mean of those two.

    Both give (seconds, CPU seconds, bytes) for a round. After `seconds` there are no more rounds, but at least 3.
    """
    times, ratios, started = [], [], time.perf_counter()
    # Not counted: some systems drop pages that nobody used for a minute.
    limit(0)
    before = limit(0)
    for r in range(rounds):
        spent, after = variant(r), limit(r)
        times.append(spent)
        # By bytes a second: an order of its own may leave out a few records.
        ratios.append((before[0] / before[2] + after[0] / after[2]) / 2 * spent[2] / spent[0])
        before = after
        if r >= 2 and time.perf_counter() - started > seconds:
            break
    return {**speed(times), "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def speed(times: Sequence[tuple[float, float, int]]) -> Row:
    """Medians of rounds of (seconds, CPU seconds, bytes)."""
    return {
        "mb_per_s": statistics.median(size / t for t, _, size in times) / 1e6,
        "cpu_s_per_gb": statistics.median(c / size for _, c, size in times) * 1e9,
        "rounds": len(times),
    }
