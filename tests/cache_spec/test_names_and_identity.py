"""What names a cache, what is refused, and how it is said."""

import random
from dataclasses import replace

import pytest
from cachebuilder import feature_spec, group, manifest, target, write_pending
from hypothesis import given
from hypothesis import strategies as st

from fcache.cache_spec import (
    FeatureSpec,
    Group,
    IncompatibleError,
    LevelSpec,
    SpecError,
    canonical_json,
    first_difference,
    from_json,
    open_cache,
    open_writer,
    targets_key,
    to_json,
)
from fcache.cache_spec.layout import choose_shard_records

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abcäé_", min_size=1), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


def shuffled(value):
    if isinstance(value, dict):
        keys = list(value)
        random.shuffle(keys)
        return {k: shuffled(value[k]) for k in keys}
    return [shuffled(v) for v in value] if isinstance(value, list) else value


@given(arguments=st.dictionaries(st.text("abcdef", min_size=1), JSON, max_size=5))
def test_the_order_of_arguments_does_not_change_the_key(arguments):
    one = replace(feature_spec(), backbone=replace(feature_spec().backbone, arguments=arguments))
    two = replace(one, backbone=replace(one.backbone, arguments=shuffled(arguments)))
    assert one.key == two.key
    assert from_json(FeatureSpec, to_json(one)) == one
    assert first_difference(one, two) is None


def test_the_order_of_targets_does_not_change_their_key():
    one, two = target("semantic"), target("depth")
    assert targets_key((one, two)) == targets_key((two, one)) != targets_key((one,))


@given(value=JSON)
def test_equal_json_gives_equal_bytes(value):
    assert canonical_json(value) == canonical_json(shuffled(value))


CHANGES = {
    "backbone.weights_sha256": lambda s: replace(s, backbone=replace(s.backbone, weights_sha256="cd" * 32)),
    "backbone.precision": lambda s: replace(s, backbone=replace(s.backbone, precision="bf16")),
    "backbone.mean[0]": lambda s: replace(s, backbone=replace(s.backbone, mean=(0.1, 0.5, 0.5))),
    "backbone.arguments.window": lambda s: replace(s, backbone=replace(s.backbone, arguments={"window": 16})),
    "training.views.size[1]": lambda s: replace(
        s, training=replace(s.training, views={"kind": "plain", "size": [32, 64]})
    ),
    "evaluation.encoding": lambda s: replace(s, evaluation=replace(s.evaluation, encoding="fp32")),
    "seed": lambda s: replace(s, seed=1),
    "annotations": lambda s: replace(s, annotations="ab"),
}


@pytest.mark.parametrize("field", CHANGES)
def test_a_changed_field_is_refused_with_its_name_and_both_values(folder, field):
    spec = feature_spec(window=8)
    open_writer(folder / "c", manifest(group(), spec=spec))
    other = CHANGES[field](spec)
    assert other.key != spec.key
    name, asked, stored = first_difference(other, spec)
    assert name == field
    with pytest.raises(IncompatibleError) as error:
        open_writer(folder / "c", manifest(group(), spec=other))
    text = str(error.value)
    assert field in text
    assert str(asked).strip("'") in text or asked is None
    assert str(stored).strip("'") in text or "null" in text
    assert "another --cache" in text


@pytest.mark.parametrize(
    "path", ["../up", "/etc", "", "commits", "manifest/x", "claims", "partial", "tables", "lock", "a//b", ".hidden"]
)
def test_a_group_never_leaves_the_cache_or_takes_a_reserved_name(path):
    with pytest.raises(SpecError, match="named with letters"):
        replace(group(), path=path)


def test_a_group_never_lies_inside_another():
    with pytest.raises(SpecError, match="'val/32x32' lies inside group 'val'"):
        manifest(group("val"), group("val/32x32"))


@pytest.mark.parametrize("name", ["index", "targets", "a/b", "", "..", "level-8"])
def test_levels_have_plain_names_of_their_own(name):
    levels = (LevelSpec(name, "C", (3,), 4), LevelSpec("level-8", "C", (3,), 8))
    with pytest.raises(SpecError, match="levels have unique plain names"):
        group(levels=levels)


@pytest.mark.parametrize(
    "change",
    [{"ids": ()}, {"ids": ("a", "a"), "digests": ("x", "y")}, {"digests": ()}, {"shard_records": 0}, {"views": 0}],
)
def test_a_group_that_cannot_be_is_refused(change):
    with pytest.raises(SpecError, match="'train'"):
        replace(group(), **change)


def test_limits_of_ragged_targets_are_at_least_one():
    with pytest.raises(SpecError, match=r"at least 1, got \{'instances': 0\}"):
        group(limits={"instances": 0})


def test_a_kind_without_its_limits_is_refused_before_anything_is_written(folder):
    with pytest.raises(SpecError, match=r"'instances' needs the limits \['instances', 'instances_rle_bytes'\]"):
        open_writer(folder / "c", manifest(group(limits={}), kinds=("instances",)))
    assert not (folder / "c/zarr.json").exists()


def test_a_sample_name_that_is_no_unicode_is_refused_by_name(folder):
    ids = ("train#0", "broken\udcff")
    with pytest.raises(SpecError, match="is no valid Unicode; rename the file"):
        open_writer(folder / "c", manifest(replace(group(samples=2), ids=ids)))


def test_sample_ids_are_opaque(folder):
    ids = ("images/a b.jpg", "ümläut/日本.png", 'quote"\\', "../../etc", "x" * 400)
    writer = open_writer(folder / "c", manifest(replace(group(), ids=ids), kinds=()))
    write_pending(writer)
    (found,) = open_cache(folder / "c").records("train")
    assert found.group.ids == ids


@pytest.mark.parametrize("content", [None, "folder", "file"])
def test_what_is_no_cache_is_said_so(folder, content):
    root = folder / "c"
    if content == "folder":
        (root / "photos").mkdir(parents=True)
        (root / "photos" / "a.jpg").write_bytes(b"")
        with pytest.raises(SpecError, match=r"not empty and no cache \(it holds photos/a.jpg\)"):
            open_writer(root, manifest(group()))
        assert [p.name for p in root.iterdir()] == ["photos"]
    if content == "file":
        root.write_text("")
        with pytest.raises(Exception, match=r"cannot write .*c: File exists; move what is there away"):
            open_writer(root, manifest(group()))
        return
    with pytest.raises(SpecError, match=r"no cache at .*make one with `fcache extract"):
        open_cache(root)


def test_unknown_names_suggest_the_nearest(folder):
    writer = open_writer(folder / "c", manifest(group()))
    write_pending(writer)
    reader = open_cache(folder / "c")
    with pytest.raises(SpecError, match="unknown array 'level-5'; did you mean level-"):
        reader.read("train", "level-5", 0)
    with pytest.raises(SpecError, match="no record group 'trian'"):
        reader.read("trian", "level-4", 0)
    with pytest.raises(SpecError, match="targets of kind 'depth' are needed, this cache has"):
        reader.records("train", ("depth",))
    with pytest.raises(SpecError, match="read mode is one of"):
        open_cache(folder / "c", mode="fast")


@given(samples=st.integers(1, 10**6), size=st.integers(1, 10**10))
def test_shards_are_at_most_64_records_256_mb_and_a_sixteenth(samples, size):
    records = choose_shard_records(samples, size)
    assert 1 <= records <= 64
    assert records == 1 or records * size <= 256_000_000
    assert records == 1 or (records - 1) * 16 < samples


def test_specs_reject_fields_that_they_do_not_know():
    body = to_json(group())
    with pytest.raises(SpecError, match="found \\['colour'\\]"):
        from_json(Group, {**body, "colour": 1})
    del body["ids"]
    with pytest.raises(SpecError, match="lacks the fields \\['ids'\\]"):
        from_json(Group, body)
