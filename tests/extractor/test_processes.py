"""Several devices: one process each, which share the shards and may die."""

import os
import signal
import time
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch

from fcache.cache_spec import DataError, SpecError, verify
from fcache.cli import main
from fcache.extractor import Event, Job, extract, on_devices
from fcache.extractor.devices import check_device, parse_devices
from fcache.extractor.events import RecordsDone, ShardCommitted, WorkerLost
from tests.extractor.conftest import contents
from tests.torture.children import CONTEXT, group_is_gone

MakeJob = Callable[..., Job]
TWO = on_devices(["cpu", "cpu"])


@pytest.fixture(scope="module")
def whole(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """An extraction of 64 records in 26 shards, run by one process."""
    job = Job(
        model="mobilenetv2_050", dataset="ade20k", root=scenes, cache=tmp_path_factory.mktemp("whole") / "cache",
        weights="random:0", views=6, view_recipe="ade20k-small", input_size=(64, 64), precision="fp32",
        shard_records=3, batch_size=2, workers=0,
    )  # fmt: skip
    extract(job, report=lambda _: None)
    return job


def workers() -> list[Any]:
    return [p for p in active_children() if p.name.startswith("fcache-cpu")]


def test_processes_end_with_the_bytes_of_one_and_add_up_their_progress(whole: Job, make_job: MakeJob) -> None:
    job, events = make_job(views=6, workers=1), list[Event]()
    result = extract(job, report=events.append, engine=TWO)
    assert (result.records, result.pending, result.shards) == (64, 0, verify(job.cache, deep=True).parts)
    assert contents(job.cache) == contents(whole.cache)
    done = [e for e in events if isinstance(e, RecordsDone)]
    assert [e.records for e in done] == sorted(e.records for e in done)
    assert (done[-1].records, done[-1].total) == (64, 64)
    assert min(result.spent.decoding, result.spent.computing, result.spent.writing) > 0
    assert workers() == []


def test_the_shard_of_a_killed_process_goes_to_the_others(whole: Job, make_job: MakeJob) -> None:
    job, events, killed = make_job(views=6), list[Event](), list[Any]()

    def report(event: Event) -> None:
        events.append(event)
        if isinstance(event, ShardCommitted) and not killed:
            killed.append(workers()[0])
            killed[0].kill()

    result = extract(job, report=report, engine=TWO)
    assert [e.reason for e in events if isinstance(e, WorkerLost)] == ["killed by SIGKILL"]
    assert result.pending == 0
    assert contents(job.cache) == contents(whole.cache)


def test_a_run_whose_processes_all_died_is_an_error_and_continues(whole: Job, make_job: MakeJob) -> None:
    job, lost = make_job(views=6), list[str]()

    def report(event: Event) -> None:
        if isinstance(event, ShardCommitted):
            for process, number in zip(workers(), (signal.SIGTERM, signal.SIGKILL), strict=False):
                os.kill(process.pid, number)
        if isinstance(event, WorkerLost):
            lost.append(event.reason)

    with pytest.raises(DataError, match="all 2 extraction processes failed, the last on cpu: .*same command again"):
        extract(job, report=report, engine=TWO)
    assert sorted(lost) in (["killed by SIGKILL", "told to stop by SIGTERM"], ["killed by SIGKILL"] * 2)
    assert not list(job.cache.glob("partial/*"))
    extract(job, report=lambda _: None)
    assert contents(job.cache) == contents(whole.cache)


def test_an_error_of_one_process_ends_the_run_with_it(make_job: MakeJob, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    state = timm.create_model("mobilenetv2_050", pretrained=False).state_dict()
    state["conv_stem.weight"] = state["conv_stem.weight"] * float("nan")
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "nan.safetensors")
    job = make_job(weights=str(tmp_path / "nan.safetensors"))
    with pytest.raises(DataError, match="scene_training.*NaN or infinite"):
        extract(job, report=lambda _: None, engine=TWO)
    assert workers() == []


def _command(line: list[str]) -> None:
    """The command line, in a process group of its own."""
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    os._exit(main(line))


def test_an_interrupted_or_killed_command_leaves_no_process_and_nothing_half_written(
    whole: Job, make_job: MakeJob
) -> None:
    job = make_job(views=6)
    line = ["extract", "--model", job.model, "--weights", job.weights, "--dataset", "ade20k", "--data-root"]
    line += [str(job.root), "--cache", str(job.cache), "--views", "6", "--view-recipe", "ade20k-small"]
    line += ["--input-size", "64", "64", "--precision", "fp32", "--shard-records", "3", "--batch-size", "2"]
    line += ["--workers", "0", "--devices", "cpu,cpu"]
    # Ctrl-C of a terminal and the end of a Slurm job reach all processes.
    ends = ((signal.SIGINT, True, 130), (signal.SIGTERM, True, 130), (signal.SIGKILL, False, -signal.SIGKILL))
    for number, everybody, status in ends:
        before = len(list(job.cache.glob("commits/**/*.json")))
        process = CONTEXT.Process(target=_command, args=(line,))
        process.start()
        until = time.monotonic() + 240
        while len(list(job.cache.glob("commits/**/*.json"))) < before + 2:
            assert process.is_alive()
            assert time.monotonic() < until
            time.sleep(0.01)
        kill = os.killpg if everybody else os.kill
        kill(process.pid, number)
        process.join(120)
        assert process.exitcode == status
        assert group_is_gone(process.pid, seconds=60), "processes outlive their command"
        if status == 130:
            assert not list(job.cache.glob("partial/*"))
            assert not list(job.cache.glob("claims/*/*"))
        assert verify(job.cache, deep=True).corrupt == ()
    extract(job, report=lambda _: None)
    assert contents(job.cache) == contents(whole.cache)


def test_devices_are_numbers_of_gpus_or_names() -> None:
    assert parse_devices("0, 1") == ("cuda:0", "cuda:1")
    assert parse_devices("cpu,cpu") == ("cpu", "cpu")
    for text in ("gpu", "0,,1", "cuda:x", "meta"):
        with pytest.raises(SpecError, match="a device is cpu, a GPU's number"):
            parse_devices(text)


def test_a_device_that_is_not_there_or_lacks_bf16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match="there is no cuda:99"):
        check_device("cuda:99", "bf16")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (7, 5) if d.index == 1 else (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "Tesla T4")
    check_device("cuda:0", "bf16")
    check_device("cuda:1", "fp32")
    with pytest.raises(SpecError, match=r"cuda:1 \(Tesla T4\) has no bfloat16 arithmetic.*--precision fp32"):
        check_device("cuda:1", "bf16")
