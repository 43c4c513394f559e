"""`fcache copy` and `fcache gc` as a user runs them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fcache.cli import main


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def state(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_cache_is_copied_and_again_only_what_is_new(make_cache, tmp_path: Path, capsys) -> None:
    cache, copy = make_cache(tmp_path / "a", shards=1), tmp_path / "b"
    assert main(["copy", str(cache), str(copy), "--dry-run"]) == 3
    assert "2 parts of shards to copy" in capsys.readouterr().out
    assert not copy.exists()
    assert main(["copy", str(cache), str(copy)]) == 3
    assert "6 parts of shards are not committed at the source" in capsys.readouterr().out
    make_cache(tmp_path / "a")
    assert main(["copy", str(cache), str(copy)]) == 0
    assert "6 parts of shards copied" in capsys.readouterr().out
    assert state(copy) == state(cache)
    assert main(["copy", str(cache), str(copy)]) == 0
    assert "0 parts of shards copied, 0 B read; 8 were there already" in capsys.readouterr().out


def test_a_damaged_shard_is_named_left_out_and_the_exit_status_is_4(cache: Path, tmp_path: Path, capsys) -> None:
    shard = min((cache / "train" / "level-8").glob("c.1.*"))
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    assert main(["copy", str(cache), str(tmp_path / "b")]) == 4
    out, err = capsys.readouterr()
    assert "damaged train/features shard 1: train/level-8/c.1" in out
    assert "left out; run `fcache repair" in err
    assert main(["verify", str(tmp_path / "b"), "--deep"]) == 3


def test_a_target_of_another_identity_is_refused_with_5(make_cache, cache: Path, tmp_path: Path, capsys) -> None:
    from cachebuilder import group, manifest, write_pending

    from fcache.cache_spec import open_writer

    write_pending(open_writer(tmp_path / "b", manifest(group("train", 2))))
    assert main(["copy", str(cache), str(tmp_path / "b")]) == 5
    assert "made with other settings" in capsys.readouterr().err


def test_gc_lists_what_nothing_needs_with_its_bytes_and_removes_it_when_told(cache: Path, dead: int, capsys) -> None:
    before = state(cache)
    (cache / "partial").mkdir()
    (cache / "partial" / f"{socket.gethostname()}~{dead}~1").write_bytes(b"12345")
    (cache / "partial" / f"{socket.gethostname()}~{os.getpid()}~1").write_bytes(b"1")
    (cache / "notes.txt").write_text("mine")
    assert main(["gc", str(cache)]) == 0
    out = capsys.readouterr().out
    assert f"to remove  {cache}/partial/{socket.gethostname()}~{dead}~1  5 bytes  temporary" in out
    assert f"left alone  {cache}/notes.txt  4 bytes" in out
    assert "nothing was changed" in out
    assert main(["gc", str(cache), "--apply", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(g["bytes"], g["kind"]) for g in found["garbage"]] == [(5, "temporary")]
    assert state(cache) == before | {
        f"partial/{socket.gethostname()}~{os.getpid()}~1": b"1",
        "notes.txt": b"mine",
    }
    assert main(["gc", str(cache)]) == 0
    assert f"{cache}: 0 files that nothing needs to remove, 0 B" in capsys.readouterr().out


def test_gc_of_a_folder_names_superseded_caches_and_removes_them_only_when_told(
    make_cache, tmp_path: Path, capsys
) -> None:
    whole, part = make_cache(tmp_path / "whole"), make_cache(tmp_path / "sub" / "part", shards=1)
    assert main(["gc", str(tmp_path)]) == 0
    assert f"superseded  {part}" in capsys.readouterr().out
    assert main(["gc", str(tmp_path), "--superseded"]) == 2
    assert "belongs to --apply" in capsys.readouterr().err
    assert main(["gc", str(tmp_path), "--apply"]) == 0
    assert "1 superseded caches stay" in capsys.readouterr().out
    before = state(whole)
    assert main(["gc", str(tmp_path), "--apply", "--superseded"]) == 0
    assert f"removed  {part}" in capsys.readouterr().out
    assert not part.exists()
    assert state(whole) == before


def test_a_damaged_cache_is_left_alone_and_the_others_are_cleaned(
    make_cache, tmp_path: Path, dead: int, capsys
) -> None:
    good, bad = make_cache(tmp_path / "good"), make_cache(tmp_path / "bad")
    min((bad / "manifest").glob("*.json")).write_text("{}")
    before = state(bad)
    (good / "partial").mkdir()
    (good / "partial" / f"{socket.gethostname()}~{dead}~1").write_bytes(b"1")
    assert main(["gc", str(tmp_path), "--apply"]) == 4
    out, err = capsys.readouterr()
    assert "1 files that nothing needs removed" in out
    assert "bad/manifest" in err
    assert state(bad) == before
    assert not (good / "partial").exists()


def test_gc_of_a_folder_without_caches_is_a_usage_error(tmp_path: Path, capsys) -> None:
    assert main(["gc", str(tmp_path)]) == 2
    assert "no cache at" in capsys.readouterr().err
    assert main(["gc", str(tmp_path / "nothing")]) == 2
