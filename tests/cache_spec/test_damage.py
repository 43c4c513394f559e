"""Damaged caches: what reading and verifying say."""

import hashlib
import json
import shutil
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest
from cachebuilder import group, manifest, snapshot, target, write_pending, write_shard

from fcache.cache_spec import (
    CorruptError,
    DataError,
    FcacheError,
    IncompatibleError,
    IncompleteError,
    StreamConfig,
    digest,
    make_pending,
    open_cache,
    open_source,
    open_writer,
    verify,
)
from fcache.cache_spec.commits import commit_path, find_commit
from fcache.cache_spec.identity import canonical_json
from fcache.cache_spec.layout import FEATURES
from fcache.cache_spec.shardfile import ZSTD, decode_zstd, index_bytes, parse_index
from fcache.cache_spec.storage.local import LocalStorage

KINDS = ("semantic", "instances")


@pytest.fixture(scope="module")
def sound(folder_factory):
    root = folder_factory()
    write_pending(open_writer(root, manifest(group(samples=6, shard_records=3), kinds=KINDS)))
    return root


@pytest.fixture
def root(sound, folder):
    shutil.copytree(sound, folder / "c")
    return folder / "c"


def read_all(root, mode="mmap"):
    for block in open_source(open_cache(root, mode=mode), "train", StreamConfig(2, kinds=KINDS)).blocks(0):
        block.pyramid(np)


def flip(path, position, bit=0):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def one_fault(root, *, deep):
    (fault,) = verify(root, deep=deep).faults
    return fault


LEVEL = "train/level-4/c.1.0.0.0"


@pytest.mark.parametrize("mode", ["mmap", "pread"])
def test_a_missing_shard_file_is_an_error_not_a_fill_value(root, mode):
    (root / LEVEL).unlink()
    with pytest.raises(CorruptError, match=r"level-4/c.1.0.0.0 is missing, its commit names it; run `fcache repair`"):
        read_all(root, mode)
    fault = one_fault(root, deep=False)
    assert (fault.group, fault.part, fault.shard, fault.kind) == ("train", "features", 1, "corrupt")
    assert fault.what == f"{LEVEL} is missing"


@pytest.mark.parametrize("mode", ["mmap", "pread"])
@pytest.mark.parametrize("name", [LEVEL, "train/index/sample/c.1", "train/targets/semantic/map/c.0.0.0"])
def test_a_truncated_file_is_found_when_it_is_opened(root, mode, name):
    data = (root / name).read_bytes()
    (root / name).write_bytes(data[:-1])
    with pytest.raises(
        CorruptError, match=f"has {len(data) - 1} bytes, its commit says {len(data)}; run `fcache repair`"
    ):
        read_all(root, mode)
    assert "bytes, its commit says" in one_fault(root, deep=False).what


def test_a_damaged_shard_index_is_found_by_its_checksum(root):
    flip(root / LEVEL, -10)
    with pytest.raises(CorruptError, match="shard index is damaged"):
        read_all(root)
    assert "shard index is damaged" in one_fault(root, deep=False).what


def test_a_flipped_bit_in_a_map_is_found_by_the_deep_check_only(root):
    flip(root / LEVEL, 100)
    read_all(root)
    assert not verify(root).faults
    assert "SHA-256 differs" in one_fault(root, deep=True).what


def test_a_flipped_bit_in_a_compressed_map_never_gives_a_shorter_record(root):
    path = root / "train/targets/semantic/map/c.0.0.0"
    sound = path.read_bytes()
    for position in range(0, 16):
        for bit in range(8):
            path.write_bytes(sound)
            flip(path, position, bit)
            with suppress(CorruptError):
                read_all(root)
            assert verify(root, deep=True).faults


def test_an_index_that_disagrees_with_the_manifest_is_refused(root):
    flip(root / "train/index/sample/c.0", 0)
    with pytest.raises(CorruptError, match=r"train/index/sample is .* the manifest says .*verify --deep"):
        read_all(root)


def test_a_count_beyond_its_limit_is_refused(root):
    flip(root / "train/targets/instances/boxes.count/c.0", 1, 6)
    with pytest.raises(CorruptError, match=r"boxes.count is \d+ for record 0, at most 4 fit"):
        read_all(root)
    with pytest.raises(CorruptError, match="at most 4 fit"):
        open_cache(root).read("train", "targets/instances/boxes", 0)


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", "[" * 100_000, '{"digest": 1}', "\x00\xff"])
def test_a_commit_that_is_no_commit_is_named(root, damage):
    path = root / commit_path("train", FEATURES, 0)
    path.write_text(damage, encoding="latin-1")
    with pytest.raises(CorruptError, match=r"commits/train/000000.json: not a commit record .* run `fcache repair`"):
        read_all(root)
    assert one_fault(root, deep=False).kind == "corrupt"


def test_an_edited_commit_is_refused(root):
    path = root / commit_path("train", FEATURES, 0)
    body = json.loads(path.read_text())
    path.write_text(json.dumps({**body, "first": 3}))
    with pytest.raises(CorruptError, match="the commit record was changed"):
        read_all(root)


def test_a_commit_in_another_place_is_refused(root):
    shutil.copy(root / commit_path("train", FEATURES, 0), root / commit_path("train", FEATURES, 1))
    with pytest.raises(CorruptError, match=r"000001.json: a commit record of another place was put here"):
        read_all(root)
    assert one_fault(root, deep=False).shard == 1


def test_a_commit_of_other_samples_is_refused_even_if_its_digest_fits(root):
    path = root / commit_path("train", FEATURES, 0)
    body = json.loads(path.read_text())
    del body["digest"]
    body["ids"] = list(reversed(body["ids"]))
    path.write_text(json.dumps({**body, "digest": digest(body)}))
    with pytest.raises(CorruptError, match="does not fit the manifest"):
        read_all(root)
    assert one_fault(root, deep=False).what == "the commit does not fit the manifest"


def test_features_of_other_settings_are_never_mixed_in(root, folder):
    other = manifest(group(samples=6, shard_records=3), kinds=())
    other_root = folder / "other"
    write_pending(open_writer(other_root, type(other)(
        type(other.features)(**{**other.features.__dict__, "seed": 1}), other.targets, other.groups
    )))  # fmt: skip
    shutil.copytree(other_root / "train", root / "train", dirs_exist_ok=True)
    shutil.copy(other_root / commit_path("train", FEATURES, 1), root / commit_path("train", FEATURES, 1))
    with pytest.raises(IncompatibleError, match="shard 1 of 'train' was written with other settings"):
        read_all(root)
    fault = next(f for f in verify(root).faults if f.part == FEATURES)
    assert (fault.shard, fault.what) == (1, "committed with other settings")


def test_a_commit_of_other_targets_counts_as_absent(root):
    path = root / commit_path("train", "semantic", 0)
    body = json.loads(path.read_text())
    del body["digest"]
    body["key"] = target("depth").key
    path.write_text(json.dumps({**body, "digest": digest(body)}))
    with pytest.raises(IncompleteError, match=r"1 of 2 shards of split 'train' \(semantic\)"):
        read_all(root)
    assert one_fault(root, deep=False).kind == "missing"


@pytest.mark.parametrize("field", ["random_weights", "hints", "features", "groups", "target_specs", "feature_spec"])
def test_an_edited_root_is_refused(root, field):
    node = json.loads((root / "zarr.json").read_text())
    fields = node["attributes"]["fcache"]
    fields[field] = {"made": "up"} if isinstance(fields[field], dict) else "made up"
    (root / "zarr.json").write_text(json.dumps(node))
    with pytest.raises(CorruptError, match=r"zarr.json was changed \(its digest differs\)"):
        open_cache(root)


@pytest.mark.parametrize("damage", ["", "{}", '{"attributes": null}', '{"attributes": {"fcache": []}}', "[" * 100_000])
def test_a_root_that_is_none_is_refused(root, damage):
    (root / "zarr.json").write_text(damage)
    with pytest.raises(CorruptError, match="is no root of a cache"):
        open_cache(root)
    with pytest.raises(CorruptError, match="is no root of a cache"):
        open_writer(root, manifest(group(), kinds=KINDS))


def test_an_edited_or_missing_manifest_is_refused(root):
    (path,) = (root / "manifest").glob("*.json")
    body = path.read_text()
    path.write_text(body.replace('"views":1', '"views":2'))
    with pytest.raises(CorruptError, match="the manifest of 'train' was changed"):
        open_cache(root)
    path.unlink()
    with pytest.raises(CorruptError, match="is missing, the cache's root names it"):
        open_cache(root)


def test_edited_cut_or_missing_sample_ids_are_refused_when_they_are_needed(root):
    (path,) = (root / "manifest").glob("*.ids")
    body = path.read_bytes()
    for changed, error in ((body.replace(b"#1", b"#9"), "was changed"), (body[:-1], "bytes, the manifest says")):
        path.write_bytes(changed)
        with pytest.raises(CorruptError, match=error):
            read_all(root)
        with pytest.raises(CorruptError, match=error):
            verify(root)
    path.unlink()
    with pytest.raises(CorruptError, match=r"\.ids is missing, the manifest names it"):
        read_all(root)


def test_edited_digests_of_samples_are_found(root):
    (path,) = (root / "manifest").glob("*.digests")
    path.write_bytes(path.read_bytes().replace(b"digest", b"digits"))
    with pytest.raises(CorruptError, match="was changed"):
        read_all(root)
    with pytest.raises(CorruptError, match="was changed"):
        verify(root)


@pytest.mark.parametrize("name", ["zarr.json", "train/zarr.json", "train/level-4/zarr.json", "train/targets/zarr.json"])
def test_metadata_that_other_readers_need_is_checked(root, name):
    node = json.loads((root / name).read_text())
    node["zarr_format"] = 2
    (root / name).write_text(json.dumps(node))
    read_all(root)
    assert one_fault(root, deep=False).what == f"{name} is not as written"
    if name != "zarr.json":
        (root / name).unlink()
        assert one_fault(root, deep=False).what == f"{name} is not as written"


def test_stray_files_do_not_count(root):
    for name in ("commits/train/notes.txt", "commits/train/._000000.json", "train/level-4/c.7.0.0.0", "readme"):
        (root / name).write_text("x")
    read_all(root)
    assert not verify(root, deep=True).faults


def test_damage_is_repaired_by_making_its_shards_pending_and_writing_them_again(root, sound):
    flip(root / LEVEL, 50)
    (root / "train/targets/instances/boxes/c.0.0.0").unlink()
    (root / commit_path("train", "semantic", 1)).write_text("{")
    (root / "train/level-8/zarr.json").write_text("{}")
    faults = verify(root, deep=True).faults
    assert [(f.part, f.shard) for f in faults] == [
        ("features", -1), ("features", 1), ("semantic", 1), ("instances", 0),
    ]  # fmt: skip
    assert make_pending(root, faults) == 3
    assert {f.kind for f in verify(root, deep=True).faults if f.shard >= 0} == {"missing"}
    writer = open_writer(root, manifest(group(samples=6, shard_records=3), kinds=KINDS))
    assert [(s.index, part) for part in writer.manifest.parts() for s in writer.pending(part)] == [
        (1, "features"), (1, "semantic"), (0, "instances"),
    ]  # fmt: skip
    write_pending(writer)
    writer.finish()
    assert not verify(root, deep=True).faults
    files = {n: data for n, (data, _) in snapshot(root).items() if not n.startswith("commits/")}
    assert files == {n: data for n, (data, _) in snapshot(sound).items() if n in files}


def test_verifying_counts_and_reports_progress(root):
    seen = []
    result = verify(root, report=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(1, 7)]
    assert (result.parts, result.committed) == (6, 6)
    files = [p for p in root.rglob("c.*") if p.is_file()]
    assert result.bytes == sum(p.stat().st_size for p in files)


def test_a_record_that_is_not_committed_cannot_be_read(folder):
    writer = open_writer(folder / "c", manifest(group(samples=6, shard_records=3), kinds=()))
    write_shard(writer, writer.pending()[0])
    reader = open_cache(folder / "c", allow_partial=True)
    assert reader.read("train", "level-4", 2).shape == (3, 8, 8)
    with pytest.raises(IncompleteError, match=r"shard 1 of .*level-4 is not committed"):
        reader.read("train", "level-4", 3)


def test_a_quarantined_record_cannot_be_read(folder):
    writer = open_writer(folder / "c", manifest(group(samples=3, shard_records=3), kinds=()))
    write_pending(writer, bad=["train#1"])
    with pytest.raises(CorruptError, match="record 1 is absent"):
        open_cache(folder / "c").read("train", "level-4", 1)


@pytest.mark.parametrize(
    ("part", "change", "match"),
    [
        ("semantic", {"semantic/map": np.full((32, 32), 300)}, "semantic/map: values do not fit uint8, they reach 300"),
        ("semantic", {"semantic/map": np.full((32, 32), 0.5)}, "values do not fit uint8"),
        ("instances", {"instances/labels": np.arange(5)}, "a record has 5 entries, the cache was planned for 4"),
    ],
)
def test_targets_that_do_not_fit_are_refused_not_wrapped(folder, part, change, match):
    writer = open_writer(folder / "c", manifest(group(samples=1), kinds=KINDS))
    (shard,) = writer.pending(part)
    shard_writer = writer.write(shard, part)
    arrays = {
        a.path: np.zeros(a.shape, a.dtype)
        for a in writer.manifest.groups[0].target_arrays(part)
        if not a.path.endswith(".count")
    }
    with pytest.raises(DataError, match=match):
        shard_writer.append([0], {k: [v] for k, v in (arrays | change).items()})
    shard_writer.abort()
    assert writer.pending(part) == [shard]
    assert not list((folder / "c/partial").iterdir())


def test_a_shard_index_that_points_outside_the_file_is_refused():
    for offset, length in ((0, 41), (30, 11), (2**63, 2**63), (2**64 - 2, 3)):
        raw = index_bytes(np.asarray([[offset, length]], dtype="<u8"))
        with pytest.raises(CorruptError, match="points outside the file"):
            parse_index(raw, 1, 40 + len(raw), "shard")
    with pytest.raises(CorruptError, match="index is damaged"):
        parse_index(b"abc", 1, 3, "shard")


@pytest.mark.parametrize("size", [1, 200, 255, 256, 300, 65791, 65792, 70000, 5_000_000])
def test_zstd_frames_decode_to_exactly_their_size(size):
    data = np.random.default_rng(0).integers(0, 3, size, dtype=np.uint8)
    frame = np.frombuffer(ZSTD.encode(data), dtype=np.uint8)
    out = np.empty(size, dtype=np.uint8)
    decode_zstd(frame, out, "shard")
    np.testing.assert_array_equal(out, data)
    for wrong in (size + 1, size - 1, 2 * size + 1):
        if wrong >= 0:
            with pytest.raises(CorruptError, match=f"decodes to {size} bytes, expected {wrong}"):
                decode_zstd(frame, np.empty(wrong, dtype=np.uint8), "shard")
    for cut in (0, 3, 4, 5, len(frame) - 1):
        with pytest.raises(CorruptError):
            decode_zstd(frame[:cut], out, "shard")


def test_a_signed_group_without_extents_is_refused(sound, tmp_path):
    root = shutil.copytree(sound, tmp_path / "c")
    whole = json.loads((root / "zarr.json").read_text())
    said = whole["attributes"]["fcache"]
    entry = said["groups"]["train"]
    body = json.loads((root / entry["file"]).read_text()) | {"extents": []}
    data = canonical_json(body)
    (root / entry["file"]).write_bytes(data)
    entry["sha256"] = hashlib.sha256(data).hexdigest()
    said["digest"] = digest({k: v for k, v in said.items() if k != "digest"})
    (root / "zarr.json").write_text(json.dumps(whole))
    with pytest.raises(CorruptError, match="'train' has no extents"):
        open_cache(root)


WITHOUT_MEMORY = """
import resource
import numpy as np
from fcache.cache_spec.shardfile import ZSTD, decode_zstd

frame = np.frombuffer(ZSTD.encode(np.arange(60000, dtype=np.uint8)), dtype=np.uint8)
out, kept, size = np.empty(60000, dtype=np.uint8), [], 1 << 20
with open("/proc/self/statm") as file:
    pages = int(file.read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), resource.RLIM_INFINITY))
while size >= 1024:
    try:
        kept.append(bytearray(size))
    except MemoryError:
        size //= 2
try:
    decode_zstd(frame, out, "shard")
except MemoryError as error:
    kept.clear()
    print(error)
"""


def test_a_decoder_without_memory_does_not_call_a_record_damaged():
    found = subprocess.run([sys.executable, "-c", WITHOUT_MEMORY], capture_output=True, text=True, check=True)
    assert found.stdout == "shard: no memory to decompress a record\n"


def test_every_error_of_a_cache_is_one_that_the_command_line_explains():
    for kind in (CorruptError, DataError, IncompatibleError, IncompleteError):
        assert issubclass(kind, FcacheError)


def test_a_commit_is_read_back_as_it_was_written(root):
    commit = find_commit(LocalStorage(root), commit_path("train", FEATURES, 0))
    assert commit.ids == ("train#0", "train#1", "train#2")
    assert commit.facts == {"records": 3}
    assert set(commit.run) == {"time", "seconds", "host", "pid"}
    assert all(len(sha) == 64 for _, sha in commit.files.values())
