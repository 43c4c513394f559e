"""Small caches whose numbers are pure functions of sample, view and array: what is read can be checked anywhere."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from fcache.cache_spec import (
    BackboneSpec,
    CacheReader,
    CacheWriter,
    FeatureSpec,
    Group,
    LevelSpec,
    Manifest,
    Shard,
    SplitRecipe,
    TargetSpec,
    View,
    find_encoding,
    index_arrays,
)
from fcache.cache_spec.layout import FEATURES
from fcache.cache_spec.streams.order import generator
from fcache.cache_spec.tables import FittedTables, fitted_groups, fitted_levels, read_tables, write_tables

LEVELS = (LevelSpec("level-4", "C H W", (3, 8, 8), 4), LevelSpec("level-8", "C H W", (5, 4, 4), 8))
LIMITS = {
    "instances": 4,
    "instances_rle_bytes": 40,
    "instances_truth_bytes": 60,
    "people": 2,
    "keypoints": 3,
    "keypoints_truth_bytes": 30,
    "semantic_truth_bytes": 50,
    "depth_truth_bytes": 45,
}


def feature_spec(encoding: str = "int8", *, levels: tuple[LevelSpec, ...] = LEVELS, **arguments: object) -> FeatureSpec:
    free = tuple(level.free() for level in levels)
    backbone = BackboneSpec("tiny", arguments, "ab" * 32, (0.5,) * 3, (0.25,) * 3, "fp32", free)
    recipe = SplitRecipe({"kind": "plain", "size": [32, 32]}, encoding)
    return FeatureSpec(backbone, recipe, recipe, seed=0)


def target(kind: str) -> TargetSpec:
    return TargetSpec(kind, "tiny", ("sky", "sea"), ((1, 2, 3), (4, 5, 6)), ignore=255, conversion={"from": kind})


def group(
    path: str = "train",
    samples: int = 5,
    *,
    views: int = 1,
    shard_records: int = 2,
    encoding: str = "int8",
    levels: tuple[LevelSpec, ...] = LEVELS,
    compression: str = "none",
    canvas: tuple[int, int] = (32, 32),
    limits: Mapping[str, int] = LIMITS,
    first: int = 0,
) -> Group:
    split = path.split("/")[0]
    ids = tuple(f"{path}#{first + i}" for i in range(samples))
    return Group(
        path=path,
        split=split,
        role="training" if split == "train" else "evaluation",
        canvas=canvas,
        levels=levels,
        encoding=encoding,
        shard_records=shard_records,
        batch=2,
        ids=ids,
        digests=tuple(f"digest of {i}" for i in ids),
        views=views,
        extents=(),
        compression=compression,
        limits=dict(limits),
    )


def manifest(*groups: Group, kinds: Iterable[str] = ("semantic",), spec: FeatureSpec | None = None) -> Manifest:
    first = groups[0]
    spec = feature_spec(first.encoding, levels=first.levels) if spec is None else spec
    return Manifest(spec, tuple(target(k) for k in kinds), tuple(replace(g, extents=()) for g in groups))


def features(level: LevelSpec, sample: str, view: int) -> np.ndarray:
    """float32 [*level.shape]; some maps are zero, some large, some tiny."""
    rng = generator("features", level.name, sample, view)
    maps = tuple(n if d == "C" else 1 for d, n in zip(level.dims.split(), level.shape, strict=True))
    scale = 10.0 ** rng.integers(-3, 4, maps) * rng.integers(0, 4, maps).clip(0, 1)
    return (rng.standard_normal(level.shape) * scale).astype(np.float32)


def view_of(group: Group, sample: str, view: int) -> View:
    rng = generator("view", sample, view)
    height, width = group.canvas
    frames = tuple(int(n) for n in np.cumsum(rng.integers(1, 5, _frames(group)))) if _frames(group) else ()
    matrix = tuple(float(v) for v in rng.uniform(-2, 2, 6))
    valid = (int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1)))
    size = (int(rng.integers(1, 4000)), int(rng.integers(1, 4000)))
    return View(matrix, group.canvas, valid, size, frames)


def _frames(group: Group) -> int:
    return max((level.shape[0] for level in group.levels if level.dims.startswith("T")), default=0)


@cache
def tables_for(level: LevelSpec, encoding: str) -> Mapping[str, np.ndarray]:
    """The tables of an encoding for a level, fitted to the same samples for every group; none if it fits nothing."""
    fit = find_encoding(encoding).fit
    if fit is None:
        return {}
    sample = np.stack([features(level, f"fitted#{i}", 0) for i in range(8)])
    return fit.tables(fit.add(fit.start(level), sample, level), level)


def stored_features(group: Group, sample: str, view: int) -> dict[str, np.ndarray]:
    """What the features part holds for one record, without the index."""
    found = {}
    for level in group.levels:
        x = features(level, sample, view)[None]
        tables = tables_for(level, group.encoding)
        for suffix, codes in find_encoding(group.encoding).encode(x, level, tables, np).items():
            found[level.name + suffix] = np.asarray(codes)[0]
    return found


def stored_targets(group: Group, kind: str, sample: str, view: int) -> dict[str, np.ndarray]:
    """What one kind of target holds for one record; ragged entries have their true length, sometimes zero."""
    found = {}
    for spec in group.target_arrays(kind):
        if spec.path.endswith(".count"):
            continue
        rng = generator("target", spec.path, sample, view)
        shape = spec.shape
        if spec.ragged:
            entries = generator("entries", shape[0], sample, view).integers(0, shape[0] + 1)
            shape = (int(entries), *shape[1:])
        if spec.dtype.startswith("float"):
            found[spec.path] = rng.standard_normal(shape).astype(spec.dtype)
        else:
            high = min(int(np.iinfo(spec.dtype).max), 2**40)
            found[spec.path] = rng.integers(0, high, shape, endpoint=True).astype(spec.dtype)
    return found


def write_shard(writer: CacheWriter, shard: Shard, part: str = FEATURES, *, bad: Iterable[str] = ()) -> None:
    """Writes one part of one shard and commits it; samples in `bad` are quarantined."""
    g = writer.manifest.group(shard.group)
    shard_writer = writer.write(shard, part)
    ids, bad = writer.samples(shard), set(bad)
    kept = [p for p, sample in enumerate(ids) if sample not in bad]
    try:
        for position in set(range(len(ids))) - set(kept):
            shard_writer.skip(position, "made to fail")
        # Two appends, as from two batches.
        for positions in (kept[: len(kept) // 2], kept[len(kept) // 2 :]):
            if positions:
                shard_writer.append(positions, records(g, shard, part, positions))
    except BaseException:
        shard_writer.abort()
        raise
    fitted = part == FEATURES and find_encoding(g.encoding).fit is not None
    digest = commit_tables(writer).digest if fitted else ""
    shard_writer.commit(facts={"records": len(kept)}, fingerprint={"made": "by a test"}, tables=digest)


def commit_tables(writer: CacheWriter) -> FittedTables:
    """The fitted tables of a cache, committed now if they are not yet."""
    if found := read_tables(writer.storage, writer.manifest):
        return found
    encoding = fitted_groups(writer.manifest)[0].encoding
    tables = {name: tables_for(level, encoding) for name, level in fitted_levels(writer.manifest).items()}
    return write_tables(writer.storage, writer.manifest, tables, samples=())


def records(g: Group, shard: Shard, part: str, positions: list[int]) -> dict[str, list[np.ndarray]]:
    samples = [g.ids[shard.sample + p] for p in positions]
    if part != FEATURES:
        rows = [stored_targets(g, part, sample, shard.view) for sample in samples]
        return {k: [row[k] for row in rows] for k in rows[0]}
    rows = [stored_features(g, sample, shard.view) for sample in samples]
    index = index_arrays(
        [view_of(g, sample, shard.view) for sample in samples],
        [shard.sample + p for p in positions],
        [shard.view] * len(positions),
    )
    return {k: [row[k] for row in rows] for k in rows[0]} | {k: list(v) for k, v in index.items()}


def write_pending(writer: CacheWriter, parts: Iterable[str] | None = None, *, bad: Iterable[str] = ()) -> int:
    """Writes all that is pending; returns how many parts of shards that were."""
    done = 0
    for part in writer.manifest.parts() if parts is None else parts:
        for shard in writer.pending(part):
            write_shard(writer, shard, part, bad=bad)
            done += 1
    return done


def assert_record(reader: CacheReader, g: Group, record: int, sample: str, view: int, kinds: Iterable[str]) -> None:
    """One record, read array by array, is what was written."""
    expected = stored_features(g, sample, view)
    for kind in kinds:
        expected |= {f"targets/{k}": v for k, v in stored_targets(g, kind, sample, view).items()}
    geometry = view_of(g, sample, view)
    expected |= {"index/sample": np.int32(g.ids.index(sample)), "index/view": np.int32(view)}
    expected |= {"index/to_view": geometry.matrix, "index/image_size": np.asarray(geometry.image_size, np.int32)}
    expected["index/valid_size"] = np.asarray(geometry.valid, np.int32)
    if geometry.frames:
        expected["index/frames"] = np.asarray(geometry.frames, np.int32)
    for path, value in expected.items():
        found = reader.read(g.path, path, record)
        assert found.dtype == value.dtype, path
        np.testing.assert_array_equal(found, value, err_msg=path)


def assert_readable_is_exact(reader: CacheReader, split: str, kinds: tuple[str, ...]) -> set[tuple[str, int]]:
    """Every record that the reader offers is exact; returns the (sample, view) pairs."""
    seen = set()
    for found in reader.records(split, kinds):
        for record, view, sample in zip(found.records, found.views, found.samples, strict=True):
            name = found.group.ids[sample]
            assert_record(reader, found.group, int(record), name, int(view), kinds)
            assert (name, int(view)) not in seen
            seen.add((name, int(view)))
    return seen


def snapshot(root: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and modification time of every file of a cache."""
    return {
        str(p.relative_to(root)): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(root.rglob("*")) if p.is_file()
    }
