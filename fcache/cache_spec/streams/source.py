"""The cache as a block source: shuffled batches copied by a few threads into reused buffers."""

import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from fcache.cache_spec.block import Block, SourceInfo
from fcache.cache_spec.errors import IncompleteError, SpecError, unknown_name
from fcache.cache_spec.layout import Group
from fcache.cache_spec.reader import CacheReader, GroupRecords
from fcache.cache_spec.reading.mapping import aligned_empty
from fcache.cache_spec.spec import LevelSpec
from fcache.cache_spec.streams.filling import Allocate, Buffers, Filler, Frame, group_filler
from fcache.cache_spec.streams.order import epoch_batches, num_batches, span, subset_mask

Fill = Callable[[], Block[np.ndarray]]
Ring = deque[tuple[str, Buffers]]
Rows = tuple[int, np.ndarray]
DECODED = ("fp32", "fp16")


@dataclass(frozen=True)
class StreamConfig:
    """How a cache is streamed.

    `levels` and `kinds` name what is read (None: all levels); `order` is "shuffled" or "sequential"; `subset` keeps a
    fixed fraction of the samples; an epoch of a training split reads one view, epoch e view e mod K, `all_views` reads
    all; `views` leaves a training split its first K only (None: all there are). `threads` copy ahead into `threads + 2`
    sets of buffers made by `allocate` (pinned memory, say). With `decode`, "fp32" or "fp16", they decode as well, and
    levels come in that encoding; None gives them as stored.
    """

    batch_size: int
    levels: tuple[str, ...] | None = None
    kinds: tuple[str, ...] = ()
    order: str = "shuffled"
    seed: int = 0
    subset: float = 1.0
    drop_last: bool = False
    all_views: bool = False
    views: int | None = None
    threads: int = 2
    world: tuple[int, int] = (0, 1)
    decode: str | None = None
    allocate: Allocate = aligned_empty

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.threads < 1:
            raise SpecError(f"batch_size and threads must be positive, got {self.batch_size} and {self.threads}")
        if self.order not in ("shuffled", "sequential"):
            raise SpecError(f"order is shuffled or sequential, got {self.order!r}")
        if self.views is not None and self.views < 1:
            raise SpecError(f"at least one view is read, got views={self.views}")
        if not 0 < self.subset <= 1:
            raise SpecError(f"a subset is more than 0 % and at most 100 %, got {self.subset:.4%}")
        if not 0 <= self.world[0] < self.world[1]:
            raise SpecError(f"world is (rank, processes) with 0 <= rank < processes, got {self.world}")
        if self.decode not in (None, *DECODED):
            raise SpecError(f"levels are decoded to {' or '.join(DECODED)}, or not at all (None), got {self.decode!r}")


class CacheSource:
    """A `BlockSource` over one split of an open cache; make one with `open_source`.

    It holds to what was committed when it was opened; with `shards`, by group path, to these of them. `records` are
    what it streams by group, of all views, and `fillers` what makes their blocks.
    """

    def __init__(
        self,
        reader: CacheReader,
        split: str,
        config: StreamConfig,
        *,
        shards: Mapping[str, Collection[int]] | None = None,
    ) -> None:
        self.config = config
        found = reader.records(split, config.kinds)
        if shards is not None:
            found = [_select(g, np.isin(g.records // g.group.shard_records, list(shards[g.group.path]))) for g in found]
        if config.views is not None and found[0].group.role == "training":
            found = [_select(g, g.views < check_views(config.views, g.group, reader.url)) for g in found]
        if config.subset < 1.0:
            found = [_select(g, subset_mask(g.group.ids, config.subset)[g.samples]) for g in found]
        groups = [g for g in found if len(g.records)]
        if not groups:
            raise IncompleteError(f"{reader.url}: nothing of this subset of split {split!r} is committed yet")
        self.records: tuple[GroupRecords, ...] = tuple(groups)
        levels = [choose_levels(g.group, config.levels) for g in groups]
        self.fillers: Sequence[Filler] = [
            group_filler(
                reader, g, chosen, config.kinds,
                batch_size=config.batch_size, decode=config.decode, allocate=config.allocate,
            )
            for g, chosen in zip(groups, levels, strict=True)
        ]  # fmt: skip
        self._views = [np.bincount(g.views) for g in groups]
        info = reader.info(split, kinds=config.kinds, levels=levels[0])
        self._info = replace(info, extent={**info.extent, **chosen_extent(config, info)})
        self._remote = reader.storage.path() is None
        self._ring: Ring | None = None

    @property
    def info(self) -> SourceInfo:
        """Identity, levels, targets and extent."""
        return self._info

    def num_blocks(self, epoch: int) -> int:
        """Blocks in an epoch."""
        config, view = self.config, self._view(epoch)
        sizes = [int(v.sum() if view is None else v[view : view + 1].sum()) for v in self._views]
        return num_batches(sizes, batch_size=config.batch_size, drop_last=config.drop_last, world=config.world)

    def order(self, epoch: int) -> list[Rows]:
        """The blocks of an epoch as (number of the group, rows of its `records`); nothing is read."""
        config, view = self.config, self._view(epoch)
        rows = [np.arange(len(g.records)) if view is None else np.flatnonzero(g.views == view) for g in self.records]
        batches = epoch_batches(
            [len(r) for r in rows],
            batch_size=config.batch_size,
            shuffle=config.order == "shuffled",
            drop_last=config.drop_last,
            key=(config.seed, epoch),
            world=config.world,
        )
        return [(group, rows[group][positions]) for group, positions in batches]

    def orders(self, epoch: int, *, start: int = 0, epochs: int | None = 1) -> Iterator[Rows]:
        """The orders of epochs after each other (None: without end), of the first from the `start`-th block on."""
        for number in span(epoch, epochs):
            yield from self.order(number)[start if number == epoch else 0 :]

    def blocks(self, epoch: int, *, start: int = 0, epochs: int | None = 1) -> Iterator[Block[np.ndarray]]:
        """The blocks of epochs. Buffers are filled again: a block holds until the next-but-one is asked for."""
        yield from self.read(self.orders(epoch, start=start, epochs=epochs))

    def read(self, order: Iterable[Rows]) -> Iterator[Block[np.ndarray]]:
        """The blocks of any `order`, read ahead as those of an epoch; none may be larger than the batch size."""
        threads = self.config.threads
        # Iterations after each other use the same buffers; those at the same time have their own.
        kept, self._ring = self._ring, None
        ring: Ring = kept or deque(("", {}) for _ in range(threads + 2))
        waiting: deque[tuple[Future[Block[np.ndarray]], Fill]] = deque()
        pool = ThreadPoolExecutor(threads, thread_name_prefix="fcache-read", initializer=_give_way)
        try:
            for group, rows in order:
                fill = partial(self.fillers[group].fill, rows, _slot(ring, self.records[group].group.path))
                waiting.append((pool.submit(fill), fill))
                if len(waiting) > threads:
                    yield _finish(*waiting.popleft())
            while waiting:
                yield _finish(*waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            # What was read ahead and not given out is filled next, the block given out last is filled last.
            ring.rotate(len(waiting))
            self._ring = ring

    def frame(self, group: int, rows: np.ndarray) -> Frame:
        """Ids, views and view indices of rows of a group, as the block of these rows has them."""
        return self.fillers[group].frame(rows)

    def with_fillers(self, fillers: Sequence[Filler]) -> "CacheSource":
        """The same source with blocks from other fillers of the same records."""
        found = copy(self)
        found.fillers, found._ring = fillers, None
        return found

    def coded(self) -> "CacheSource":
        """The same source without decoding."""
        return self.with_fillers([f.coded() for f in self.fillers])

    def num_bytes(self) -> int:
        """Bytes of the levels and targets of all records in memory, coded."""
        return sum(f.num_bytes() for f in self.fillers)

    @property
    def is_costly(self) -> bool:
        """Whether reading levels again costs more than a copy: they are compressed, or lie on an object store."""
        return self._remote or any(a.compression != "none" for g in self.records for a in g.group.feature_arrays())

    def take_buffers(self, other: "CacheSource") -> None:
        """Goes on with the buffers of a source of the same config that is used no more."""
        self._ring, other._ring = other._ring, None

    def _view(self, epoch: int) -> int | None:
        """The view that an epoch reads, None for all."""
        if self.config.all_views or self._info.role != "training":
            return None
        there = sorted({int(v) for views in self._views for v in np.flatnonzero(views)})
        return there[epoch % len(there)]


def _give_way() -> None:
    """Linux: this thread, when it is woken, leaves the processor to the one that woke it.

    It is woken by the thread that is about to hand out a block. By default the system may run it there and then: the
    block came some 4 ms late, every second time on two cores (`benchmarks/epochs.py`). As batch work it gets as much
    processor time as before.
    """
    if hasattr(os, "SCHED_BATCH"):
        with suppress(OSError):
            if os.sched_getscheduler(0) == os.SCHED_OTHER:
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _slot(ring: Ring, group: str) -> Buffers:
    """The buffers of a ring that are used next; they fit one group only."""
    path, buffers = ring.popleft()
    ring.append((group, buffers if path == group else {}))
    return ring[-1][1]


def _finish(future: Future[Block[np.ndarray]], fill: Fill) -> Block[np.ndarray]:
    """The block of `future`; one that no thread has begun is filled here, for the caller would only wait for it."""
    return fill() if future.cancel() else future.result()


def open_source(reader: CacheReader, split: str, config: StreamConfig) -> CacheSource:
    """A block source over a split. Raises IncompleteError or SpecError if something asked for is not there."""
    return CacheSource(reader, split, config)


def choose_levels(group: Group, names: tuple[str, ...] | None) -> tuple[LevelSpec, ...]:
    """The levels of a group by name, None for all. Raises SpecError for one that it lacks."""
    by_name = {level.name: level for level in group.levels}
    for name in names or ():
        if name not in by_name:
            raise unknown_name("level", name, by_name)
    return group.levels if names is None else tuple(by_name[n] for n in names)


def check_views(views: int, group: Group, url: str) -> int:
    """`views`. Raises SpecError if a group has fewer."""
    if views > group.views:
        raise SpecError(f"{url}: split {group.split!r} has {group.views} views, not {views}; extract it with --views")
    return views


def chosen_extent(config: StreamConfig, info: SourceInfo) -> dict[str, Any]:
    """What of an extent a stream chooses: the share of the samples, and how many views."""
    views = info.extent["views"] if config.views is None or info.role != "training" else config.views
    return {"subset": config.subset, "views": views}


def _select(records: GroupRecords, mask: np.ndarray) -> GroupRecords:
    return GroupRecords(records.group, records.records[mask], records.views[mask], records.samples[mask])
