"""What an extraction would cost: records, bytes, free space and time, before anything is written."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from fcache.cache_spec import DataError, Group, Manifest, Storage, find_encoding, open_storage, to_json
from fcache.cache_spec.commits import read_commits
from fcache.cache_spec.layout import FEATURES, record_bytes
from fcache.cache_spec.storage.local import LocalStorage
from fcache.cache_spec.store import is_cache, preview
from fcache.extractor.batching import with_batches
from fcache.extractor.costs import Costs, Rates, Work, costs, disk_rates
from fcache.extractor.decoding import Request
from fcache.extractor.encode import LevelFacts, encode_batch, tables_on
from fcache.extractor.encoding_costs import encoding_costs
from fcache.extractor.forward import features_of
from fcache.extractor.job import Job
from fcache.extractor.prepare import UNKNOWN_SIZE, Prepared, prepare
from fcache.extractor.views import draw_view

# The numbers of training views that `benchmarks/view_count.py` compares.
VIEW_COUNTS = (1, 2, 4, 8)
# Room for what the plan does not count: targets, indices, commits.
RESERVE_BYTES = 64 << 20


@dataclass(frozen=True)
class SplitPlan:
    """One split: samples, views, records and shards in all and still to do, bytes of features, canvases."""

    name: str
    samples: int
    views: int
    records: int
    pending_records: int
    shards: int
    pending_shards: int
    bytes: int
    pending_bytes: int
    canvases: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Plan:
    """The cost of a job. Bytes are those of the features as encoded, before any lossless compression; encodings that
    are made to be compressed count half a byte a value, which they stay below.

    `level_bytes` maps a level to its bytes a training record. `view_bytes` maps numbers of training views to the bytes
    of the training split; it is empty if all views of an image are the same one. `targets` are the kinds of annotation,
    `devices` how many of them work. If something was measured, `rates` and `costs` are there, and `encodings` maps each
    encoding to the bytes that it takes for a record (None where the features of the batch do not fit).
    """

    cache: str
    features: str
    splits: tuple[SplitPlan, ...]
    level_bytes: Mapping[str, int]
    free_bytes: int | None
    random_weights: str | None
    view_bytes: Mapping[int, int]
    targets: tuple[str, ...]
    devices: int = 1
    rates: Rates | None = None
    costs: Costs | None = None
    encodings: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def records(self) -> int:
        """Records of all splits."""
        return sum(s.records for s in self.splits)

    @property
    def pending_records(self) -> int:
        """Records that are not committed."""
        return sum(s.pending_records for s in self.splits)

    @property
    def bytes(self) -> int:
        """Bytes of all records."""
        return sum(s.bytes for s in self.splits)

    @property
    def pending_bytes(self) -> int:
        """Bytes that are still to write."""
        return sum(s.pending_bytes for s in self.splits)

    @property
    def fits(self) -> bool:
        """Whether what is still to write, and a reserve, has room; where nobody can tell, it has."""
        needed = self.pending_bytes + RESERVE_BYTES if self.pending_bytes else 0
        return self.free_bytes is None or needed <= self.free_bytes


def plan(job: Job, *, measure: bool = True, devices: int = 1) -> Plan:
    """The plan of a job on so many devices like its own.

    With `measure` one batch is decoded and run, twice, and a temporary file is written beside the cache, to estimate
    the time and from when on the cache pays.
    """
    prepared = with_batches(prepare(job))
    found = replace(plan_of(prepared), devices=devices)
    if not measure or found.pending_records == 0:
        return found
    rates, encodings = _measured(prepared)
    training = [g for g in prepared.wanted.groups if g.role == "training"]
    work = Work(
        records=found.pending_records,
        bytes=found.pending_bytes,
        pass_records=sum(len(g.ids) for g in training),
        pass_bytes=sum(len(g.ids) * record_bytes(g.levels, g.encoding) for g in training),
        decoders=job.decoders(devices),
        devices=devices,
    )
    return replace(found, rates=rates, costs=costs(rates, work), encodings=encodings)


def plan_of(prepared: Prepared) -> Plan:
    """The plan of a prepared job, with what its cache has already. Raises as `create_or_grow`."""
    job = prepared.job
    storage = open_storage(job.cache)
    manifest = preview(storage, prepared.wanted)
    training = next((g for g in manifest.groups if g.role == "training"), manifest.groups[0])
    return Plan(
        cache=storage.url,
        features=manifest.features.key,
        splits=tuple(_split_plan(storage, manifest, name) for name in job.splits),
        level_bytes={level.name: record_bytes((level,), training.encoding) for level in training.levels},
        free_bytes=storage.free_bytes(),
        random_weights=manifest.random_weights,
        view_bytes=_view_bytes(prepared, training) if training.role == "training" else {},
        targets=tuple(t.kind for t in manifest.targets),
    )


def _view_bytes(prepared: Prepared, group: Group) -> dict[int, int]:
    cut, sample = prepared.recipe.training, group.ids[0]
    first, second = (
        draw_view(cut, seed=prepared.job.seed, sample_id=sample, view=v, image_size=UNKNOWN_SIZE) for v in (0, 1)
    )
    if to_json(first) == to_json(second):
        return {}
    each = len(group.ids) * record_bytes(group.levels, group.encoding)
    return {count: count * each for count in sorted({*VIEW_COUNTS, group.views})}


def _split_plan(storage: Storage, manifest: Manifest, name: str) -> SplitPlan:
    records = pending_records = shards = pending_shards = size = pending_size = 0
    groups = manifest.split(name)
    for group in groups:
        each = record_bytes(group.levels, group.encoding)
        done = read_commits(storage, group.path, FEATURES) if is_cache(storage) else {}
        for shard in group.shards():
            records, shards, size = records + shard.count, shards + 1, size + shard.count * each
            if shard.index not in done:
                pending_records, pending_shards = pending_records + shard.count, pending_shards + 1
                pending_size += shard.count * each
    samples = sum(len(g.ids) for g in groups)
    canvases = tuple(g.canvas for g in groups)
    return SplitPlan(
        name, samples, groups[0].views, records, pending_records, shards, pending_shards, size, pending_size, canvases
    )


def _measured(prepared: Prepared) -> tuple[Rates, dict[str, float | None]]:
    """The rates of one batch after a warm-up and of the cache's disk, and bytes a record in each encoding."""
    group = max(prepared.wanted.groups, key=lambda g: len(g.ids) * g.views)
    decoder = prepared.decoder
    positions = prepared.positions[group.split]
    requests = [Request(group.split, positions[i], 0, group.canvas) for i in group.ids[: group.batch]]
    started = time.perf_counter()
    decoded = [d for d in map(decoder.__getitem__, requests) if d.image is not None]
    decoding = time.perf_counter() - started
    if not decoded:
        raise DataError(f"none of the first {len(requests)} samples of {group.split!r} could be decoded")
    images = [torch.from_numpy(d.image) for d in decoded]
    ids = tuple(group.ids[: len(decoded)])
    features = features_of(images, group.canvas, prepared.backbone)
    tables = tables_on(fitted_to(features, group), prepared.backbone.device)
    computing = 0.0
    for _ in range(2):
        started = time.perf_counter()
        features = features_of(images, group.canvas, prepared.backbone)
        encode_batch(features, group, ids, LevelFacts(), tables=tables)
        computing = time.perf_counter() - started
    storage = open_storage(prepared.job.cache)
    disk = disk_rates(storage.root) if isinstance(storage, LocalStorage) else None
    writing, reading = disk or (None, None)
    rates = Rates(decoding / len(requests), computing / len(decoded), writing, reading)
    return rates, encoding_costs(_on_host(features), group.levels)


def fitted_to(features: Mapping[str, Tensor], group: Group) -> dict[str, Mapping[str, np.ndarray]]:
    """Tables fitted to one batch, as good as any to measure with; none if the group's encoding needs none."""
    fit = find_encoding(group.encoding).fit
    if fit is None:
        return {}
    levels = {level.name: level for level in group.levels}
    return {
        name: fit.tables(fit.add(fit.start(levels[name]), x, levels[name]), levels[name])
        for name, x in _on_host(features).items()
    }


def _on_host(features: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: x.float().cpu().numpy() for name, x in features.items()}
