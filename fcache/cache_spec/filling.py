"""Blocks of one group, filled from the cache's files into buffers that are used again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fcache.cache_spec.access import ArrayAccess
from fcache.cache_spec.block import Block, CodedLevel
from fcache.cache_spec.encodings import find_encoding
from fcache.cache_spec.errors import CorruptError
from fcache.cache_spec.layout import FEATURES
from fcache.cache_spec.reader import CacheReader, GroupRecords, check_count
from fcache.cache_spec.spec import LevelSpec
from fcache.cache_spec.view import View

Allocate = Callable[[tuple[int, ...], np.dtype[Any]], np.ndarray]
Buffers = dict[str, np.ndarray]


@dataclass(frozen=True)
class GroupFiller:
    """Fills blocks of at most `batch_size` records of one group; make one with `group_filler`.

    Arrays are looked up once: a batch is filled in some milliseconds, in which looking up would show.
    """

    records: GroupRecords
    levels: tuple[tuple[LevelSpec, Mapping[str, ArrayAccess]], ...]
    index: Mapping[str, ArrayAccess]
    targets: Mapping[str, tuple[ArrayAccess, ArrayAccess | None]]
    batch_size: int
    allocate: Allocate

    def fill(self, positions: np.ndarray, buffers: Buffers) -> Block[np.ndarray]:
        """The block of the records at `positions` (of `records`), in that order, in `buffers`."""
        group, numbers = self.records.group, self.records.records[positions].tolist()

        def read(name: str, access: ArrayAccess) -> np.ndarray:
            if name not in buffers:
                buffers[name] = self.allocate((self.batch_size, *access.spec.shape), access.dtype)
            out = buffers[name][: len(numbers)]
            access.read_into(numbers, out)
            return out

        levels = {
            level.name: CodedLevel(
                level, group.encoding, {suffix: read(level.name + suffix, a) for suffix, a in parts.items()}, {}
            )
            for level, parts in self.levels
        }
        index = {name: read(name, access) for name, access in self.index.items()}
        targets: dict[str, np.ndarray | Sequence[np.ndarray]] = {}
        for name, (access, counts) in self.targets.items():
            values = read(f"targets/{name}", access)
            if counts is None:
                targets[name] = values
                continue
            used = zip(values, read(f"targets/{name}.count", counts), numbers, strict=True)
            targets[name] = [v[: check_count(n, access.spec, number)] for v, n, number in used]
        samples, views = self.records.samples[positions].tolist(), self.records.views[positions].tolist()
        self._check("index/sample", index["index/sample"].tolist(), samples)
        self._check("index/view", index["index/view"].tolist(), views)
        return Block(
            ids=tuple(group.ids[i] for i in samples),
            views=_views(group.canvas, index),
            view_indices=tuple(views),
            levels=levels,
            targets=targets,
        )

    def _check(self, name: str, found: list[int], expected: list[int]) -> None:
        """Raises CorruptError if the stored index says something else than the manifest: targets would not belong."""
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
        index={a.path: reader.access(group, FEATURES, a.path) for a in group.index_arrays()},
        targets=targets,
        batch_size=batch_size,
        allocate=allocate,
    )


def _views(canvas: tuple[int, int], index: Mapping[str, np.ndarray]) -> tuple[View, ...]:
    """The views of some records from their index arrays."""
    matrices = index["index/to_view"].reshape(-1, 6).tolist()
    frames = index["index/frames"].tolist() if "index/frames" in index else [()] * len(matrices)
    rows = zip(matrices, index["index/valid_size"].tolist(), index["index/image_size"].tolist(), frames, strict=True)
    return tuple(View(tuple(m), canvas, tuple(valid), tuple(size), tuple(numbers)) for m, valid, size, numbers in rows)
