"""The manifest of a cache: groups of records, their arrays, shards and extents. It may grow, identity may not."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fcache.cache_spec.arrays import ArraySpec, with_counts
from fcache.cache_spec.encodings import find_encoding
from fcache.cache_spec.errors import IncompatibleError, SpecError
from fcache.cache_spec.names import Names
from fcache.cache_spec.spec import ROLES, FeatureSpec, LevelSpec, TargetSpec
from fcache.cache_spec.targets import target_arrays

FORMAT = 2
FEATURES = "features"
SHARD_BYTES = 256_000_000
# Record numbers are int32.
MOST_RECORDS = 2**31 - 1
# Numbers of a record, or bytes of a ragged target: what no memory holds is no size.
LARGEST_RECORD = 2**36
RESERVED = frozenset({"commits", "manifest", "claims", "partial", "lock", "tables"})
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

INDEX_ARRAYS = (
    ArraySpec("index/sample", "int32", (), fill=-1, layout="table"),
    ArraySpec("index/view", "int32", (), fill=-1, layout="table"),
    ArraySpec("index/to_view", "float64", (2, 3), fill=float("nan"), layout="table"),
    ArraySpec("index/valid_size", "int32", (2,), fill=-1, layout="table"),
    ArraySpec("index/image_size", "int32", (2,), fill=-1, layout="table"),
)


@dataclass(frozen=True)
class Extent:
    """A run of records: record `first + i` is view `view` of the group's sample `sample + i`, for i < `count`."""

    first: int
    view: int
    sample: int
    count: int


@dataclass(frozen=True)
class Shard:
    """The unit of work, writing, retry and commit: records [first, first + count) of one group, of one view."""

    group: str
    index: int
    first: int
    count: int
    view: int
    sample: int


@dataclass(frozen=True)
class Group:
    """Records of one canvas size: a training split, or one size bucket of an evaluation split.

    `path` is "train" or "val/512x704"; `canvas` the padded input (height, width); `levels` have true sizes;
    `shard_records`, `batch` (the extraction's), `compression` and `limits` of ragged targets never change;
    `ids`, `digests` (of the samples), `views` and `extents` may grow at the end.
    """

    path: str
    split: str
    role: str
    canvas: tuple[int, int]
    levels: tuple[LevelSpec, ...]
    encoding: str
    shard_records: int
    batch: int
    ids: Names
    digests: Names
    views: int
    extents: tuple[Extent, ...]
    compression: str = "none"
    limits: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Callers may give any sequence of strings; names of a file were unique when it was written.
        given = not isinstance(self.ids, Names)  # pyright: ignore[reportUnnecessaryIsInstance]
        object.__setattr__(self, "ids", Names.of(self.ids))
        object.__setattr__(self, "digests", Names.of(self.digests))
        if self.role not in ROLES or not len(self.ids):
            raise SpecError(f"group {self.path!r}: a role of {ROLES} and sample ids are expected")
        counts = (self.shard_records, self.batch, self.views)
        if len(self.ids) != len(self.digests) or min(counts) < 1 or max(counts) > MOST_RECORDS:
            raise SpecError(f"group {self.path!r}: one digest an id, positive shard size, batch and views are expected")
        if small := {name: n for name, n in self.limits.items() if n < 1}:
            raise SpecError(f"group {self.path!r}: limits of ragged targets are at least 1, got {small}")
        names = self.path.split("/")
        if not all(NAME.fullmatch(n) for n in names) or names[0] in RESERVED:
            raise SpecError(
                f"a split or group is named with letters, digits, '.', '_' and '-', and not "
                f"{', '.join(sorted(RESERVED))}; got {self.path!r}"
            )
        if given:
            check_unique(self)
        for what, sizes in {"canvas": self.canvas, **{x.name: x.shape for x in self.levels}}.items():
            if min(sizes) < 1 or math.prod(sizes) > LARGEST_RECORD:
                raise SpecError(f"group {self.path!r}: {what} has sizes from 1 to {LARGEST_RECORD} in all, got {sizes}")
        if large := {name: n for name, n in self.limits.items() if n > LARGEST_RECORD}:
            raise SpecError(f"group {self.path!r}: limits of ragged targets are at most {LARGEST_RECORD}, got {large}")
        self._check_extents()
        levels = [level.name for level in self.levels]
        if bad := [n for n in levels if not NAME.fullmatch(n) or n in ("index", "targets") or levels.count(n) > 1]:
            raise SpecError(f"group {self.path!r}: levels have unique plain names, got {bad}")

    def _check_extents(self) -> None:
        """Raises SpecError unless every extent is one of existing samples and views, on shards of its own."""
        end = 0
        for e in self.extents:
            samples = 0 <= e.sample < e.sample + e.count <= len(self.ids)
            if not samples or not 0 <= e.view < self.views or e.first != _next_shard(end, self.shard_records):
                raise SpecError(
                    f"group {self.path!r}: an extent holds views of the {len(self.ids)} samples and begins at the next "
                    f"shard, got {e} behind record {end}"
                )
            end = e.first + e.count
        if end > MOST_RECORDS:
            raise SpecError(f"group {self.path!r}: at most {MOST_RECORDS} records lie in a group, got {end}")

    @property
    def num_shards(self) -> int:
        """Shards of the group, committed or not."""
        last = self.extents[-1]
        return math.ceil((last.first + last.count) / self.shard_records)

    @property
    def num_records(self) -> int:
        """Length of axis 0 of every array: the shards are a regular grid."""
        return self.num_shards * self.shard_records

    def shards(self) -> Iterator[Shard]:
        """All shards in order; every extent starts at a shard's first record."""
        for e in self.extents:
            for start in range(0, e.count, self.shard_records):
                count = min(self.shard_records, e.count - start)
                first = e.first + start
                yield Shard(self.path, first // self.shard_records, first, count, e.view, e.sample + start)

    def feature_arrays(self) -> tuple[ArraySpec, ...]:
        """The arrays of the features part: levels in their encoding, and the index."""
        encoding, arrays = find_encoding(self.encoding), []
        for level in self.levels:
            for part in encoding.parts(level):
                attributes: dict[str, Any] = {}
                if part.suffix == "":
                    attributes = {"dims": level.dims, "stride": level.stride, "encoding": self.encoding}
                    if self.encoding == "bf16":
                        attributes["fcache_dtype"] = "bfloat16"
                # Some codes are made to be compressed, whatever the layout of the others.
                compression = (part.compression or self.compression) if part.layout == "sharded" else "none"
                arrays.append(
                    ArraySpec(
                        level.name + part.suffix, part.dtype, part.shape, part.fill, part.layout, compression,
                        attributes=attributes,
                    )
                )  # fmt: skip
        return (*arrays, *self.index_arrays())

    def index_arrays(self) -> tuple[ArraySpec, ...]:
        """The arrays that say what each record is; clips add the numbers of their frames."""
        frames = [level.shape[level.dims.split().index("T")] for level in self.levels if "T" in level.dims.split()]
        if not frames:
            return INDEX_ARRAYS
        return (*INDEX_ARRAYS, ArraySpec("index/frames", "int32", (max(frames),), fill=-1, layout="table"))

    def target_arrays(self, kind: str) -> tuple[ArraySpec, ...]:
        """The arrays of one kind of target with their count arrays; on disk they lie under `targets/`."""
        return with_counts(target_arrays(kind, limits=self.limits, canvas=self.canvas, role=self.role))


@dataclass(frozen=True)
class Manifest:
    """Everything that the root of a cache says: identity, targets, groups and hints.

    `random_weights` stamps a random backbone ("random:0"). `hints` (paths of data and weights, the command) help a
    user and decide nothing.
    """

    features: FeatureSpec
    targets: tuple[TargetSpec, ...]
    groups: tuple[Group, ...]
    random_weights: str | None = None
    hints: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        paths = [g.path for g in self.groups]
        for path in paths:
            if inside := [p for p in paths if p.startswith(f"{path}/")]:
                raise SpecError(f"group {inside[0]!r} lies inside group {path!r}; name one of them differently")

    def group(self, path: str) -> Group:
        """The group at `path`. Raises SpecError if there is none."""
        for g in self.groups:
            if g.path == path:
                return g
        raise SpecError(f"no record group {path!r} in this cache, it has {[g.path for g in self.groups]}")

    def split(self, name: str) -> tuple[Group, ...]:
        """The groups of a split. Raises SpecError if the cache lacks it."""
        if found := tuple(g for g in self.groups if g.split == name):
            return found
        splits = sorted({g.split for g in self.groups})
        raise SpecError(f"no split {name!r} in this cache, it has {', '.join(splits)}; extract it with --split {name}")

    def target(self, kind: str) -> TargetSpec:
        """The spec of one kind of target. Raises SpecError if the cache has none."""
        for t in self.targets:
            if t.kind == kind:
                return t
        raise SpecError(f"targets of kind {kind!r} are needed, this cache has {[t.kind for t in self.targets]}")

    def parts(self) -> tuple[str, ...]:
        """What commits apart: the features and each kind of target."""
        return (FEATURES, *(t.kind for t in self.targets))

    def part_key(self, part: str) -> str:
        """The digest that a commit of this part must carry."""
        return self.features.key if part == FEATURES else self.target(part).key


def part_arrays(group: Group, part: str) -> dict[str, ArraySpec]:
    """The arrays of a part by the path on disk, relative to the group."""
    if part == FEATURES:
        return {a.path: a for a in group.feature_arrays()}
    return {f"targets/{a.path}": a for a in group.target_arrays(part)}


def record_bytes(levels: tuple[LevelSpec, ...], encoding: str) -> int:
    """Stored bytes of the features of one record; what is made to be compressed counts half a byte a value at most."""
    found = 0
    for level in levels:
        for part in find_encoding(encoding).parts(level):
            size = ArraySpec(part.suffix, part.dtype, part.shape).record_bytes
            found += size if part.compression is None else min(size, (math.prod(level.shape) + 1) // 2)
    return found


def choose_shard_records(num_samples: int, bytes_per_record: int) -> int:
    """Records of a shard: at most 64, at most 256 MB of levels, at most a sixteenth of the samples, at least 1."""
    return max(1, min(64, SHARD_BYTES // max(1, bytes_per_record), math.ceil(num_samples / 16)))


def new_group(group: Group) -> Group:
    """`group` with the extents of its samples and views, laid out from record 0.

    Raises SpecError if two samples have one id.
    """
    check_unique(group)
    return replace(group, extents=_append((), group, range(group.views), 0, len(group.ids)))


def check_unique(group: Group) -> None:
    """Raises SpecError if two samples of a group have one id."""
    if len(set(group.ids)) != len(group.ids):
        twice = next(name for name, n in Counter(group.ids).items() if n > 1)
        raise SpecError(f"group {group.path!r}: sample ids are unique, {twice!r} is there more than once")


def grow_group(old: Group, new: Group) -> Group:
    """`old` with the samples, views and limits that `new` has beyond it; records that exist keep their place.

    Raises IncompatibleError if a sample's digest changed or a fixed field differs.
    """
    for name in ("role", "canvas", "levels", "encoding"):
        if getattr(old, name) != getattr(new, name):
            raise IncompatibleError(
                f"group {old.path!r}: {name} is {getattr(old, name)} in the cache, {getattr(new, name)} was asked for; "
                "use another --cache"
            )
    check_unique(new)
    known = dict(zip(old.ids, old.digests, strict=True))
    added = [(i, d) for i, d in zip(new.ids, new.digests, strict=True) if i not in known]
    for i, d in zip(new.ids, new.digests, strict=True):
        if known.get(i, d) != d:
            raise IncompatibleError(
                f"sample {i!r} of {old.path!r} changed since the cache was made (its path or size differs); "
                "restore the file or use another --cache"
            )
    views, count = max(old.views, new.views), len(old.ids)
    extents = _append(old.extents, old, range(old.views, views), 0, count)
    if added:
        extents = _append(extents, old, range(views), count, len(added))
    return replace(
        old, ids=Names.of([*old.ids, *(i for i, _ in added)]), digests=Names.of([*old.digests, *(d for _, d in added)]),
        views=views, extents=extents, limits={**new.limits, **old.limits},
    )  # fmt: skip


def _next_shard(end: int, shard_records: int) -> int:
    """The first record of the first shard behind record `end`."""
    return -(-end // shard_records) * shard_records


def _append(extents: tuple[Extent, ...], group: Group, views: range, sample: int, count: int) -> tuple[Extent, ...]:
    for view in views:
        end = extents[-1].first + extents[-1].count if extents else 0
        extents = (*extents, Extent(_next_shard(end, group.shard_records), view, sample, count))
    return extents
