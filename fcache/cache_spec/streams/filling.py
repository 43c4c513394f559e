"""Blocks of one group, filled from the cache's files into buffers that are used again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from fcache.cache_spec.block import Block, CodedLevel
from fcache.cache_spec.encodings import find_encoding
from fcache.cache_spec.errors import CorruptError, SpecError
from fcache.cache_spec.layout import FEATURES
from fcache.cache_spec.reader import CacheReader, GroupRecords, check_count
from fcache.cache_spec.reading.access import ArrayAccess, read_arrays
from fcache.cache_spec.spec import LevelSpec
from fcache.cache_spec.view import View

Allocate = Callable[[tuple[int, ...], np.dtype[Any]], np.ndarray]
Buffers = dict[str, np.ndarray]
Frame = tuple[tuple[str, ...], tuple[View, ...], tuple[int, ...]]
# Pixels of an image: more than most decoders take, and fewer than a map of labels that fills the memory.
LARGEST_IMAGE = 1 << 30


class Filler(Protocol):
    """What makes the blocks of a group; several threads may fill at the same time."""

    @property
    def records(self) -> GroupRecords:
        """The records that rows number."""
        ...

    def fill(self, rows: np.ndarray, buffers: Buffers) -> Block[np.ndarray]:
        """The block of some rows, in that order, in `buffers`."""
        ...

    def frame(self, rows: np.ndarray) -> Frame:
        """Ids, views and view indices of some rows: what their block says without its arrays."""
        ...

    def num_bytes(self) -> int:
        """Bytes of all records in memory, coded: levels and targets, ragged ones at their true length."""
        ...

    def coded(self) -> "Filler":
        """The same without decoding."""
        ...


@dataclass(frozen=True)
class GroupFiller:
    """Fills blocks of at most `batch_size` records of one group; make one with `group_filler`.

    Arrays are looked up once: a batch is filled in some milliseconds, in which looking up would show. With `decode`,
    an encoding, blocks hold levels in that one.
    """

    records: GroupRecords
    levels: tuple[tuple[LevelSpec, Mapping[str, ArrayAccess]], ...]
    tables: Mapping[str, Mapping[str, np.ndarray]]
    index: Mapping[str, ArrayAccess]
    targets: Mapping[str, tuple[ArrayAccess, ArrayAccess | None]]
    batch_size: int
    decode: str | None
    allocate: Allocate

    def fill(self, rows: np.ndarray, buffers: Buffers) -> Block[np.ndarray]:
        """The block of the records at `rows` (of `records`), in that order, in `buffers`."""
        numbers = self.records.records[rows]
        jobs: list[tuple[ArrayAccess, np.ndarray, np.ndarray]] = []

        def wanted(name: str, access: ArrayAccess, allocate: Allocate = self.allocate) -> np.ndarray:
            out = buffer(buffers, name, (self.batch_size, *access.spec.shape), access.dtype, allocate)[: len(numbers)]
            jobs.append((access, numbers, out))
            return out

        # What is decoded here never crosses to a device, its buffers need not be those for that.
        allocate = np.empty if self.decodes else self.allocate
        coded = [
            (level, {suffix: wanted(level.name + suffix, a, allocate) for suffix, a in parts.items()})
            for level, parts in self.levels
        ]
        index = {name: wanted(name, access) for name, access in self.index.items()}
        values = {path: wanted(f"targets/{path}", access) for path, (access, _) in self.targets.items()}
        counts = {path: wanted(f"targets/{path}.count", c) for path, (_, c) in self.targets.items() if c is not None}
        read_arrays(jobs)
        ids, views, view_indices = self._frame(rows, index)
        targets: dict[str, np.ndarray | Sequence[np.ndarray]] = {**values}
        for path, found in counts.items():
            used = zip(values[path], found, numbers.tolist(), strict=True)
            targets[path] = [v[: check_count(n, self.targets[path][0].spec, number)] for v, n, number in used]
        levels = {level.name: self.level(level, parts, None, len(rows), buffers) for level, parts in coded}
        return Block(ids, views, view_indices, levels, targets)

    def frame(self, rows: np.ndarray) -> Frame:
        """Ids, views and view indices of the records at `rows`: what a block says without its arrays."""
        numbers = self.records.records[rows]
        index = {name: np.empty((len(numbers), *a.spec.shape), a.dtype) for name, a in self.index.items()}
        read_arrays([(access, numbers, index[name]) for name, access in self.index.items()])
        return self._frame(rows, index)

    def num_bytes(self) -> int:
        """Bytes of all records in memory, coded: levels and targets, ragged ones at their true length."""
        record = sum(a.spec.record_bytes for _, parts in self.levels for a in parts.values())
        numbers, total = self.records.records, 0
        for access, counts in self.targets.values():
            if counts is None:
                record += access.spec.record_bytes
                continue
            found = np.empty(len(numbers), counts.dtype)
            read_arrays([(counts, numbers, found)])
            total += int(found.sum(dtype=np.int64)) * (access.spec.record_bytes // access.spec.shape[0])
        return total + record * len(numbers)

    def coded(self) -> "GroupFiller":
        """The same without decoding."""
        return replace(self, decode=None)

    @property
    def decodes(self) -> bool:
        """Whether blocks hold levels otherwise than stored."""
        return self.decode not in (None, self.records.group.encoding)

    def level(
        self,
        level: LevelSpec,
        parts: Mapping[str, np.ndarray],
        rows: np.ndarray | None,
        count: int,
        buffers: Buffers,
    ) -> CodedLevel[np.ndarray]:
        """A level of a block of `count` records, decoded if this decodes, from `parts` (their `rows`, None: in order).

        Raises SpecError if a feature does not fit into what it is decoded to.
        """
        group, tables = self.records.group, self.tables.get(level.name, {})
        if not self.decodes:
            return CodedLevel(level, group.encoding, parts, tables)
        assert self.decode is not None
        decode, dtype = find_encoding(group.encoding).decode, np.dtype("f4" if self.decode == "fp32" else "f2")
        whole = buffer(buffers, f"{level.name} decoded", (self.batch_size, *level.shape), dtype, self.allocate)
        out = whole[:count]
        try:
            with np.errstate(over="raise"):
                # One record at a time: what it is made from and of stays in the core's own cache.
                for i, row in enumerate(range(count) if rows is None else rows.tolist()):
                    one = {suffix: x[row : row + 1] for suffix, x in parts.items()}
                    decode(one, level, tables, np, out=out[i : i + 1])
        except FloatingPointError:
            raise SpecError(
                f"{group.path}/{level.name} holds features that do not fit into {self.decode}; decode to fp32"
            ) from None
        return CodedLevel(level, self.decode, {"": out}, {})

    def _frame(self, rows: np.ndarray, index: Mapping[str, np.ndarray]) -> Frame:
        group = self.records.group
        samples, views = self.records.samples[rows].tolist(), self.records.views[rows].tolist()
        self._check("index/sample", index["index/sample"].tolist(), samples)
        self._check("index/view", index["index/view"].tolist(), views)
        return tuple(group.ids[i] for i in samples), _views(group.path, group.canvas, index), tuple(views)

    def _check(self, name: str, found: list[int], expected: list[int]) -> None:
        if found != expected:
            raise CorruptError(
                f"{self.records.group.path}/{name} is {found}, the manifest says {expected}; run `fcache verify --deep`"
            )


def group_filler(
    reader: CacheReader,
    records: GroupRecords,
    levels: tuple[LevelSpec, ...],
    kinds: Sequence[str],
    *,
    batch_size: int,
    decode: str | None,
    allocate: Allocate,
) -> GroupFiller:
    """A filler for these records, levels and kinds of target."""
    group = records.group
    parts = find_encoding(group.encoding).parts
    targets: dict[str, tuple[ArrayAccess, ArrayAccess | None]] = {}
    for kind in kinds:
        for a in group.target_arrays(kind):
            if not a.path.endswith(".count"):
                counts = reader.access(group, kind, f"targets/{a.path}.count") if a.ragged else None
                targets[a.path] = reader.access(group, kind, f"targets/{a.path}"), counts
    return GroupFiller(
        records=records,
        levels=tuple(
            (level, {p.suffix: reader.access(group, FEATURES, level.name + p.suffix) for p in parts(level)})
            for level in levels
        ),
        tables=reader.tables(group),
        index={a.path: reader.access(group, FEATURES, a.path) for a in group.index_arrays()},
        targets=targets,
        batch_size=batch_size,
        decode=decode,
        allocate=allocate,
    )


def buffer(buffers: Buffers, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], allocate: Allocate) -> np.ndarray:
    """The buffer of that name, allocated when it is first asked for."""
    if name not in buffers:
        buffers[name] = allocate(shape, dtype)
    return buffers[name]


def _views(group: str, canvas: tuple[int, int], index: Mapping[str, np.ndarray]) -> tuple[View, ...]:
    """The views of some records from their index arrays. Raises CorruptError for sizes that no image has."""
    matrices, images = index["index/to_view"].reshape(-1, 6), index["index/image_size"]
    valid = index["index/valid_size"]
    fits = ((valid >= 1) & (valid <= canvas)).all() and (images >= 1).all() and np.isfinite(matrices).all()
    if not fits or images.prod(axis=1, dtype=np.int64).max() > LARGEST_IMAGE:
        raise CorruptError(
            f"{group}/index holds what cannot be: valid sizes {valid.tolist()} of the canvas {canvas}, image sizes "
            f"{images.tolist()}, matrices {matrices.tolist()}; run `fcache verify --deep`"
        )
    frames = index["index/frames"].tolist() if "index/frames" in index else [()] * len(matrices)
    rows = zip(matrices.tolist(), valid.tolist(), images.tolist(), frames, strict=True)
    return tuple(View(tuple(m), canvas, tuple(size), tuple(image), tuple(numbers)) for m, size, image, numbers in rows)
