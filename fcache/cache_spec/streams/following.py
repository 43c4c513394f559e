"""A split that is still being extracted as a block source: an epoch reads what was committed when it began."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fcache.cache_spec.block import Block, SourceInfo
from fcache.cache_spec.errors import IncompatibleError, IncompleteError, SpecError
from fcache.cache_spec.identity import digest
from fcache.cache_spec.layout import FEATURES
from fcache.cache_spec.reader import CacheReader
from fcache.cache_spec.streams.source import CacheSource, StreamConfig, choose_levels, chosen_extent

Shards = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class CommittedSet:
    """What the epochs from `epoch` on read, until the next set: shards by group path, the number of samples in them
    that are streamed, and the digest of what the shards hold (that of `SourceInfo.extent`).
    """

    epoch: int
    shards: Shards
    samples: int
    committed: str


class FollowingSource:
    """A `BlockSource` that grows; make one with `follow_source`.

    `take` fixes what an epoch reads, before its blocks are asked for. Blocks and their order are those of a
    `CacheSource` over these shards. `info.extent` says what does not change, `extent` all that was taken.
    """

    def __init__(self, reader: CacheReader, split: str, config: StreamConfig) -> None:
        self._reader, self._split, self._config = reader, split, config
        groups = reader.manifest.split(split)
        self._all: Shards = {g.path: tuple(s.index for s in g.shards()) for g in groups}
        info = reader.info(split, kinds=config.kinds, levels=choose_levels(groups[0], config.levels))
        self._stable = {k: v for k, v in info.extent.items() if k not in ("shards", "committed")}
        self._stable |= chosen_extent(config, info)
        self._info = replace(info, extent={**self._stable, "follow": True})
        self._sets: list[CommittedSet] = []
        # The number of epochs, from 0 on, whose set is fixed.
        self._fixed = 0
        self._open: tuple[Shards, CacheSource] | None = None

    @property
    def info(self) -> SourceInfo:
        """Identity, levels, targets, and of the extent what does not change while the split grows."""
        return self._info

    @property
    def extent(self) -> dict[str, Any]:
        """What a run records, as JSON data: the sets of its epochs; that of a `CacheSource` if all read all shards."""
        if len(self._sets) == 1 and self._sets[0].shards == self._all:
            counts = {path: len(indices) for path, indices in self._all.items()}
            return {**self._stable, "shards": counts, "committed": self._sets[0].committed}
        return {**self._stable, "epochs": [_as_data(s) for s in self._sets]}

    def take(self, epoch: int) -> bool:
        """Fixes what an epoch reads: if that is not fixed yet, all that is committed now.

        False if there is nothing yet; of an evaluation split, if it is not complete: scores on a part of it could be
        compared with none. Epochs are taken in order; one that was taken stays as it is.
        """
        if epoch < self._fixed:
            return True
        if not self._complete:
            self._reader.refresh()
            shards = self._committed()
            if not any(shards.values()) or (self._info.role != "training" and shards != self._all):
                return False
            if not self._sets or self._sets[-1].shards != shards:
                try:
                    source = self._opened(shards)
                except IncompleteError:
                    # Every sample in it is quarantined, or not of the subset; in a complete split none will come.
                    if shards == self._all:
                        raise
                    return False
                samples = sum(len(np.unique(g.samples)) for g in source.records)
                self._sets.append(CommittedSet(epoch, shards, samples, self._digest(shards)))
        self._fixed = sys.maxsize if self._complete else epoch + 1
        return True

    def steady(self, epoch: int) -> int | None:
        """How many epochs may be read in one go from one that was taken on: one, or all that follow (None), once
        nothing more will come.
        """
        return None if self._fixed == sys.maxsize and epoch >= self._sets[-1].epoch else 1

    def restore(self, extent: Mapping[str, Any], *, epochs: int | None) -> None:
        """Fixes the sets of the first `epochs` epochs (None: of all) as an `extent` recorded them.

        Raises IncompatibleError if these shards are not there, or hold something else, or an epoch is fixed
        differently already.
        """
        fixed = sys.maxsize if epochs is None else epochs
        if "epochs" in extent:
            sets = [_from_data(data) for data in extent["epochs"]]
        else:
            sets = [CommittedSet(0, self._all, extent["samples"], extent["committed"])]
        sets = [s for s in sets if s.epoch < fixed]
        common = min(fixed, self._fixed)
        ours, theirs = ([(s.epoch, s.committed) for s in found if s.epoch < common] for found in (self._sets, sets))
        if ours != theirs:
            raise IncompatibleError(
                "these heads were trained on different committed sets of one split; resume them apart"
            )
        if fixed <= self._fixed:
            return
        for s in sets:
            there = self._committed()
            if (
                any(set(s.shards[path]) - set(there.get(path, ())) for path in s.shards)
                or self._digest(s.shards) != s.committed
            ):
                raise IncompatibleError(
                    f"{self._reader.url}: shards that training read from epoch {s.epoch} on are gone or hold something "
                    "else now; train again with another --out"
                )
        self._sets, self._fixed = sets, fixed

    def num_blocks(self, epoch: int) -> int:
        """Blocks in an epoch that was taken."""
        return self._of(epoch).num_blocks(epoch)

    def blocks(self, epoch: int, *, start: int = 0, epochs: int | None = 1) -> Iterator[Block[np.ndarray]]:
        """The blocks of an epoch that was taken; of more of them, or without end, as far as it is `steady`."""
        steady = self.steady(epoch)
        if steady is not None and (epochs is None or epochs > steady):
            raise SpecError(f"what split {self._split!r} has after epoch {epoch} is not known yet; read one by one")
        return self._of(epoch).blocks(epoch, start=start, epochs=epochs)

    @property
    def _complete(self) -> bool:
        return bool(self._sets) and self._sets[-1].shards == self._all

    def _of(self, epoch: int) -> CacheSource:
        if epoch >= self._fixed:
            raise SpecError(f"epoch {epoch} of split {self._split!r} has no committed set yet; take it first")
        return self._opened(next(s for s in reversed(self._sets) if s.epoch <= epoch).shards)

    def _opened(self, shards: Shards) -> CacheSource:
        """The source over these shards; it goes on with the buffers of the one before."""
        if self._open is None or self._open[0] != shards:
            source = CacheSource(self._reader, self._split, self._config, shards=shards)
            if self._open is not None:
                source.take_buffers(self._open[1])
            self._open = shards, source
        return self._open[1]

    def _committed(self) -> Shards:
        reader, parts = self._reader, (FEATURES, *self._config.kinds)
        groups = reader.manifest.split(self._split)
        return {g.path: tuple(sorted(set.intersection(*(set(reader.committed(g, p)) for p in parts)))) for g in groups}

    def _digest(self, shards: Shards) -> str:
        reader = self._reader
        found = {path: reader.committed(reader.manifest.group(path), FEATURES) for path in shards}
        there = {path: set(committed) for path, committed in found.items()}
        contents = [found[path].content(i) for path, indices in shards.items() for i in indices if i in there[path]]
        return digest([{path: list(indices) for path, indices in shards.items()}, contents])


def follow_source(reader: CacheReader, split: str, config: StreamConfig) -> FollowingSource:
    """A source over a split that may still grow. Raises SpecError for a reader that was opened for whole splits."""
    if not reader.allow_partial:
        raise SpecError(f"{reader.url}: a split that grows is read with a cache opened with allow_partial=True")
    return FollowingSource(reader, split, config)


def _as_data(found: CommittedSet) -> dict[str, Any]:
    shards = {path: _runs(indices) for path, indices in found.shards.items()}
    return {"epoch": found.epoch, "samples": found.samples, "shards": shards, "committed": found.committed}


def _from_data(data: Mapping[str, Any]) -> CommittedSet:
    shards = {path: tuple(i for a, b in runs for i in range(a, b)) for path, runs in data["shards"].items()}
    return CommittedSet(data["epoch"], shards, data["samples"], data["committed"])


def _runs(indices: tuple[int, ...]) -> list[list[int]]:
    """Sorted numbers as runs [first, end)."""
    ends = np.flatnonzero(np.diff(indices) != 1) + 1
    return [[int(run[0]), int(run[-1]) + 1] for run in np.split(np.asarray(indices, dtype=np.int64), ends) if len(run)]
