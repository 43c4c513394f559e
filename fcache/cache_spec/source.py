"""The cache as a block source: shuffled batches copied by a few threads into reused buffers."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from fcache.cache_spec.block import Block, SourceInfo
from fcache.cache_spec.errors import SpecError, unknown_name
from fcache.cache_spec.filling import Allocate, Buffers, GroupFiller, group_filler
from fcache.cache_spec.layout import Group
from fcache.cache_spec.order import epoch_batches, subset_ids
from fcache.cache_spec.reader import CacheReader, GroupRecords
from fcache.cache_spec.spec import LevelSpec

Fill = Callable[[], Block[np.ndarray]]
_Ring = deque[tuple[str, Buffers]]


@dataclass(frozen=True)
class StreamConfig:
    """How a cache is streamed.

    `levels` and `kinds` name what is read (None: all levels); `order` is "shuffled" or "sequential"; `subset` keeps a
    fixed fraction of the samples; an epoch of a training split reads one view, epoch e view e mod K, `all_views`
    reads all. `threads` copy ahead into `threads + 2` sets of buffers made by `allocate` (pinned memory, say).
    """

    batch_size: int
    levels: tuple[str, ...] | None = None
    kinds: tuple[str, ...] = ()
    order: str = "shuffled"
    seed: int = 0
    subset: float = 1.0
    drop_last: bool = False
    all_views: bool = False
    threads: int = 2
    world: tuple[int, int] = (0, 1)
    allocate: Allocate = np.empty

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.threads < 1:
            raise SpecError(f"batch_size and threads must be positive, got {self.batch_size} and {self.threads}")
        if self.order not in ("shuffled", "sequential"):
            raise SpecError(f"order is shuffled or sequential, got {self.order!r}")
        if not 0 < self.subset <= 1:
            raise SpecError(f"a subset is more than 0 % and at most 100 %, got {self.subset:.4%}")
        if not 0 <= self.world[0] < self.world[1]:
            raise SpecError(f"world is (rank, processes) with 0 <= rank < processes, got {self.world}")


class CacheSource:
    """A `BlockSource` over one split of an open cache; make one with `open_source`."""

    def __init__(self, reader: CacheReader, split: str, config: StreamConfig) -> None:
        self._config = config
        groups = [_keep_subset(g, config) for g in reader.records(split, config.kinds)]
        groups = [g for g in groups if len(g.records)]
        levels = [_choose_levels(g.group, config.levels) for g in groups]
        self._fillers = [
            group_filler(reader, g, chosen, config.kinds, batch_size=config.batch_size, allocate=config.allocate)
            for g, chosen in zip(groups, levels, strict=True)
        ]
        self._views = sorted({int(v) for g in groups for v in np.unique(g.views)})
        info = reader.info(split, kinds=config.kinds, levels=levels[0])
        self._info = replace(info, extent={**info.extent, "subset": config.subset})
        self._ring: _Ring | None = None

    @property
    def info(self) -> SourceInfo:
        """Identity, levels, targets and extent."""
        return self._info

    def num_blocks(self, epoch: int) -> int:
        """Blocks in an epoch."""
        return len(self._batches(epoch)[1])

    def blocks(self, epoch: int, *, start: int = 0) -> Iterator[Block[np.ndarray]]:
        """The blocks of an epoch. Buffers are filled again: a block holds until the next-but-one is asked for."""
        fillers, batches = self._batches(epoch)
        threads = self._config.threads
        # Epochs after each other use the same buffers; iterations at the same time have their own.
        kept, self._ring = self._ring, None
        ring: _Ring = kept or deque(("", {}) for _ in range(threads + 2))
        waiting: deque[tuple[Future[Block[np.ndarray]], Fill]] = deque()
        pool = ThreadPoolExecutor(threads, thread_name_prefix="fcache-read")
        try:
            for group, positions in batches[start:]:
                fill = partial(fillers[group].fill, positions, _slot(ring, fillers[group].records.group.path))
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

    def _batches(self, epoch: int) -> tuple[list[GroupFiller], list[tuple[int, np.ndarray]]]:
        config, fillers = self._config, self._fillers
        if not config.all_views and self._info.role == "training":
            view = self._views[epoch % len(self._views)]
            fillers = [replace(f, records=_only_view(f.records, view)) for f in fillers]
        return fillers, epoch_batches(
            [len(f.records.records) for f in fillers],
            batch_size=config.batch_size,
            shuffle=config.order == "shuffled",
            drop_last=config.drop_last,
            key=(config.seed, epoch),
            world=config.world,
        )


def _slot(ring: _Ring, group: str) -> Buffers:
    """The buffers that are used next; they fit one group only."""
    path, buffers = ring.popleft()
    ring.append((group, buffers if path == group else {}))
    return ring[-1][1]


def _finish(future: Future[Block[np.ndarray]], fill: Fill) -> Block[np.ndarray]:
    """The block of `future`; one that no thread has begun is filled here, for the caller would only wait for it."""
    return fill() if future.cancel() else future.result()


def open_source(reader: CacheReader, split: str, config: StreamConfig) -> CacheSource:
    """A block source over a split. Raises IncompleteError or SpecError if something asked for is not there."""
    return CacheSource(reader, split, config)


def _choose_levels(group: Group, names: tuple[str, ...] | None) -> tuple[LevelSpec, ...]:
    by_name = {level.name: level for level in group.levels}
    for name in names or ():
        if name not in by_name:
            raise unknown_name("level", name, by_name)
    return group.levels if names is None else tuple(by_name[n] for n in names)


def _keep_subset(records: GroupRecords, config: StreamConfig) -> GroupRecords:
    if config.subset >= 1.0:
        return records
    kept = set(subset_ids(records.group.ids, config.subset))
    mask = np.asarray([records.group.ids[s] in kept for s in records.samples])
    return GroupRecords(records.group, records.records[mask], records.views[mask], records.samples[mask])


def _only_view(records: GroupRecords, view: int) -> GroupRecords:
    mask = records.views == view
    return GroupRecords(records.group, records.records[mask], records.views[mask], records.samples[mask])
