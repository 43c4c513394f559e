"""Fitted tables: committed once, before any shard, and never other than they were."""

import json

import numpy as np
import pytest
import tensorstore
import zarr
from cachebuilder import LEVELS, feature_spec, features, group, manifest, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st

from fcache.cache_spec import CorruptError, IncompatibleError, Manifest, find_encoding, open_storage, open_writer
from fcache.cache_spec.tables import (
    COMMIT,
    FittedTables,
    fitted_groups,
    read_tables,
    table_files,
    write_tables,
)

SAMPLES = ("train/train#0", "train/train#2")


def wanted(encoding: str = "rot:1") -> Manifest:
    return manifest(group(encoding=encoding), group("val/32x32", 3), kinds=())


def tables_of(seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    fit = find_encoding("rot:1").fit
    found = {}
    for level in LEVELS:
        x = np.stack([features(level, f"{seed}-{i}", 0) for i in range(6)])
        found[level.name] = dict(fit.tables(fit.add(fit.start(level), x, level), level))
    return found


def assert_equal_tables(found, expected):
    assert set(found) == set(expected)
    for level, named in expected.items():
        assert set(found[level]) == set(named)
        for name, table in named.items():
            np.testing.assert_array_equal(found[level][name], table)
            assert found[level][name].dtype == np.float32


@pytest.fixture
def cache(folder):
    """A cache with committed tables: storage, manifest, tables."""
    writer = open_writer(folder / "c", wanted())
    return writer.storage, writer.manifest, write_tables(writer.storage, writer.manifest, tables_of(), samples=SAMPLES)


def test_tables_read_as_they_were_written_and_only_fitted_groups_need_them(cache):
    storage, made, written = cache
    assert [g.path for g in fitted_groups(made)] == ["train"]
    found = read_tables(storage, made)
    assert found.digest == written.digest != ""
    assert_equal_tables(found.levels, tables_of())


def test_nothing_is_read_or_needed_where_nothing_is_fitted(folder):
    writer = open_writer(folder / "c", wanted("int8"))
    assert read_tables(writer.storage, writer.manifest) == FittedTables()
    assert not table_files(writer.storage, writer.manifest)


def test_before_they_are_committed_there_are_none(folder):
    writer = open_writer(folder / "c", wanted())
    assert not read_tables(writer.storage, writer.manifest)


def test_tables_that_are_there_stay(cache):
    storage, made, written = cache
    again = write_tables(storage, made, tables_of(seed=1), samples=SAMPLES[:1])
    assert again.digest == written.digest
    assert_equal_tables(again.levels, tables_of())


def test_equal_tables_of_equal_samples_are_equal_files(cache, folder):
    storage, made, written = cache
    other = open_writer(folder / "other", wanted())
    assert write_tables(other.storage, other.manifest, tables_of(), samples=SAMPLES).digest == written.digest
    for name in (COMMIT, *table_files(storage, made)):
        assert storage.read(name) == other.storage.read(name)


@pytest.mark.parametrize("reader", ["zarr", "tensorstore"])
def test_other_zarr_readers_read_them(cache, reader):
    storage, made, _ = cache
    for level, named in tables_of().items():
        for name, table in named.items():
            path = storage.path(f"tables/{level}/{name}")
            if reader == "zarr":
                found = zarr.open_array(path, mode="r")[...]
            else:
                spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
                found = tensorstore.open(spec, read=True, open=True).result().read().result()
            np.testing.assert_array_equal(found, table)
    assert set(zarr.open_group(storage.path("tables"), mode="r").group_keys()) == {level.name for level in LEVELS}
    assert set(table_files(storage, made)) == {n for n, _ in storage.walk() if n.startswith("tables/")}


@given(data=st.data())
@settings(max_examples=60)
def test_any_changed_byte_of_the_commit_or_a_table_is_found(data, folder_factory):
    root = folder_factory()
    writer = open_writer(root, wanted())
    write_tables(writer.storage, writer.manifest, tables_of(), samples=SAMPLES)
    storage, made = open_storage(root), writer.manifest
    names = [COMMIT, *(n for n in table_files(storage, made) if not n.endswith(".json"))]
    name = data.draw(st.sampled_from(names))
    raw = bytearray(storage.read(name))
    position = data.draw(st.integers(0, len(raw) - 1))
    raw[position] ^= 1 << data.draw(st.integers(0, 7))
    storage.write(name, bytes(raw))
    with pytest.raises(CorruptError, match=r"commits/tables.json: .*restore tables/ and commits/tables.json"):
        read_tables(storage, made)


def test_a_missing_or_cut_table_is_found(cache):
    storage, made, _ = cache
    name = "tables/level-4/rotation/c.0.0"
    data = storage.read(name)
    storage.write(name, data[:-4])
    with pytest.raises(CorruptError, match="digest differs"):
        read_tables(storage, made)
    storage.remove(name)
    with pytest.raises(CorruptError, match="is missing"):
        read_tables(storage, made)


@pytest.mark.parametrize("hostile", [b"", b"[]", b"{}", b'{"digest": 1}', b"[" * 100_000, b"\xff\xfe"])
def test_a_commit_that_is_none_is_damage(cache, hostile):
    storage, made, _ = cache
    storage.write(COMMIT, hostile)
    with pytest.raises(CorruptError, match="no commit of tables"):
        read_tables(storage, made)


def test_tables_of_other_features_are_refused(cache):
    storage, made, _ = cache
    other = manifest(*made.groups, kinds=(), spec=feature_spec("rot:1", drop=0.5))
    with pytest.raises(IncompatibleError, match="tables of other features"):
        read_tables(storage, other)


def test_tables_that_do_not_fit_the_levels_are_damage(folder):
    writer = open_writer(folder / "c", wanted())
    tables = tables_of()
    tables["level-4"]["mean"] = np.zeros(7, np.float32)
    with pytest.raises(CorruptError, match="28 bytes, the level needs 12"):
        write_tables(writer.storage, writer.manifest, tables, samples=SAMPLES)


def test_tables_are_never_fitted_again_beside_shards_that_were_coded_with_others(folder):
    # The shard is coded exactly: what matters here is that it was committed.
    exact = open_writer(folder / "c", wanted("int8"))
    write_shard(exact, exact.pending()[0])
    with pytest.raises(CorruptError, match="is missing, and shards of 'train' are coded with its tables"):
        write_tables(exact.storage, wanted(), tables_of(), samples=SAMPLES)
    assert not [n for n, _ in exact.storage.walk() if n.startswith("tables/")]


def test_the_commit_says_from_which_samples_they_come(cache):
    storage, _, _ = cache
    body = json.loads(storage.read(COMMIT))
    assert body["samples"] == list(SAMPLES)
    assert body["encoding"] == "rot:1"
