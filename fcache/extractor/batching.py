"""How many images pass the backbone at once: chosen when a group is created, stored in its manifest, never changed.

On CUDA it is measured: batches are doubled while they fit and a record still gets cheaper. Elsewhere memory is no
limit that pays to approach; a rule by bytes gives the same number on every machine.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from fcache.cache_spec import Group, LevelSpec, open_storage
from fcache.cache_spec.layout import record_bytes
from fcache.cache_spec.store import is_cache, read_manifest
from fcache.extractor.backbones import Backbone
from fcache.extractor.encode import Coded, begin_encoding
from fcache.extractor.forward import features_of
from fcache.extractor.prepare import Prepared

LARGEST_BATCH = 256
# Features of a batch on the CPU, in float32; the activations are a few times as many.
CPU_BYTES = 64 << 20
LARGEST_CPU_BATCH = 16
# A larger batch must make a record cheaper by this much.
WORTHWHILE = 0.97
OTHER_ENCODING = "fp32"


def with_batches(prepared: Prepared) -> Prepared:
    """The job with batch sizes for the groups that its cache does not have yet, unless the job names one."""
    job = prepared.job
    if job.batch_size is not None or not job.grow:
        return prepared
    storage = open_storage(job.cache)
    stored = {g.path for g in read_manifest(storage).groups} if is_cache(storage) else set[str]()
    new = [g for g in prepared.wanted.groups if g.path not in stored]
    if not new:
        return prepared
    chosen = _chosen(new, prepared.backbone)
    groups = tuple(
        replace(g, batch=min(chosen[g.path], g.shard_records)) if g.path in chosen else g
        for g in prepared.wanted.groups
    )
    return replace(prepared, wanted=replace(prepared.wanted, groups=groups))


def _chosen(groups: Sequence[Group], backbone: Backbone) -> dict[str, int]:
    if backbone.device.type != "cuda":
        return {g.path: batch_by_bytes(g.levels) for g in groups}
    found: dict[str, int] = {}
    for split in dict.fromkeys(g.split for g in groups):
        members = [g for g in groups if g.split == split]
        # One measurement a split: the smaller canvases of a test split take the batch of the largest.
        largest = max(members, key=lambda g: g.canvas[0] * g.canvas[1])
        batch = largest_batch(_runner(largest, backbone), limit=min(LARGEST_BATCH, largest.shard_records))
        found |= {g.path: batch for g in members}
        torch.cuda.empty_cache()
    return found


def batch_by_bytes(levels: tuple[LevelSpec, ...]) -> int:
    """The largest power of two, from 1 to 16, whose features take at most 64 MiB in float32."""
    fitting = max(1, CPU_BYTES // max(1, record_bytes(levels, OTHER_ENCODING)))
    return min(LARGEST_CPU_BATCH, 1 << (fitting.bit_length() - 1))


def largest_batch(seconds: Callable[[int], float], *, limit: int) -> int:
    """The batch, a power of two up to `limit`, from which on a larger one does not fit or makes no record cheaper.

    `seconds` runs a batch of a size and returns how long it took; it raises torch.OutOfMemoryError if that does not
    fit. A batch of 1 must fit: its error is passed on.
    """
    best, each = 1, seconds(1)
    while 2 * best <= limit:
        try:
            larger = seconds(2 * best) / (2 * best)
        except torch.OutOfMemoryError:
            return best
        if larger > WORTHWHILE * each:
            return best
        best, each = 2 * best, larger
    return best


def _runner(group: Group, backbone: Backbone) -> Callable[[int], float]:
    """What runs batches of black images as an extraction does: with one batch more in memory than is computed."""
    # Fitted encodings have no tables yet; what they need beside the backbone is small.
    plain = replace(group, encoding=OTHER_ENCODING)

    def seconds(size: int) -> float:
        torch.cuda.empty_cache()
        images = [torch.zeros(3, *group.canvas, dtype=torch.uint8)] * size
        ids, took = tuple(map(str, range(size))), 0.0
        kept: deque[Coded] = deque(maxlen=2)
        # The first one chooses kernels and allocates.
        for _ in range(3):
            started = time.perf_counter()
            kept.append(begin_encoding(features_of(images, group.canvas, backbone), plain, ids))
            kept[-1].wait()
            took = time.perf_counter() - started
        return took

    return seconds
