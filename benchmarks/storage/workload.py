"""The records that are stored and read: a pyramid in fp16, and the same in codes, as caches and as flat files."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from fcache.cache_spec import (
    BackboneSpec,
    CacheWriter,
    FeatureSpec,
    Group,
    LevelSpec,
    Manifest,
    Shard,
    SplitRecipe,
    View,
    find_encoding,
    index_arrays,
    open_writer,
)

SWIN_T = (
    LevelSpec("level-4", "C H W", (96, 128, 128), 4),
    LevelSpec("level-8", "C H W", (192, 64, 64), 8),
    LevelSpec("level-16", "C H W", (384, 32, 32), 16),
    LevelSpec("level-32", "C H W", (768, 16, 16), 32),
)
VIEW = View((1.0, 0.0, 0.0, 0.0, 1.0, 0.0), (512, 512), (512, 512), (512, 512))
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Workload:
    """`records` pyramids of a 512 x 512 SwinV2-T, 5.9 MB each in fp16, read in batches of `batch`.

    `encoding` and `compression` are as in a cache. Values are Laplace noise, every channel with its own scale.
    """

    records: int
    encoding: str = "fp16"
    compression: str = "none"
    levels: tuple[LevelSpec, ...] = SWIN_T
    batch: int = 16
    shard_records: int = 32

    @cached_property
    def fields(self) -> np.dtype:
        """One record as a flat file holds it: every array of every level, one after another."""
        parts = find_encoding(self.encoding).parts
        names = [(x.name + p.suffix, np.dtype(p.dtype), p.shape) for x in self.levels for p in parts(x)]
        return np.dtype([(name, dtype, shape) for name, dtype, shape in names])

    def decoded(self, encoding: str) -> "Workload":
        """The same records in fp16 or fp32."""
        return replace(self, encoding=encoding, compression="none")

    def decode(self, source: np.ndarray, to: str) -> np.ndarray:
        """The records of a flat file in fp16 or fp32: decoded as their encoding says, then rounded."""
        encoding, found = find_encoding(self.encoding), np.empty(len(source), self.decoded(to).fields)
        for level in self.levels:
            for i, row in enumerate(source):
                stored = {p.suffix: row[level.name + p.suffix][None] for p in encoding.parts(level)}
                found[level.name][i] = encoding.decode(stored, level, {}, np)[0]
        return found

    def record(self, number: int) -> Arrays:
        """The arrays of one record, a pure function of its number."""
        rng, found = np.random.default_rng([7, number]), {}
        for level in self.levels:
            scale = np.exp(rng.standard_normal(level.shape[0], dtype=np.float32))
            x = rng.standard_exponential(level.shape, dtype=np.float32)
            x *= (rng.integers(0, 2, level.shape, dtype=np.int8) * 2 - 1) * scale.reshape(-1, *[1] * (x.ndim - 1))
            coded = find_encoding(self.encoding).encode(x[None], level, {}, np)
            found |= {level.name + suffix: np.asarray(part)[0] for suffix, part in coded.items()}
        return found

    def write_flat(self, path: Path) -> None:
        """One file with all records."""
        with path.open("wb") as file:
            for number in range(self.records):
                row, found = np.zeros((), self.fields), self.record(number)
                for name in self.fields.names:
                    row[name] = found[name]
                file.write(row.tobytes())

    def flat(self, path: Path) -> np.ndarray:
        """The flat file mapped: [records], one structure of arrays a record."""
        return np.memmap(path, dtype=self.fields, mode="r")

    @property
    def manifest(self) -> Manifest:
        """The manifest of a cache that holds exactly these records."""
        ids = tuple(f"sample-{i}" for i in range(self.records))
        digests = tuple(f"{i:016x}" for i in range(self.records))
        free = tuple(level.free() for level in self.levels)
        backbone = BackboneSpec("swinv2-t", {}, "0" * 64, (0.5,) * 3, (0.5,) * 3, "fp32", free)
        recipe = SplitRecipe({"kind": "plain"}, self.encoding)
        group = Group(
            "train", "train", "training", (512, 512), self.levels, self.encoding, self.shard_records, self.batch,
            ids, digests, 1, (), compression=self.compression,
        )  # fmt: skip
        return Manifest(FeatureSpec(backbone, recipe, recipe, seed=0), (), (group,))

    def write_cache(self, root: Path, source: np.ndarray) -> None:
        """A cache with the records of `source`, through the public writer; one that was only created is filled."""
        writer = open_writer(root, self.manifest)
        for shard in writer.pending():
            write_shard(writer, shard, lambda number: source[number], self.batch)
        writer.finish()


def write_shard(writer: CacheWriter, shard: Shard, record, batch: int) -> None:
    """Writes one shard in batches, as an extraction does; `record(number)` maps array names to one record's arrays."""
    shard_writer = writer.write(shard)
    for start in range(0, shard.count, batch):
        positions = range(start, min(start + batch, shard.count))
        rows = [record(shard.first + p) for p in positions]
        names = rows[0].dtype.names if isinstance(rows[0], np.void) else rows[0]
        samples = [shard.sample + p for p in positions]
        arrays = index_arrays([VIEW] * len(rows), samples, [0] * len(rows))
        shard_writer.append(positions, {name: [row[name] for row in rows] for name in names} | arrays)
    shard_writer.commit(facts={}, fingerprint={})


def shuffled(workload: Workload, epoch: int) -> Iterator[np.ndarray]:
    """The record numbers of the full batches of an epoch, for readers that have no order of their own."""
    order = np.random.default_rng([3, epoch]).permutation(workload.records)
    for start in range(0, len(order) - workload.batch + 1, workload.batch):
        yield order[start : start + workload.batch]


def equal_bits(found: Mapping[str, np.ndarray], rows: np.ndarray) -> bool:
    """Whether arrays [B, …] hold the bits of B records of a flat file."""
    return set(found) == set(rows.dtype.names) and all(
        found[name].dtype == rows[name].dtype
        and found[name].shape == rows[name].shape
        and np.array_equal(
            found[name].reshape(-1).view(np.uint8), np.ascontiguousarray(rows[name]).reshape(-1).view(np.uint8)
        )
        for name in rows.dtype.names
    )
