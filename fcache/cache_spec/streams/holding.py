"""Splits held in RAM: the coded arrays of a source, read once, from which its blocks are filled afterwards."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np

from fcache.cache_spec.block import Block, CodedLevel
from fcache.cache_spec.reader import GroupRecords
from fcache.cache_spec.streams.filling import Allocate, Buffers, Frame, GroupFiller, buffer
from fcache.cache_spec.streams.source import CacheSource

W = TypeVar("W")
# (the array until now or None, its name, a part of it, where that begins, how long the whole is) -> the array with it.
Put = Callable[["W | None", str, np.ndarray, int, int], W]


@dataclass(frozen=True)
class Ragged(Generic[W]):
    """Ragged entries of all records one after another, and where each record's begin: int64 [N + 1]."""

    entries: W
    starts: np.ndarray

    def of(self, rows: np.ndarray) -> list[Any]:
        """The entries of each of some rows."""
        spans = zip(self.starts[rows].tolist(), self.starts[rows + 1].tolist(), strict=True)
        entries: Any = self.entries
        return [entries[a:b] for a, b in spans]


@dataclass(frozen=True)
class HeldGroup(Generic[W]):
    """All records of a group in row order: levels with parts [N, …], targets [N, …] or ragged."""

    levels: Mapping[str, CodedLevel[W]]
    targets: Mapping[str, "W | Ragged[W]"]


@dataclass(frozen=True)
class HeldFiller:
    """Fills the blocks of `filler` from memory."""

    filler: GroupFiller
    held: HeldGroup[np.ndarray]

    @property
    def records(self) -> GroupRecords:
        """The records that rows number."""
        return self.filler.records

    def fill(self, rows: np.ndarray, buffers: Buffers) -> Block[np.ndarray]:
        """The block of some rows, in that order, in `buffers`."""
        filler = self.filler

        def taken(name: str, whole: np.ndarray, allocate: Allocate = filler.allocate) -> np.ndarray:
            out = buffer(buffers, name, (filler.batch_size, *whole.shape[1:]), whole.dtype, allocate)[: len(rows)]
            # Rows are there; checking them would cost numpy a copy of `out`.
            return np.take(whole, rows, axis=0, out=out, mode="clip")

        levels = {}
        for level, _ in filler.levels:
            parts, of = self.held.levels[level.name].parts, rows
            if not filler.decodes:
                parts, of = {suffix: taken(level.name + suffix, whole) for suffix, whole in parts.items()}, None
            levels[level.name] = filler.level(level, parts, of, len(rows), buffers)
        targets: dict[str, np.ndarray | Sequence[np.ndarray]] = {}
        for path, values in self.held.targets.items():
            targets[path] = values.of(rows) if isinstance(values, Ragged) else taken(f"targets/{path}", values)
        return Block(*filler.frame(rows), levels, targets)

    def frame(self, rows: np.ndarray) -> Frame:
        """Ids, views and view indices of some rows."""
        return self.filler.frame(rows)

    def num_bytes(self) -> int:
        """Bytes of all records in memory."""
        return self.filler.num_bytes()

    def coded(self) -> "HeldFiller":
        """The same without decoding."""
        return replace(self, filler=self.filler.coded())


def hold(source: CacheSource) -> CacheSource:
    """The same source with all that it reads of levels and targets in RAM, coded as it is stored."""
    coded = source.coded()
    held = [read_group(coded, number, _put) for number in range(len(source.records))]
    pairs = zip(source.fillers, held, strict=True)
    return source.with_fillers([HeldFiller(f, g) if isinstance(f, GroupFiller) else f for f, g in pairs])


def read_group(source: CacheSource, number: int, put: Put[W]) -> HeldGroup[W]:
    """All records of a group of a source, in the order of its `records`, gathered by `put`."""
    count, step = len(source.records[number].records), source.config.batch_size
    levels: dict[str, CodedLevel[W]] = {}
    targets: dict[str, W] = {}
    ragged: dict[str, list[tuple[np.ndarray, list[int]]]] = {}
    batches = [(number, np.arange(i, min(i + step, count))) for i in range(0, count, step)]
    for (_, rows), block in zip(batches, source.read(batches), strict=True):
        at = int(rows[0])
        for name, coded in block.levels.items():
            old = levels[name].parts if name in levels else {}
            parts = {k: put(old.get(k), name + k, part, at, count) for k, part in coded.parts.items()}
            tables: Mapping[str, Any] = coded.tables
            levels[name] = CodedLevel(coded.level, coded.encoding, parts, tables)
        for path, values in block.targets.items():
            if isinstance(values, np.ndarray):
                targets[path] = put(targets.get(path), path, values, at, count)
            else:
                ragged.setdefault(path, []).append((np.concatenate(values), [len(v) for v in values]))
    flat: dict[str, Ragged[W]] = {}
    for path, found in ragged.items():
        entries = np.concatenate([entries for entries, _ in found])
        starts = np.cumsum([0, *(n for _, lengths in found for n in lengths)], dtype=np.int64)
        flat[path] = Ragged(put(None, path, entries, 0, len(entries)), starts)
    return HeldGroup(levels, {**targets, **flat})


def _put(whole: np.ndarray | None, name: str, part: np.ndarray, at: int, count: int) -> np.ndarray:
    if whole is None:
        whole = np.empty((count, *part.shape[1:]), part.dtype)
    whole[at : at + len(part)] = part
    return whole
