"""The cache as a block source: shuffled batches copied by a few threads into reused buffers."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from fcache.cache_spec.access import ArrayAccess
from fcache.cache_spec.block import Block, CodedLevel, SourceInfo
from fcache.cache_spec.encodings import find_encoding
from fcache.cache_spec.errors import CorruptError, SpecError, unknown_name
from fcache.cache_spec.layout import FEATURES, Group
from fcache.cache_spec.order import epoch_batches, subset_ids
from fcache.cache_spec.reader import CacheReader, GroupRecords, check_count
from fcache.cache_spec.spec import LevelSpec
from fcache.cache_spec.view import View

Allocate = Callable[[tuple[int, ...], np.dtype[Any]], np.ndarray]
Buffers = dict[str, np.ndarray]
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
        self._reader, self._config = reader, config
        self._groups = [_keep_subset(g, config) for g in reader.records(split, config.kinds)]
        self._groups = [g for g in self._groups if len(g.records)]
        self._levels = [_choose_levels(g.group, config.levels) for g in self._groups]
        self._views = sorted({int(v) for g in self._groups for v in np.unique(g.views)})
        info = reader.info(split, kinds=config.kinds, levels=self._levels[0])
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
        groups, batches = self._batches(epoch)
        threads = self._config.threads
        # Epochs after each other use the same buffers; iterations at the same time have their own.
        kept, self._ring = self._ring, None
        ring: _Ring = kept or deque(("", {}) for _ in range(threads + 2))
        waiting: deque[tuple[Future[Block[np.ndarray]], Fill]] = deque()
        pool = ThreadPoolExecutor(threads, thread_name_prefix="fcache-read")
        try:
            for group, positions in batches[start:]:
                slot = self._slot(ring, groups[group])
                fill = partial(self._fill, groups[group], self._levels[group], positions, slot)
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

    def _batches(self, epoch: int) -> tuple[list[GroupRecords], list[tuple[int, np.ndarray]]]:
        config, groups = self._config, self._groups
        if not config.all_views and self._info.role == "training":
            view = self._views[epoch % len(self._views)]
            groups = [_only_view(g, view) for g in groups]
        return groups, epoch_batches(
            [len(g.records) for g in groups],
            batch_size=config.batch_size,
            shuffle=config.order == "shuffled",
            drop_last=config.drop_last,
            key=(config.seed, epoch),
            world=config.world,
        )

    def _slot(self, ring: _Ring, records: GroupRecords) -> Buffers:
        path, buffers = ring.popleft()
        if path != records.group.path:
            buffers = {}
        ring.append((records.group.path, buffers))
        return buffers

    def _fill(
        self, records: GroupRecords, levels: tuple[LevelSpec, ...], positions: np.ndarray, buffers: Buffers
    ) -> Block[np.ndarray]:
        group, numbers = records.group, [int(r) for r in records.records[positions]]
        read = _Copier(self._reader, group, numbers, buffers, self._config.batch_size, self._config.allocate)
        encoding = find_encoding(group.encoding)
        coded = {}
        for level in levels:
            parts = {p.suffix: read(FEATURES, level.name + p.suffix) for p in encoding.parts(level)}
            coded[level.name] = CodedLevel(level, group.encoding, parts, {})
        index = {a.path: read(FEATURES, a.path) for a in group.index_arrays()}
        targets = {
            a.path: read.target(kind, a.path, a.ragged)
            for kind in self._config.kinds
            for a in group.target_arrays(kind)
            if not a.path.endswith(".count")
        }
        _check_index(records, positions, index)
        return Block(
            ids=tuple(group.ids[i] for i in index["index/sample"]),
            views=_views(group, index),
            view_indices=tuple(int(v) for v in index["index/view"]),
            levels=coded,
            targets=targets,
        )


def _finish(future: Future[Block[np.ndarray]], fill: Fill) -> Block[np.ndarray]:
    """The block of `future`; one that no thread has begun is filled here, for the caller would only wait for it."""
    return fill() if future.cancel() else future.result()


@dataclass(frozen=True)
class _Copier:
    """Copies the given records of one group, array by array, into named buffers."""

    reader: CacheReader
    group: Group
    records: Sequence[int]
    buffers: Buffers
    batch_size: int
    allocate: Allocate

    def __call__(self, part: str, path: str) -> np.ndarray:
        access: ArrayAccess = self.reader.access(self.group, part, path)
        if path not in self.buffers:
            self.buffers[path] = self.allocate((self.batch_size, *access.spec.shape), access.dtype)
        out = self.buffers[path][: len(self.records)]
        access.read_into(self.records, out)
        return out

    def target(self, kind: str, path: str, ragged: bool) -> np.ndarray | list[np.ndarray]:
        values = self(kind, f"targets/{path}")
        if not ragged:
            return values
        spec = self.reader.access(self.group, kind, f"targets/{path}").spec
        counts = zip(self.records, self(kind, f"targets/{path}.count"), strict=True)
        return [v[: check_count(n, spec, record)] for v, (record, n) in zip(values, counts, strict=True)]


def open_source(reader: CacheReader, split: str, config: StreamConfig) -> CacheSource:
    """A block source over a split. Raises IncompleteError or SpecError if something asked for is not there."""
    return CacheSource(reader, split, config)


def _check_index(records: GroupRecords, positions: np.ndarray, index: Mapping[str, np.ndarray]) -> None:
    """Raises CorruptError if the stored index says something else than the manifest: targets would not belong."""
    for path, expected in (("index/sample", records.samples[positions]), ("index/view", records.views[positions])):
        if not np.array_equal(index[path], expected):
            raise CorruptError(
                f"{records.group.path}/{path} is {index[path].tolist()}, the manifest says {expected.tolist()}; "
                "run `fcache verify --deep`"
            )


def _views(group: Group, index: Mapping[str, np.ndarray]) -> tuple[View, ...]:
    """The views of some records from their index arrays."""
    frames = index.get("index/frames", np.empty((len(index["index/sample"]), 0), dtype=np.int32))
    rows = zip(index["index/to_view"], index["index/valid_size"], index["index/image_size"], frames, strict=True)
    return tuple(
        View(
            to_view=tuple(matrix.reshape(-1).tolist()),
            canvas=group.canvas,
            valid=(int(valid[0]), int(valid[1])),
            image_size=(int(size[0]), int(size[1])),
            frames=tuple(numbers.tolist()),
        )
        for matrix, valid, size, numbers in rows
    )


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
