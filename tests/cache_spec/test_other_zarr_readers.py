"""zarr-python and tensorstore open every array of a cache and read what fcache reads."""

import json
import os

import numpy as np
import pytest
import tensorstore
import zarr
from cachebuilder import group, manifest, stored_features, stored_targets, view_of, write_pending

from fcache.cache_spec import LevelSpec, encoding_names, open_writer
from fcache.cache_spec.layout import FEATURES, part_arrays
from fcache.cache_spec.targets import KINDS

LEVELS = (
    LevelSpec("level-4", "C H W", (3, 8, 8), 4),
    LevelSpec("clip", "T C H W", (2, 3, 2, 2), 16),
    LevelSpec("pooled", "C", (7,), 32),
)
BAD = "train#1"


@pytest.fixture(scope="module", params=[(e, c) for e in encoding_names() for c in ("none", "zstd")], ids="-".join)
def cache(request, folder_factory):
    """Views, holes at the ends of extents, a quarantined sample, all kinds of target, an evaluation group."""
    encoding, compression = request.param
    root = folder_factory()
    made = [
        group(path, 5, views=views, shard_records=3, encoding=encoding, compression=compression, levels=LEVELS)
        for path, views in (("train", 2), ("val/32x32", 1))
    ]
    writer = open_writer(root, manifest(*made, kinds=tuple(KINDS)))
    write_pending(writer, bad={BAD})
    return root, writer.manifest


def read_with_zarr(root, path):
    return np.asarray(zarr.open_array(root / path, mode="r")[...])


def read_with_tensorstore(root, path):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(root / path)}}
    return np.asarray(tensorstore.open(spec, read=True, open=True).result().read().result())


def expected_records(group):
    """Record number -> (sample, view) of all records that were written."""
    return {
        s.first + i: (group.ids[s.sample + i], s.view)
        for s in group.shards()
        for i in range(s.count)
        if group.ids[s.sample + i] != BAD
    }


@pytest.mark.parametrize("read", [read_with_zarr, read_with_tensorstore])
def test_every_array_reads_as_it_was_written_and_holes_read_as_fill(cache, read):
    root, made = cache
    arrays = 0
    for g in made.groups:
        written = expected_records(g)
        for part in made.parts():
            for path, spec in part_arrays(g, part).items():
                arrays += 1
                found = read(root, f"{g.path}/{path}")
                assert found.dtype == np.dtype(spec.dtype)
                assert found.shape == (g.num_records, *spec.shape)
                for record in range(g.num_records):
                    filled = np.full(spec.shape, spec.fill, dtype=spec.dtype)
                    if record in written:
                        filled = expected_record(g, part, path, spec, *written[record], filled)
                    np.testing.assert_array_equal(found[record], filled, err_msg=f"{g.path}/{path} {record}")
    assert arrays == len([p for p in root.rglob("c.0*") if "tables" not in p.parts])


def expected_record(g, part, path, spec, sample, view, filled):
    if path.startswith("index/"):
        geometry = view_of(g, sample, view)
        return {
            "index/sample": g.ids.index(sample),
            "index/view": view,
            "index/to_view": geometry.matrix,
            "index/valid_size": geometry.valid,
            "index/image_size": geometry.image_size,
            "index/frames": geometry.frames,
        }[path]
    if part == FEATURES:
        return stored_features(g, sample, view)[path]
    values = {f"targets/{k}": v for k, v in stored_targets(g, part, sample, view).items()}
    if path.endswith(".count"):
        return len(values[path.removesuffix(".count")])
    if spec.ragged:
        filled[: len(values[path])] = values[path]
        return filled
    return values[path]


def test_the_root_opens_as_one_zarr_hierarchy(cache):
    root, made = cache
    opened = zarr.open_group(root, mode="r")
    for g in made.groups:
        assert dict(opened[f"{g.path}/level-4"].attrs)["dims"] == "C H W"
        found = opened[f"{g.path}/level-4"]
        # Packed codes have other axes than the level.
        packed = g.encoding == "int4" or g.encoding.startswith("rot")
        assert found.metadata.dimension_names == ("record", *([None] * (found.ndim - 1) if packed else "CHW"))
    assert opened.attrs["fcache"]["features"] == made.features.key


def test_only_registered_codecs_and_types_are_used(cache):
    root, _ = cache
    for path in root.rglob("zarr.json"):
        node = json.loads(path.read_text())
        if node["node_type"] == "array":
            names = {c["name"] for c in node["codecs"]}
            inner = {c["name"] for codec in node["codecs"] for c in codec.get("configuration", {}).get("codecs", [])}
            assert names | inner <= {"bytes", "zstd", "sharding_indexed"}
            assert node["data_type"] in ["int8", "uint8", "uint16", "int32", "int64", "float16", "float32", "float64"]


def test_files_have_the_mode_that_the_umask_gives(folder):
    old = os.umask(0o027)
    try:
        writer = open_writer(folder / "c", manifest(group()))
        write_pending(writer)
    finally:
        os.umask(old)
    for path in (folder / "c").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path
