"""Repair as a user runs it: damaged shards are made anew from the data, and only those."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fcache.cache_spec import open_cache, verify
from fcache.cli import main
from fcache.extractor import write_scenes

MODEL = ["--model", "test_resnet", "--weights", "random:0", "--dataset", "ade20k", "--precision", "fp32"]
SMALL = ["--view-recipe", "ade20k-small", "--input-size", "64", "64", "--workers", "0", "--device", "cpu"]
HERE = ["--workers", "0", "--device", "cpu"]


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    root = tmp_path / "scenes"
    write_scenes(root, train=6, val=3, size=(64, 80))
    return root


@pytest.fixture
def extract(scenes: Path, tmp_path: Path) -> Callable[..., int]:
    return lambda *more: main(
        ["extract", *MODEL, *SMALL, "--data-root", str(scenes), "--cache", str(tmp_path / "c.fcache"), *more]
    )


def shards(cache: Path) -> dict[str, bytes]:
    return {str(p.relative_to(cache)): p.read_bytes() for p in cache.glob("*/**/c.*")}


def times(cache: Path) -> dict[str, int]:
    return {str(p.relative_to(cache)): p.stat().st_mtime_ns for p in cache.glob("commits/**/*.json")}


def flip(cache: Path, pattern: str) -> Path:
    path = min(cache.glob(pattern))
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    return path


def test_damaged_shards_are_made_anew_and_no_others(extract, scenes: Path, tmp_path: Path, capsys) -> None:
    cache = tmp_path / "c.fcache"
    assert extract("--views", "2", "--limit", "4") == 0
    assert main(["repair", str(cache)]) == 0
    assert "nothing is damaged" in capsys.readouterr().out
    whole, before = shards(cache), times(cache)
    manifest = (cache / "zarr.json").read_bytes()
    flip(cache, "train/level-8/c.1.*")
    min(cache.glob("train/targets/semantic/map/c.2.*")).unlink()
    (cache / "commits/val/64x96/000000.json").write_text("{}")
    assert main(["verify", str(cache), "--deep"]) == 4
    assert f"run `fcache repair {cache}`" in capsys.readouterr().err

    assert main(["repair", str(cache), "--dry-run"]) == 4
    out = capsys.readouterr().out
    assert "train/features shard 1: train/level-8/c.1" in out
    assert "3 faults would be repaired; nothing was changed" in out
    assert main(["verify", str(cache), "--deep"]) == 4

    assert main(["repair", str(cache), *HERE]) == 0
    assert main(["verify", str(cache), "--deep"]) == 0
    assert shards(cache) == whole
    # More samples and views would be there to extract: the cache has what it had.
    assert (cache / "zarr.json").read_bytes() == manifest
    after = times(cache)
    assert {n for n in before if before[n] != after[n]} == {
        "commits/train/000001.json",
        "commits/train/semantic/000002.json",
        "commits/val/64x96/000000.json",
    }


def test_metadata_is_restored_without_data_or_weights(extract, scenes: Path, tmp_path: Path, capsys) -> None:
    cache = tmp_path / "c.fcache"
    assert extract("--limit", "2") == 0
    node = cache / "train" / "level-8" / "zarr.json"
    good = node.read_bytes()
    node.write_bytes(good.replace(b'"int8"', b'"uint8"'))
    scenes.rename(tmp_path / "elsewhere")
    assert main(["repair", str(cache)]) == 0
    assert "train/level-8/zarr.json is not as written" in capsys.readouterr().out
    assert node.read_bytes() == good
    # A commit that belongs to no shard goes, too.
    stray = cache / "commits" / "train" / "000099.json"
    stray.write_bytes(min(stray.parent.iterdir()).read_bytes())
    assert main(["verify", str(cache)]) == 4
    assert main(["repair", str(cache)]) == 0
    assert "no shard had to be made" in capsys.readouterr().out
    assert main(["verify", str(cache), "--deep"]) == 0


def test_what_no_manifest_implies_is_not_repaired(extract, tmp_path: Path, capsys) -> None:
    cache = tmp_path / "c.fcache"
    assert extract("--limit", "2", "--encoding", "rot:1", "--compression", "zstd") == 0
    table = min((cache / "tables").rglob("c*"))
    table.write_bytes(bytes(len(table.read_bytes())))
    flip(cache, "train/level-8/c.0.*")
    before = times(cache)
    assert main(["repair", str(cache), *HERE]) == 4
    assert "restore" in capsys.readouterr().err
    assert times(cache) == before


def test_data_that_moved_are_named_and_others_are_refused_before_a_commit_is_taken_back(
    extract, scenes: Path, tmp_path: Path, capsys
) -> None:
    cache = tmp_path / "c.fcache"
    assert extract("--limit", "4") == 0
    flip(cache, "train/level-8/c.0.*")
    before = times(cache)
    scenes.rename(tmp_path / "moved")
    assert main(["repair", str(cache), *HERE]) == 1
    write_scenes(scenes, train=6, val=3, size=(80, 80))
    assert main(["repair", str(cache), *HERE]) == 5
    assert "changed since the cache was made" in capsys.readouterr().err
    assert main(["repair", str(cache), *HERE, "--data-root", str(tmp_path / "moved"), "--weights", "random:1"]) == 5
    assert times(cache) == before
    assert main(["repair", str(cache), *HERE, "--data-root", str(tmp_path / "moved")]) == 0
    assert verify(cache, deep=True).faults == ()


def test_samples_that_are_gone_are_named_before_a_commit_is_taken_back(
    extract, scenes: Path, tmp_path: Path, capsys
) -> None:
    cache = tmp_path / "c.fcache"
    assert extract("--shard-records", "2") == 0
    flip(cache, "train/level-8/c.1.*")
    before = times(cache)
    for folder in ("images", "annotations"):
        sorted((scenes / folder / "training").iterdir())[2].unlink()
    assert main(["repair", str(cache), *HERE]) == 1
    assert "scene_training_000002" in capsys.readouterr().err
    assert times(cache) == before


def test_quarantined_samples_are_tried_again_and_their_mended_files_taken(
    extract, scenes: Path, tmp_path: Path, capsys
) -> None:
    cache = tmp_path / "c.fcache"
    photos = sorted((scenes / "images" / "training").iterdir())[:2]
    whole = [p.read_bytes() for p in photos]
    for photo, data in zip(photos, whole, strict=True):
        photo.write_bytes(data[:-400])
    assert extract("--shard-records", "1", "--views", "1") == 3
    assert len(open_cache(cache).quarantined("train")) == 2
    before = times(cache)
    capsys.readouterr()

    assert main(["repair", str(cache), "--quarantined", "--dry-run"]) == 3
    assert "train/features shard 0: without 1 samples (scene_training_000000)" in capsys.readouterr().out
    # One is mended, the other is still broken, otherwise.
    photos[0].write_bytes(whole[0])
    photos[1].write_bytes(whole[1][:-200])
    assert main(["repair", str(cache), "--quarantined", *HERE]) == 3
    assert set(open_cache(cache).quarantined("train")) == {"scene_training_000001"}
    assert {n.split("/")[-1] for n, t in times(cache).items() if before[n] != t} == {"000000.json", "000001.json"}
    photos[1].write_bytes(whole[1])
    assert main(["repair", str(cache), "--quarantined", *HERE]) == 0
    assert open_cache(cache).quarantined("train") == {}
    assert verify(cache, deep=True).faults == ()
    fresh = tmp_path / "fresh.fcache"
    assert extract("--shard-records", "1", "--views", "1", "--cache", str(fresh)) == 0
    assert shards(cache) == shards(fresh)


def test_the_file_of_a_sample_that_has_a_record_may_not_change(extract, scenes: Path, tmp_path: Path, capsys) -> None:
    cache = tmp_path / "c.fcache"
    photos = sorted((scenes / "images" / "training").iterdir())
    data = photos[0].read_bytes()
    photos[0].write_bytes(data[:-400])
    assert extract("--shard-records", "2") == 3
    manifest = (cache / "zarr.json").read_bytes()
    photos[0].write_bytes(data)
    photos[3].write_bytes(photos[3].read_bytes() + b"0")
    assert main(["repair", str(cache), "--quarantined", *HERE]) == 5
    assert "scene_training_000003" in capsys.readouterr().err
    assert (cache / "zarr.json").read_bytes() == manifest


def test_a_cache_that_does_not_say_how_it_was_made_is_left_as_it_is(make_cache, tmp_path: Path, capsys) -> None:
    cache = make_cache(tmp_path / "c")
    flip(cache, "train/level-8/c.0.*")
    before = times(cache)
    assert main(["repair", str(cache)]) == 2
    assert "does not say its model" in capsys.readouterr().err
    assert times(cache) == before


def test_a_cache_with_pending_shards_only_is_not_damaged(make_cache, tmp_path: Path, capsys) -> None:
    assert main(["repair", str(make_cache(tmp_path / "c", shards=1))]) == 3
    assert "nothing is damaged, 6 parts of shards were never committed" in capsys.readouterr().out


def test_hints_are_what_repair_needs(extract, tmp_path: Path) -> None:
    assert extract("--limit", "1") == 0
    hints = json.loads((tmp_path / "c.fcache" / "zarr.json").read_text())["attributes"]["fcache"]["hints"]
    assert {"model", "weights", "dataset", "root", "view_recipe", "input_size", "window", "levels"} <= set(hints)
