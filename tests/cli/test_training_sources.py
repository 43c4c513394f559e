"""train-head on a cache that an extraction still writes, and on one that is kept in memory."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fcache.cli import main
from fcache.extractor import write_scenes
from fcache.heads import resident

EXTRACT = ["extract", "--model", "test_resnet", "--weights", "random:0", "--dataset", "ade20k", "--precision", "fp32"]
EXTRACT += ["--view-recipe", "ade20k-small", "--input-size", "64", "64", "--workers", "0", "--device", "cpu"]
TRAIN = ["train-head", "--head", "linear", "--allow-random-backbone", "--device", "cpu", "--set", "batch_size=2"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(root, train=8, val=2, size=(64, 80))
    return root


@pytest.fixture(scope="module")
def cache(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("caches") / "c.fcache"
    assert main([*EXTRACT, "--data-root", str(scenes), "--cache", str(path), "--compression", "zstd"]) == 0
    return path


def trained(cache: Path, out: Path, *more: str, iterations: int = 6) -> dict:
    assert main([*TRAIN, "--cache", str(cache), "--iters", str(iterations), "--out", str(out), *more]) == 0
    return json.loads((out / "linear-seed0" / "run.json").read_text())


def weights(out: Path) -> bytes:
    return (out / "linear-seed0" / "weights.safetensors").read_bytes()


def test_training_in_another_process_follows_an_extraction(scenes: Path, tmp_path: Path) -> None:
    cache, out = tmp_path / "c.fcache", tmp_path / "runs"
    extract = [*EXTRACT, "--data-root", str(scenes), "--cache", str(cache), "--views", "6", "--shard-records", "1"]
    # Of 50 shards the 100th part from the 99th on has none: a cache without a record.
    assert main([*extract, "--part", "99/100"]) == 3
    line = [*TRAIN, "--cache", str(cache), "--out", str(out), "--iters", "300", "--follow"]
    line += ["--set", "checkpoint_every=10"]
    with subprocess.Popen([sys.executable, "-m", "fcache.cli", *line], stderr=subprocess.PIPE, text=True) as training:
        try:
            assert training.stderr is not None
            waiting = next(text for text in iter(training.stderr.readline, "") if "waiting" in text)
            assert "split train: waiting for what is not committed yet" in waiting
            assert main([*extract, "--part", "0/8"]) == 3
            while not list(out.glob("*/checkpoint.pt")):
                assert training.poll() is None
                time.sleep(0.01)
            # It sleeps, so that the rest is there before it ends.
            training.send_signal(signal.SIGSTOP)
            assert main(extract) == 0
            training.send_signal(signal.SIGCONT)
            training.stderr.read()
            assert training.wait(timeout=120) == 0
        finally:
            training.kill()
    run = json.loads((out / "linear-seed0" / "run.json").read_text())
    first, *_, last = run["extent"]["training"]["epochs"]
    assert first["samples"] < last["samples"]
    assert run["extent"]["validation"]["samples"] == 2
    assert 0 <= run["evaluations"][-1]["metrics"]["miou"] <= 1
    assert main(["compare", "--cache", str(cache), str(out)]) == 0


def test_a_followed_whole_cache_and_one_in_memory_give_the_same_weights(cache: Path, tmp_path: Path) -> None:
    plain = trained(cache, tmp_path / "plain", "--resident", "none")
    for more in (["--follow"], ["--resident", "ram"], []):
        out = tmp_path / "-".join(["run", *more])
        run = trained(cache, out, *more)
        assert weights(out) == weights(tmp_path / "plain")
        assert run["extent"] == plain["extent"]
        assert run["evaluations"] == plain["evaluations"]


def test_a_compressed_split_that_fits_is_read_once(cache: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    made = []
    real = resident.hold
    monkeypatch.setattr(resident, "hold", lambda *a: made.append(a) or real(*a))
    trained(cache, tmp_path / "streamed", "--resident", "none")
    assert not made
    trained(cache, tmp_path / "kept")
    assert len(made) == 1
    assert "train  split train is kept in RAM: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--follow", "--resident", "ram"], "a split that grows is not kept in memory"),
        (["--resident", "device"], "kept on a GPU, the device is cpu"),
        (["--resident", "ram"], "0.00 GB are free in RAM"),
        (["--resident", "disk"], "auto"),
    ],
)
def test_what_cannot_be_kept_in_memory_is_a_usage_error(cache, tmp_path, capsys, monkeypatch, more, message) -> None:
    monkeypatch.setattr(resident, "free_memory", lambda device: 0)
    assert main([*TRAIN, "--cache", str(cache), "--iters", "2", "--out", str(tmp_path / "runs"), *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
