"""The commands that look at caches: info, ls, verify."""

import json
import stat
from pathlib import Path

from fcache.cli import main


def shard_file(cache: Path, shard: int) -> Path:
    """The file of the level's codes of a training shard, as its commit names it."""
    files = json.loads((cache / "commits" / "train" / f"{shard:06d}.json").read_text())["files"]
    return cache / next(name for name in files if name.startswith("train/level-8/"))


def test_info_names_identity_extent_and_sizes(cache: Path, capsys) -> None:
    assert main(["info", str(cache)]) == 0
    out = capsys.readouterr().out
    assert "tiny, fp32" in out
    assert "sha256 abababababababab" in out
    assert "class of imagefolder, 2 classes" in out
    assert "level-8  C H W = 3 × 4 × 4, stride 8" in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert rows["train"][1:6] == ["9", "1", "32x32", "int8", "3/3"]
    assert rows["val/32x32"][1:6] == ["3", "1", "32x32", "int8", "1/1"]


def test_info_as_json_holds_both_digests(cache: Path, capsys) -> None:
    from fcache.cache_spec import open_cache, targets_key

    assert main(["info", str(cache), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    manifest = open_cache(cache).manifest
    assert facts["features"] == manifest.features.key
    assert facts["targets"] == targets_key(manifest.targets)
    assert [g["committed"] for g in facts["groups"]] == [{"features": 3, "class": 3}, {"features": 1, "class": 1}]


def test_info_says_loudly_that_weights_are_random(make_cache, tmp_path: Path, capsys) -> None:
    main(["info", str(make_cache(tmp_path / "c", random_weights="random:0"))])
    assert "RANDOM (random:0)" in capsys.readouterr().out


def test_info_of_no_cache_is_a_usage_error(tmp_path: Path, capsys) -> None:
    assert main(["info", str(tmp_path)]) == 2
    assert "no cache at" in capsys.readouterr().err


def test_verify_passes_a_complete_cache(cache: Path, capsys) -> None:
    assert main(["verify", str(cache)]) == 0
    assert main(["verify", str(cache), "--deep"]) == 0
    assert "8 of 8 parts of shards committed" in capsys.readouterr().out


def test_verify_ends_with_3_when_shards_are_missing(make_cache, tmp_path: Path, capsys) -> None:
    assert main(["verify", str(make_cache(tmp_path / "c", shards=1))]) == 3
    out = capsys.readouterr().out
    assert "missing train/features shard 1: not committed" in out
    assert "2 of 8 parts" in out


def test_verify_ends_with_4_when_a_byte_is_wrong_and_only_deep_sees_it(cache: Path, capsys) -> None:
    shard = shard_file(cache, 1)
    data = bytearray(shard.read_bytes())
    data[3] ^= 1
    shard.write_bytes(data)
    assert main(["verify", str(cache)]) == 0
    assert main(["verify", str(cache), "--deep", "--json"]) == 4
    out, err = capsys.readouterr()
    faults = json.loads(out[out.index("{") :])["faults"]
    assert [(f["group"], f["part"], f["shard"], f["kind"]) for f in faults] == [("train", "features", 1, "corrupt")]
    assert "1 parts of shards are corrupt" in err


def test_verify_ends_with_4_when_a_shard_file_is_gone(cache: Path, capsys) -> None:
    shard_file(cache, 2).unlink()
    assert main(["verify", str(cache)]) == 4
    assert "corrupt train/features shard 2:" in capsys.readouterr().out


def test_ls_finds_caches_and_says_which_are_incomplete(make_cache, tmp_path: Path, capsys) -> None:
    make_cache(tmp_path / "deep" / "a.fcache")
    make_cache(tmp_path / "b.fcache", shards=2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    assert main(["ls", str(tmp_path), "--json"]) == 0
    found = {Path(f["path"]).name: f for f in json.loads(capsys.readouterr().out)}
    assert {name: f["state"] for name, f in found.items()} == {
        "a.fcache": "complete",
        "b.fcache": "4/8 parts of shards",
    }
    assert found["a.fcache"]["what"] == "tiny · imagefolder"
    assert found["a.fcache"]["bytes"] > 0


def test_ls_lists_a_damaged_cache_beside_the_sound_ones(make_cache, cache: Path, capsys) -> None:
    bad = make_cache(cache.parent / "bad.fcache")
    next((bad / "manifest").glob("*.json")).write_text("{}")
    assert main(["ls", str(cache.parent)]) == 0
    out = capsys.readouterr().out
    assert "unreadable:" in out
    assert "complete" in out


def test_ls_of_an_empty_folder_says_so(tmp_path: Path, capsys) -> None:
    assert main(["ls", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no cache and no run below {tmp_path}\n"


def test_looking_writes_nothing(cache: Path) -> None:
    def state() -> list[tuple[str, int, float]]:
        return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(cache.rglob("*"))]

    before = state()
    for path in [cache, *cache.rglob("*")]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    try:
        assert [
            main(["info", str(cache)]),
            main(["verify", str(cache), "--deep"]),
            main(["ls", str(cache.parent)]),
        ] == [0] * 3
        assert state() == before
    finally:
        for path in [cache, *cache.rglob("*")]:
            path.chmod(path.stat().st_mode | stat.S_IWUSR)
