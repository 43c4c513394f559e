"""A cache grows by views, samples, splits, buckets and kinds of target; nothing that is committed is written again."""

from dataclasses import replace

import pytest
from cachebuilder import (
    LIMITS,
    assert_readable_is_exact,
    group,
    manifest,
    snapshot,
    target,
    write_pending,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fcache.cache_spec import (
    IncompatibleError,
    IncompleteError,
    SpecError,
    open_cache,
    open_storage,
    open_writer,
    verify,
)
from fcache.cache_spec.layout import Extent, grow_group, new_group
from fcache.cache_spec.storage.local import LocalStorage


def committed_files(root):
    """Shard files and commits: everything but the root, the manifests and array metadata."""
    return {
        name: state
        for name, state in snapshot(root).items()
        if not name.endswith("zarr.json") and not name.startswith("manifest/")
    }


def grow(root, wanted):
    """Grows the cache, fills it, and checks that old files were left alone; returns how much was written."""
    before = committed_files(root)
    writer = open_writer(root, wanted)
    written = write_pending(writer)
    writer.finish()
    after = committed_files(root)
    assert {name: after[name] for name in before} == before
    assert not verify(root, deep=True).faults
    return written


def pairs(samples, views):
    return {(f"train#{i}", v) for i in range(samples) for v in range(views)}


def test_views_grow_from_1_to_2_to_4(folder):
    root = folder / "c"
    for views, new in ((1, 3), (2, 3), (4, 6)):
        assert grow(root, manifest(group(views=views))) == 2 * new
        assert assert_readable_is_exact(open_cache(root), "train", ("semantic",)) == pairs(5, views)


def test_samples_grow_and_then_views_cover_all_of_them(folder):
    root = folder / "c"
    for samples, views in ((3, 1), (7, 1), (7, 2), (8, 3)):
        grow(root, manifest(group(samples=samples, views=views)))
        assert assert_readable_is_exact(open_cache(root), "train", ("semantic",)) == pairs(samples, views)
    extents = open_cache(root).manifest.group("train").extents
    assert extents == (
        Extent(0, 0, 0, 3),
        Extent(4, 0, 3, 4),
        Extent(8, 1, 0, 7),
        Extent(16, 2, 0, 7),
        Extent(24, 0, 7, 1),
        Extent(26, 1, 7, 1),
        Extent(28, 2, 7, 1),
    )


def test_asking_for_less_than_there_is_changes_nothing(folder):
    root = folder / "c"
    grow(root, manifest(group(samples=6, views=2)))
    before = snapshot(root)
    assert grow(root, manifest(group(samples=3, views=1))) == 0
    assert snapshot(root) == before


def test_a_validation_split_and_a_bucket_are_added_later(folder):
    root = folder / "c"
    train, val = group(), group("val/32x32", 3)
    grow(root, manifest(train))
    with pytest.raises(ValueError, match="no split 'val' in this cache, it has train; extract it with --split val"):
        open_cache(root).records("val")
    grow(root, manifest(val))
    grow(root, manifest(train, val, group("val/32x64", 2, canvas=(32, 64))))
    reader = open_cache(root)
    assert reader.splits == ("train", "val")
    assert len(assert_readable_is_exact(reader, "train", ("semantic",))) == 5
    assert len(assert_readable_is_exact(reader, "val", ("semantic",))) == 5


def test_a_kind_of_target_with_limits_of_its_own_is_added_later(folder):
    root = folder / "c"
    grow(root, manifest(group(limits={}), kinds=("semantic",)))
    wanted = manifest(group(limits=LIMITS), kinds=("semantic", "instances", "keypoints"))
    open_writer(root, wanted)
    with pytest.raises(IncompleteError, match=r"3 of 3 shards of split 'train' \(instances\) are not committed"):
        open_cache(root).records("train", ("instances",))
    assert grow(root, wanted) == 6
    kinds = ("semantic", "instances", "keypoints")
    assert len(assert_readable_is_exact(open_cache(root), "train", kinds)) == 5


def test_limits_that_a_cache_has_never_change(folder):
    root = folder / "c"
    grow(root, manifest(group(), kinds=("instances",)))
    larger = {name: 2 * n for name, n in LIMITS.items()}
    grow(root, manifest(group(samples=6, limits=larger), kinds=("instances",)))
    assert open_cache(root).manifest.group("train").limits == LIMITS


def test_targets_may_be_named_in_any_number_and_order_later(folder):
    root = folder / "c"
    grow(root, manifest(group(), kinds=("semantic", "class")))
    assert grow(root, manifest(group(), kinds=("class",))) == 0
    assert grow(root, manifest(group(), kinds=("class", "semantic"))) == 0
    assert {t.kind for t in open_cache(root).manifest.targets} == {"semantic", "class"}


@given(steps=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=5), size=st.integers(1, 4))
@settings(max_examples=60)
def test_extents_cover_every_view_of_every_sample_once_and_keep_their_place(steps, size):
    grown = None
    for samples, views in steps:
        wanted = group(samples=samples, views=views, shard_records=size)
        before = grown.extents if grown else ()
        grown = grow_group(grown, wanted) if grown else new_group(wanted)
        assert grown.extents[: len(before)] == before
        ends = 0
        for e in grown.extents:
            assert e.first % size == 0
            assert e.first >= ends
            assert e.first - ends < size
            ends = e.first + e.count
        covered = [(e.sample + i, e.view) for e in grown.extents for i in range(e.count)]
        assert sorted(covered) == [(s, v) for s in range(len(grown.ids)) for v in range(grown.views)]
        shards = list(grown.shards())
        assert [s.index for s in shards] == list(range(grown.num_shards))
        assert sum(s.count for s in shards) == len(covered)


@given(orders=st.permutations(["views", "samples", "split"]))
@settings(max_examples=6)
def test_the_order_of_growth_changes_places_not_content(orders, folder_factory):
    root = folder_factory()
    size = {"samples": 3, "views": 1}
    val = ()
    open_writer(root, manifest(group(**size)))
    for step in orders:
        size |= {"views": {"views": 2}, "samples": {"samples": 5}, "split": {}}[step]
        val = (group("val/32x32", 2),) if step == "split" else val
        grow(root, manifest(group(**size), *val))
    reader = open_cache(root)
    assert assert_readable_is_exact(reader, "train", ("semantic",)) == pairs(5, 2)
    assert len(assert_readable_is_exact(reader, "val", ("semantic",))) == 2


def test_a_sample_that_changed_is_refused_by_name(folder):
    open_writer(folder / "c", manifest(group()))
    other = group()
    other = replace(other, digests=("another", *other.digests[1:]))
    with pytest.raises(IncompatibleError, match="sample 'train#0' of 'train' changed since the cache was made"):
        open_writer(folder / "c", manifest(other))


@pytest.mark.parametrize(("change", "field"), [({"canvas": (64, 64)}, "canvas"), ({"encoding": "fp32"}, "encoding")])
def test_what_is_fixed_at_creation_is_refused_with_both_values(folder, change, field):
    open_writer(folder / "c", manifest(group()))
    wanted = manifest(replace(group(), **change), spec=open_cache(folder / "c").manifest.features)
    with pytest.raises(IncompatibleError, match=f"group 'train': {field} is .* in the cache, .* was asked for"):
        open_writer(folder / "c", wanted)


def test_a_target_of_another_conversion_is_refused_by_field(folder):
    open_writer(folder / "c", manifest(group()))
    other = replace(manifest(group()), targets=(replace(target("semantic"), ignore=0),))
    with pytest.raises(IncompatibleError, match=r"targets 'semantic' differ from the cache's: ignore is 255 .* 0 was"):
        open_writer(folder / "c", other)


def test_a_creation_that_was_stopped_before_the_root_is_taken_up(folder, monkeypatch):
    root = folder / "c"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fcache.cache_spec.store.digest", stop)
        with pytest.raises(KeyboardInterrupt):
            open_writer(root, manifest(group()))
    assert (root / "manifest").is_dir()
    assert not (root / "zarr.json").exists()
    assert not (root / "lock").exists()
    grow(root, manifest(group()))


def test_a_growth_that_was_stopped_leaves_the_cache_as_it_was_and_sound(folder, monkeypatch):
    root = folder / "c"
    grow(root, manifest(group()))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # After arrays were made longer, before the root names the new manifest.
        patch.setattr("fcache.cache_spec.store.to_json", stop)
        with pytest.raises(KeyboardInterrupt):
            open_writer(root, manifest(group(views=3)))
    assert not verify(root, deep=True).faults
    assert assert_readable_is_exact(open_cache(root), "train", ("semantic",)) == pairs(5, 1)
    grow(root, manifest(group(views=3)))


def test_a_reader_whose_manifest_is_replaced_under_it_reads_the_new_one(folder, monkeypatch):
    root = folder / "c"
    grow(root, manifest(group()))
    read, roots_read = LocalStorage.read, []

    def grow_in_between(storage, name):
        data = read(storage, name)
        if name == "zarr.json":
            roots_read.append(data)
            if len(roots_read) == 1:
                open_writer(root, manifest(group(views=2)))
        return data

    monkeypatch.setattr(LocalStorage, "read", grow_in_between)
    assert open_cache(root).manifest.group("train").views == 2


class Meanwhile:
    """A storage in which another process creates a cache just after it was asked for manifests first."""

    def __init__(self, root, create):
        self._storage, self._create = open_storage(root), create

    def __getattr__(self, name):
        return getattr(self._storage, name)

    def names(self, folder):
        found = self._storage.names(folder)
        if folder == "manifest" and self._create:
            self._create, create = None, self._create
            create()
        return found


def test_a_cache_that_another_process_creates_meanwhile_is_joined(tmp_path):
    wanted = manifest(group(samples=3))
    writer = open_writer(Meanwhile(tmp_path / "c", lambda: open_writer(tmp_path / "c", wanted)), wanted)
    write_pending(writer)
    assert open_cache(tmp_path / "c").missing() == 0


def test_a_folder_that_holds_something_else_is_no_place_for_a_cache(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").write_text("years of work")
    with pytest.raises(SpecError, match="is not empty and no cache .it holds thesis.tex.; choose another"):
        open_writer(tmp_path / "c", manifest(group(samples=3)))
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["thesis.tex"]
