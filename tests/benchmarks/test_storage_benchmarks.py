"""The benchmarks of the store run, compare bit for bit before they time, and compute their ratios right."""

import hashlib
import json
import os
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

# Some peers leave files open, or warn of themselves.
PEERS_WARN = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning", "ignore::UserWarning"
)


@PEERS_WARN
def test_warm_measures_every_variant_that_is_installed(workload, tmp_path):
    import warm
    from storage.peers import PEERS

    result = warm.measure(tmp_path, workload, 1)
    titles = ["fp16", "int8", "int8 with zstd", "int8, decoded to fp16", "int8, decoded to fp32"]
    assert list(result["rows"]) == titles
    for title, rows in result["rows"].items():
        assert sum(name.startswith("fcache") for name in rows) == 3
        assert all(row["mb_per_s"] > 0 for name, row in rows.items() if "not installed" not in name), title
    found = {name.removesuffix(" (not installed)") for name in result["rows"]["fp16"]}
    assert set(PEERS) < found
    assert warm.tables(result).count("\n| ") == sum(len(rows) + 1 for rows in result["rows"].values())


def test_a_reader_of_wrong_numbers_is_not_timed(workload, stored):
    from storage.ours import cache_batches
    from storage.rounds import check

    truth = workload.flat(stored / "flat.bin")
    check(cache_batches(stored / "cache", workload), truth, workload, "fcache")
    changed = truth.copy()
    changed["level-8"].view(np.uint16)[3, 0, 0, 0] ^= 1
    with pytest.raises(SystemExit, match="fcache reads other numbers"):
        check(cache_batches(stored / "cache", workload), changed, workload, "fcache")


@pytest.mark.parametrize("numbers", [[[0, 1], [2, 3]], [[0, 1], [2, 3], [4, 4]]], ids=["missing", "twice"])
def test_a_reader_that_leaves_records_out_or_repeats_them_is_not_timed(workload, stored, numbers):
    from storage.rounds import check

    truth = workload.flat(stored / "flat.bin")

    def batches(epoch):
        for rows in numbers:
            yield rows, {name: torch.from_numpy(truth[name][rows]) for name in truth.dtype.names}

    with pytest.raises(SystemExit, match="of 6 records"):
        check(batches, truth, workload, "a reader")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["copy fp16", "copy int8", "zstd", "decode fp16", "decode fp32"])
def test_a_limit_gives_the_records(workload, tmp_path, name, threads):
    from storage import limits
    from storage.rounds import check

    if name != "copy fp16":
        workload = replace(workload, encoding="int8", compression="zstd" if name == "zstd" else "none")
    workload.write_flat(tmp_path / "flat.bin")
    truth = workload.flat(tmp_path / "flat.bin")
    workload.write_cache(tmp_path / "cache", truth)
    if name.startswith("decode"):
        limit = limits.decode_limit(tmp_path, workload, threads, to=name.split()[1])
        truth = workload.decode(truth, name.split()[1])
    else:
        limit = getattr(limits, f"{name.split()[0]}_limit")(tmp_path, workload, threads)
    check(limit, truth, workload, name)


def test_a_ratio_is_to_the_rounds_of_the_limit_around_it():
    from storage.rounds import sandwich

    # The first round finds nothing in memory. Then the machine slows down threefold; the variant always needs half.
    limits = iter([9.0, 1.0, 1.0, 3.0, 3.0])
    variants = iter([0.5, 1.0, 1.5])
    row = sandwich(lambda r: (next(variants), 0.1, 1000), lambda r: (next(limits), 0.1, 1000), 3)
    assert (row["ratio"], row["low"], row["high"], row["rounds"]) == (2.0, 2.0, 2.0, 3)


def test_a_ratio_is_of_bytes_a_second():
    from storage.rounds import sandwich

    row = sandwich(lambda r: (1.0, 0.1, 500), lambda r: (1.0, 0.1, 1000), 3)
    assert row["ratio"] == 0.5


def test_evicted_files_are_not_in_memory_and_mapped_ones_are_noticed(workload, stored):
    from storage.pages import evict, files_below, resident

    paths = [p for p in files_below(stored / "cache") if p.suffix != ".json"]
    for path in paths:
        path.read_bytes()
    assert resident(paths)[0] == resident(paths)[1] > 0
    try:
        evict(paths)
    except SystemExit:
        pytest.skip("this file system keeps its files in memory")
    assert resident(paths)[0] == 0
    mapped = np.memmap(stored / "flat.bin", np.uint8, "r")
    assert mapped.sum() > 0
    with pytest.raises(SystemExit, match="pages .* stay in memory"):
        evict([stored / "flat.bin"])


def test_reading_past_the_cache_reads_every_byte(stored):
    from storage.pages import files_below, read_past_cache

    paths = files_below(stored)
    try:
        found = [read_past_cache(paths, threads) for threads in (1, 2)]
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    assert found == [sum(p.stat().st_size for p in paths)] * 2


@PEERS_WARN
def test_cold_measures_every_variant_that_is_installed(workload, tmp_path):
    import cold
    from storage.pages import evict

    (tmp_path / "probe").write_bytes(bytes(10_000))
    try:
        evict([tmp_path / "probe"])
        os.close(os.open(tmp_path / "probe", os.O_RDONLY | os.O_DIRECT))
    except (SystemExit, OSError):
        pytest.skip("this file system has no O_DIRECT, or keeps its files in memory")
    (tmp_path / "probe").unlink()
    rows = cold.measure(tmp_path, workload, 1)["rows"]
    assert sum(name.startswith("fcache") for name in rows) == 4
    assert all(row["mb_per_s"] > 0 for name, row in rows.items() if "not installed" not in name)


def test_the_share_of_waiting_is_what_was_waited_for_when_a_run_has_settled(monkeypatch):
    import epochs

    now = 0.0

    def passes(seconds):
        nonlocal now
        now += seconds

    def stream():
        for wait in (*(7.0 for _ in range(epochs.SETTLING)), 3.0, 3.0, 0.0):
            passes(wait)
            yield {"level-4": torch.zeros(2, 3)}

    monkeypatch.setattr(epochs, "time", SimpleNamespace(perf_counter=lambda: now, process_time=lambda: now / 2))
    share, seconds, processor = epochs.run(stream(), 3, 1.5, passes)
    assert (share, seconds, processor) == (6.0 / (6.0 + 3 * 1.5), 3.5, 1.75)


@pytest.mark.parametrize("name", ["with_torch", "in_python"])
def test_a_consumer_computes_for_as_long_as_it_is_told(name):
    import epochs

    started = time.perf_counter()
    getattr(epochs, name)(0.02)
    assert time.perf_counter() - started >= 0.02


def test_epochs_measure_the_loaders_that_read_in_the_process(workload, stored, monkeypatch):
    import epochs
    from storage.loaders import LOADERS

    monkeypatch.setattr(epochs, "RUNS", 1)
    for name in ("fcache, 2 threads", "fcache, 2 threads, positional reads"):
        row = epochs.one(LOADERS[name].open(stored / "cache" / "train", workload)(None), 2, 0.001, least=0.0)
        assert {"read_ms", "wait_1", "wait_2", "wait_asleep", "wait_torch", "wait_python"} == set(row)
        assert all(0 <= share <= 1 for key, share in row.items() if key.startswith("wait"))


def test_every_writer_that_is_installed_is_read_back_and_timed(workload, tmp_path, monkeypatch):
    import writing
    from storage.process import Usage
    from storage.writers import WRITERS

    # A process a writer takes seconds; a test of its own measures one.
    monkeypatch.setattr(writing, "in_new_process", lambda work, *arguments: (work(*arguments), Usage(1, 2, 3)))
    rows = writing.measure(tmp_path, workload, 1)["rows"]
    assert {name.removesuffix(" (not installed)") for name in rows} == set(WRITERS)
    assert rows["fcache"]["create_ms"] > 0
    assert all(row["mb_per_s"] > 0 for name, row in rows.items() if "not installed" not in name)


def test_a_writer_of_other_numbers_is_not_timed(workload, tmp_path, monkeypatch):
    import writing
    from storage.writers import RAW, WRITERS

    def wrong(folder, source, workload):
        other = source.copy()
        other["level-4"].view(np.uint16)[1, 0, 0, 0] ^= 1
        right.write(folder, other, workload)

    right = WRITERS[RAW]
    monkeypatch.setitem(WRITERS, RAW, replace(right, write=wrong))
    with pytest.raises(SystemExit, match="raw files reads other numbers"):
        writing.measure(tmp_path, workload, 1)


def test_memory_of_a_process_of_its_own_is_its_peak():
    from storage.process import in_new_process

    # scrypt takes 128 n r bytes while it runs.
    work = partial(hashlib.scrypt, b"password", salt=b"salt", n=1 << 16, r=8, p=1, maxmem=1 << 28)
    found, usage = in_new_process(work)
    assert found == work()
    assert 60 << 20 < usage.growth < 80 << 20
    assert usage.total >= usage.anonymous > usage.before > 0


def test_a_bulk_cache_reads_back_and_its_start_is_timed(tmp_path):
    import memory
    import startup
    from storage.bulk import Bulk

    bulk = Bulk(200, 8)
    bulk.write_cache(tmp_path / "cache")
    memory.stream(tmp_path / "cache", "pread", bulk)
    assert os.fsync.__module__ == "posix"
    seconds = startup.start(tmp_path / "cache", 16)
    assert seconds["total"] == pytest.approx(seconds["open"] + seconds["source"] + seconds["batch"])
    with pytest.raises(SystemExit, match="200 of 264 records"):
        memory.stream(tmp_path / "cache", "mmap", replace(bulk, records=264))


def test_objects_measure_every_variant_and_count_requests(workload, tmp_path):
    pytest.importorskip("moto", reason="the S3 server of this benchmark")
    pytest.importorskip("obstore")
    import objects
    from storage.s3 import s3_server

    before = dict(os.environ)
    with s3_server() as server:
        rows = objects.measure(tmp_path, server, workload, 1, 0.01)["rows"]
    assert dict(os.environ) == before
    assert list(rows) == ["0 ms a request", "10 ms a request"]
    for found in rows.values():
        assert found[objects.LOOP]["ratio"] == 1.0
        # Two levels, index and record of each.
        assert found[objects.LOOP]["requests"] >= 4
        assert found["fcache"]["requests"] > 0


def test_a_result_is_a_table_and_two_files(tmp_path, monkeypatch, capsys):
    from storage.report import machine, publish, table

    monkeypatch.setattr("sys.argv", ["benchmarks/warm.py", "--records", "4"])
    body = table("Warm", {"MB/s": "{speed:.0f}", "more": "{more:.1f}"}, {"a": {"speed": 12.3}, "b": {}})
    assert body.splitlines()[2:] == ["|  | MB/s | more |", "|---|---|---|", "| a | 12 |  |", "| b |  |  |"]
    m = {**machine(), "short": "9cpu"}
    publish("warm", {"what": "Records.", "rows": {"a": {"speed": 12.3}}}, body, tmp_path, m=m)
    (markdown,) = tmp_path.glob("warm_9cpu_*.md")
    assert "`python benchmarks/warm.py --records 4`" in markdown.read_text()
    assert body in markdown.read_text()
    assert body in capsys.readouterr().out
    assert json.loads(markdown.with_suffix(".json").read_text())["rows"] == {"a": {"speed": 12.3}}
