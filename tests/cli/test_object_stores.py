"""The whole path on an S3 server: extract to it, train from it, verify, repair; through good networks and bad ones."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3server import ENVIRONMENT, Proxy, make_bucket, proxy, s3_environment, s3_server

pytest.importorskip("obstore")

from fcache.cache_spec import StreamConfig, open_cache, open_source, open_storage, verify
from fcache.cache_spec.storage.protocol import Storage
from fcache.cli import main
from fcache.extractor import write_scenes

EXTRACT = [
    "extract", "--model", "test_resnet", "--weights", "random:0", "--dataset", "ade20k", "--precision", "fp32",
    "--view-recipe", "ade20k-small", "--input-size", "64", "64", "--workers", "0", "--device", "cpu", "--views", "1",
    "--split", "train", "--shard-records", "2", "--levels", "8,16",
]  # fmt: skip
LEVELS, SHARDS, SAMPLES = 2, 2, 4


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as endpoint:
        make_bucket(endpoint, "bucket")
        yield endpoint


@pytest.fixture
def network(server: str) -> Iterator[Proxy]:
    with proxy(server) as state, s3_environment(state.endpoint):
        yield state


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(root, train=SAMPLES, val=1, size=(64, 80))
    return root


@pytest.fixture(scope="module")
def local(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache in a folder: what every object store must hold in the end."""
    cache = tmp_path_factory.mktemp("local") / "c.fcache"
    assert main([*EXTRACT, "--data-root", str(scenes), "--cache", str(cache)]) == 0
    return cache


@pytest.fixture
def line(scenes: Path) -> list[str]:
    """The extraction into a new place of the bucket; the last word is its URL."""
    return [*EXTRACT, "--data-root", str(scenes), "--cache", f"s3://bucket/{uuid.uuid4().hex}/c.fcache"]


def start(line: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "fcache.cli", *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip


def content(storage: Storage) -> dict[str, Any]:
    """Every file by name; of commits all but times and hosts, and the digest over these."""
    found: dict[str, Any] = {}
    for name, _ in storage.walk():
        data = storage.read(name)
        if name.startswith("commits/"):
            commit = json.loads(data)
            del commit["run"], commit["digest"]
            data = json.dumps(commit, sort_keys=True).encode()
        found[name] = data
    return found


def assert_equal(url: str, local: Path) -> None:
    there, here = content(open_storage(url)), content(open_storage(local))
    assert sorted(there) == sorted(here)
    assert [name for name in here if there[name] != here[name]] == []


def test_an_extraction_to_a_store_equals_one_to_a_folder_and_no_secret_is_stored(
    network: Proxy, line: list[str], local: Path, capfd
) -> None:
    assert main(line) == 0
    assert_equal(line[-1], local)
    assert main(["verify", line[-1], "--deep"]) == 0
    assert main(["info", line[-1], "--json"]) == 0
    out, err = capfd.readouterr()
    secret = ENVIRONMENT["AWS_SECRET_ACCESS_KEY"]
    assert secret not in out + err
    assert not [n for n, data in content(open_storage(line[-1])).items() if secret.encode() in data]
    network.requests.clear()
    assert main(line) == 0
    assert "0 records in" in capfd.readouterr().out
    left = [(m, p) for m, p in network.requests if m == "PUT" and not p.endswith(("/lock", "~")) and "partial" not in p]
    assert left == []


def test_a_head_trained_from_a_store_is_the_one_trained_from_a_folder(
    network: Proxy, local: Path, tmp_path: Path, capsys
) -> None:
    url = f"s3://bucket/{uuid.uuid4().hex}"
    assert main(["copy", str(local), url]) == 0
    runs = []
    for cache in (str(local), url):
        out = tmp_path / str(len(runs))
        line = ["train-head", "--cache", cache, "--head", "linear", "--allow-random-backbone", "--device", "cpu"]
        assert main([*line, "--set", "batch_size=2", "--iters", "6", "--out", str(out)]) == 0
        runs.append(next(out.iterdir()))
    from safetensors.numpy import load_file

    weights = [[load_file(f) for f in sorted(run.glob("*.safetensors"))] for run in runs]
    assert weights[0]
    assert [sorted(w) for w in weights[0]] == [sorted(w) for w in weights[1]]
    for one, other in zip(*weights, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    secret = ENVIRONMENT["AWS_SECRET_ACCESS_KEY"].encode()
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and secret in p.read_bytes()]


def test_an_epoch_costs_one_ranged_read_a_record_and_level_or_fewer(network: Proxy, local: Path) -> None:
    url = f"s3://bucket/{uuid.uuid4().hex}"
    assert main(["copy", str(local), url]) == 0
    reader = open_cache(url)
    source = open_source(reader, "train", StreamConfig(batch_size=2, threads=1, kinds=()))
    records = sum(len(block.ids) for block in source.blocks(0))
    network.requests.clear()
    again = sum(len(block.ids) for block in source.blocks(1))
    reads = [path for method, path in network.requests if method == "GET" and "/level-" in path]
    assert records == again == SAMPLES
    assert len(reads) <= records * LEVELS
    assert len([1 for method, _ in network.requests if method == "GET"]) <= records * LEVELS
    # Shard indices and the small tables came in the first epoch and are kept.
    assert {method for method, _ in network.requests} <= {"GET"}


def test_an_extraction_that_is_killed_continues_on_the_store(network: Proxy, line: list[str], local: Path) -> None:
    network.seconds = 0.01
    process = start(line)
    try:
        while (
            not any("/commits/" in path and method == "PUT" for method, path in network.requests)
            and process.poll() is None
        ):
            time.sleep(0.01)
        assert process.poll() is None, "it was over before it could be killed"
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    network.seconds = 0.0
    found = verify(line[-1], deep=True)
    assert (found.corrupt, len(found.missing) > 0) == ((), True)
    assert main(line) == 0
    assert_equal(line[-1], local)


def test_extractors_at_once_share_the_shards_of_a_store(network: Proxy, line: list[str], local: Path) -> None:
    network.seconds = 0.02
    processes = [start(line) for _ in range(2)]
    results = [p.communicate(timeout=200) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], results
    assert_equal(line[-1], local)
    commits = Counter(path for method, path in network.requests if method == "PUT" and "/commits/" in path)
    assert len(commits) == 2 * SHARDS
    assert set(commits.values()) == {1}


def test_a_bad_network_changes_nothing_but_the_time(network: Proxy, line: list[str], local: Path) -> None:
    number, kinds = itertools.count(), itertools.cycle(["reset", "503", "lost", "cut", "lost 500"])
    network.fault = lambda method, path: next(kinds) if next(number) % 7 == 4 else ""
    assert main(line) == 0
    assert main(["verify", line[-1], "--deep"]) == 0
    assert len(network.requests) > 7 * 10
    network.fault = lambda method, path: ""
    assert_equal(line[-1], local)


def test_a_damaged_shard_in_a_store_is_repaired(network: Proxy, line: list[str], local: Path, capsys) -> None:
    assert main(["copy", str(local), line[-1]]) == 0
    storage = open_storage(line[-1])
    name = next(n for n, _ in storage.walk() if n.startswith("train/level-8/c.1"))
    data = bytearray(storage.read(name))
    data[5] ^= 1
    storage.write(name, bytes(data))
    storage.remove(next(n for n, _ in storage.walk() if n.startswith("train/level-16/c.0")))
    assert main(["verify", line[-1], "--deep"]) == 4
    assert main(["repair", line[-1], "--device", "cpu", "--workers", "0"]) == 0
    assert_equal(line[-1], local)


def test_other_zarr_readers_read_the_store(network: Proxy, local: Path) -> None:
    import tensorstore
    import zarr

    url = f"s3://bucket/{uuid.uuid4().hex}"
    assert main(["copy", str(local), url]) == 0
    storage: Any = open_storage(url)
    expected = zarr.open_array(str(local / "train" / "level-8"), mode="r")[:]
    assert np.any(expected)
    np.testing.assert_array_equal(zarr.open_array(storage.zarr, path="train/level-8", mode="r")[:], expected)
    _, _, bucket, *prefix = url.split("/")
    spec = {
        "driver": "zarr3",
        "kvstore": {
            "driver": "s3", "bucket": bucket, "path": "/".join([*prefix, "train/level-8/"]),
            "endpoint": network.endpoint, "aws_region": "us-east-1",
            "aws_credentials": {"type": "environment"},
        },
    }  # fmt: skip
    np.testing.assert_array_equal(tensorstore.open(spec).result().read().result(), expected)
