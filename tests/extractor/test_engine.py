import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcache.cache_spec import (
    DataError,
    IncompatibleError,
    IncompleteError,
    NoSpaceError,
    SpecError,
    StreamConfig,
    open_cache,
    open_source,
    open_storage,
    verify,
)
from fcache.cache_spec.commits import read_commits
from fcache.extractor import Event, Job, Stopped, extract, plan
from fcache.extractor.events import RecordsDone, SampleQuarantined, ShardCommitted
from tests.extractor.conftest import contents

MakeJob = Callable[..., Job]


def quiet(event: Event) -> None:
    """Reports nothing."""


def copy_scenes(job: Job, tmp_path: Path) -> Job:
    """The job on its own copy of the data, which a test may damage."""
    root = tmp_path / "data"
    shutil.copytree(job.root, root)
    return replace(job, root=root)


def photos(job: Job, folder: str = "training") -> list[Path]:
    return sorted((job.root / "images" / folder).iterdir())


def test_an_extraction_commits_every_record_and_verifies(make_job: MakeJob) -> None:
    job = make_job()
    result = extract(job, report=quiet)
    checked = verify(job.cache, deep=True)
    assert (result.records, result.pending, result.quarantined) == (24, 0, {})
    assert checked.faults == ()
    assert checked.committed == checked.parts
    assert {p.name for p in job.cache.iterdir()} == {"zarr.json", "manifest", "commits", "train", "val"}


def test_the_same_command_again_does_nothing(make_job: MakeJob) -> None:
    job = make_job()
    extract(job, report=quiet)
    before = contents(job.cache)
    assert extract(job, report=quiet).shards == 0
    assert contents(job.cache) == before


def test_two_extractions_are_equal_byte_for_byte(make_job: MakeJob, tmp_path: Path) -> None:
    extract(make_job(), report=quiet)
    extract(make_job(cache=tmp_path / "other", workers=1), report=quiet)
    assert contents(make_job().cache) == contents(tmp_path / "other")


def test_more_views_samples_and_splits_come_later_without_rewriting_shards(make_job: MakeJob) -> None:
    first = make_job(splits=("train",), views=1, limit=4)
    extract(first, report=quiet)
    old = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in first.cache.rglob("*") if p.name.startswith("c.")}
    extract(make_job(), report=quiet)
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in old} == old
    reader = open_cache(first.cache)
    records = reader.records("train")[0]
    assert sorted(zip(records.samples.tolist(), records.views.tolist(), strict=True)) == [
        (s, v) for s in range(10) for v in range(2)
    ]
    assert reader.records("val")


def test_growing_gives_the_numbers_of_one_extraction(make_job: MakeJob, tmp_path: Path) -> None:
    extract(make_job(views=1, limit=4, encoding="fp32"), report=quiet)
    extract(make_job(encoding="fp32"), report=quiet)
    whole = make_job(encoding="fp32", cache=tmp_path / "whole")
    extract(whole, report=quiet)

    def by_record(root: Path) -> dict[tuple[str, int], np.ndarray]:
        source = open_source(open_cache(root), "train", StreamConfig(batch_size=1, all_views=True))
        return {(b.ids[0], b.view_indices[0]): b.pyramid(np).levels["level-8"].copy() for b in source.blocks(0)}

    grown, expected = by_record(make_job().cache), by_record(whole.cache)
    assert grown.keys() == expected.keys()
    # Batches are cut from shards, and other batch sizes may sum in another order.
    for key, value in expected.items():
        np.testing.assert_allclose(grown[key], value, rtol=1e-4, atol=1e-5)


def test_a_stopped_extraction_continues_to_the_same_bytes(make_job: MakeJob, tmp_path: Path) -> None:
    whole = make_job(cache=tmp_path / "whole")
    extract(whole, report=quiet)
    for allowed in (0, 3, 5):
        job = make_job(cache=tmp_path / f"stopped-{allowed}")
        calls = iter(range(1000))
        with pytest.raises(Stopped):
            extract(job, report=quiet, should_stop=lambda calls=calls, allowed=allowed: next(calls) >= allowed)
        with pytest.raises(IncompleteError, match="not committed"):
            open_cache(job.cache).records("train")
        assert not list(job.cache.glob("partial/*"))
        assert not list(job.cache.glob("claims/*/*"))
        extract(job, report=quiet)
        assert contents(job.cache) == contents(whole.cache)


def test_a_sample_that_cannot_be_decoded_is_left_out_with_its_reason(make_job: MakeJob, tmp_path: Path) -> None:
    job = copy_scenes(make_job(), tmp_path)
    bad = photos(job)[4]
    bad.write_bytes(bad.read_bytes()[:700])
    events: list[Event] = []
    result = extract(job, report=events.append)
    assert list(result.quarantined) == [bad.stem]
    assert bad.name in result.quarantined[bad.stem]
    assert sum(isinstance(e, SampleQuarantined) for e in events) == 2
    reader = open_cache(job.cache)
    assert reader.quarantined("train").keys() == {bad.stem}
    assert len(reader.records("train")[0].records) == 18
    assert verify(job.cache, deep=True).faults == ()


def test_on_error_fail_stops_at_a_sample_that_cannot_be_decoded(make_job: MakeJob, tmp_path: Path) -> None:
    job = copy_scenes(make_job(on_error="fail"), tmp_path)
    photos(job)[4].write_bytes(b"no image")
    with pytest.raises(DataError, match=f"{photos(job)[4].stem}.*--on-error quarantine"):
        extract(job, report=quiet)
    assert not list(job.cache.glob("partial/*"))


def test_an_unreadable_header_of_a_test_image_is_quarantined_too(make_job: MakeJob, tmp_path: Path) -> None:
    job = copy_scenes(make_job(), tmp_path)
    photos(job, "validation")[1].write_bytes(b"no image")
    assert list(extract(job, report=quiet).quarantined) == [photos(job, "validation")[1].stem]


def test_a_file_that_vanishes_while_extracting_fails_and_is_not_quarantined(make_job: MakeJob, tmp_path: Path) -> None:
    job = copy_scenes(make_job(), tmp_path)

    def remove_later(event: Event) -> None:
        if isinstance(event, RecordsDone):
            photos(job)[-1].unlink(missing_ok=True)

    with pytest.raises(DataError, match="reading failed repeatedly"):
        extract(job, report=remove_later)
    assert all(not c.quarantined for c in read_commits(open_storage(job.cache), "train", "features").values())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"weights": "random:1"}, "weights_sha256"),
        ({"precision": "bf16"}, "precision"),
        ({"seed": 1}, "seed"),
        ({"encoding": "fp16"}, "encoding"),
        ({"view_recipe": "plain"}, "views"),
        ({"levels": ("8", "16")}, "levels"),
        ({"model": "mobilenetv2_100"}, "backbone"),
    ],
)
def test_another_identity_is_refused_naming_the_field(make_job: MakeJob, change: dict[str, object], field: str) -> None:
    extract(make_job(limit=3), report=quiet)
    before = contents(make_job().cache)
    with pytest.raises(IncompatibleError, match=field):
        extract(make_job(limit=3, **change), report=quiet)
    assert contents(make_job().cache) == before


def test_a_changed_photo_is_refused(make_job: MakeJob, tmp_path: Path) -> None:
    job = copy_scenes(make_job(), tmp_path)
    extract(job, report=quiet)
    photo = photos(job)[2]
    Image.open(photo).save(photo, quality=30)
    with pytest.raises(IncompatibleError, match=photo.stem):
        extract(job, report=quiet)


def test_a_photo_that_is_gone_is_named_when_its_shard_is_pending(make_job: MakeJob, tmp_path: Path) -> None:
    job = copy_scenes(make_job(), tmp_path)
    with pytest.raises(Stopped):
        extract(job, report=quiet, should_stop=lambda: True)
    name = photos(job)[0].stem
    photos(job)[0].unlink()
    (job.root / "annotations" / "training" / f"{name}.png").unlink()
    with pytest.raises(DataError, match=name):
        extract(job, report=quiet)


def test_features_that_are_not_finite_name_the_sample(make_job: MakeJob, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    model = timm.create_model("mobilenetv2_050", pretrained=False)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    state["conv_stem.weight"] = state["conv_stem.weight"] * float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    job = make_job(weights=str(tmp_path / "nan.safetensors"))
    with pytest.raises(DataError, match="scene_training_000000.*NaN or infinite"):
        extract(job, report=quiet)
    assert not list(job.cache.glob("commits/train/*.json"))


def test_fp16_overflow_names_the_sample(make_job: MakeJob, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    model = timm.create_model("mobilenetv2_050", pretrained=False)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    state["blocks.6.0.bn3.weight"] = state["blocks.6.0.bn3.weight"] * 1e6
    save_file(state, tmp_path / "large.safetensors")
    weights = str(tmp_path / "large.safetensors")
    with pytest.raises(DataError, match="scene_training.*65504.*int8"):
        extract(make_job(weights=weights, encoding="fp16"), report=quiet)
    assert extract(make_job(weights=weights, encoding="int8", cache=tmp_path / "int8"), report=quiet).pending == 0


def test_two_processes_share_the_shards(make_job: MakeJob, tmp_path: Path) -> None:
    whole = make_job(cache=tmp_path / "whole")
    extract(whole, report=quiet)
    job = make_job()
    processes = [subprocess.Popen(command(job), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    done = [p.communicate(timeout=120)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0]
    committed = [int(text.split()[-1]) for text in done]
    assert contents(job.cache) == contents(whole.cache)
    assert sum(committed) == verify(job.cache).parts


def test_parts_of_a_job_array_cover_the_cache(make_job: MakeJob, tmp_path: Path) -> None:
    whole = make_job(cache=tmp_path / "whole")
    extract(whole, report=quiet)
    for i in (1, 0, 2):
        extract(make_job(part=(i, 3)), report=quiet)
    assert contents(make_job().cache) == contents(whole.cache)


def test_a_killed_process_leaves_a_cache_that_continues(make_job: MakeJob, tmp_path: Path) -> None:
    whole = make_job(cache=tmp_path / "whole")
    extract(whole, report=quiet)
    job = make_job()
    process = subprocess.Popen(command(job, slow=0.05), stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while len(list(job.cache.glob("commits/train/*.json"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {p: p.stat().st_mtime_ns for p in job.cache.glob("commits/**/*.json")}
    extract(job, report=quiet)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert contents(job.cache) == contents(whole.cache)


def command(job: Job, *, slow: float = 0.0) -> list[str]:
    """A process that extracts `job` and prints how many parts of shards it committed."""
    code = (
        "import sys, time, torch; from pathlib import PosixPath, Path; from fcache.extractor import *\n"
        "torch.set_num_threads(1)\n"
        f"r = extract({job!r}, report=lambda e: time.sleep({slow}))\n"
        "print('committed', r.shards)"
    )
    return [sys.executable, "-c", code]


def test_no_space_is_found_before_anything_is_written(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job()
    usage = shutil.disk_usage(job.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=64_000_000))
    with pytest.raises(NoSpaceError, match="0 MB and a reserve of 67 MB are needed .* 64 MB are free"):
        extract(job, report=quiet)
    assert not job.cache.exists()


def test_a_finished_extraction_needs_no_space(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job()
    extract(job, report=quiet)
    usage = shutil.disk_usage(job.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    assert plan(job).fits
    assert extract(job, report=quiet).shards == 0


@pytest.mark.parametrize("encoding", ["int8", "rot:1"])
def test_another_fingerprint_is_accepted_only_if_it_computes_equal_numbers(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    from fcache.extractor import recheck

    extract(make_job(limit=3, encoding=encoding), report=quiet)
    real = recheck.fingerprint
    monkeypatch.setattr(recheck, "fingerprint", lambda *a, **k: {**real(*a, **k), "threads": 96})
    extract(make_job(limit=6, encoding=encoding), report=quiet)

    features = recheck.features_of
    monkeypatch.setattr(recheck, "features_of", lambda *a: {name: x * 1.05 for name, x in features(*a).items()})
    monkeypatch.setattr(recheck, "fingerprint", lambda *a, **k: {**real(*a, **k), "threads": 97})
    with pytest.raises(IncompatibleError, match=r"threads is 97, it was"):
        extract(make_job(encoding=encoding), report=quiet)


def test_a_plan_counts_what_is_pending_and_writes_nothing(make_job: MakeJob) -> None:
    job = make_job()
    found = plan(job)
    assert (found.records, found.pending_records) == (24, 24)
    assert found.costs is not None
    assert found.costs.extraction > 0
    assert found.costs.live_pass > 0
    assert not job.cache.exists()
    extract(job, report=quiet)
    stored = sum(p.stat().st_size for p in job.cache.glob("**/level-*/c.*"))
    done = plan(job)
    assert (done.pending_records, done.pending_bytes) == (0, 0)
    # Shard indices come on top of what is planned, and tables are padded to whole shards.
    assert found.bytes <= stored <= found.bytes * 1.2
    assert plan(make_job(views=4)).pending_records == 20


def test_events_tell_the_progress(make_job: MakeJob) -> None:
    events: list[Event] = []
    extract(make_job(), report=events.append)
    counts = [e.records for e in events if isinstance(e, RecordsDone)]
    assert counts == sorted(counts)
    assert counts[-1] == 24
    assert sum(isinstance(e, ShardCommitted) for e in events) == verify(make_job().cache).parts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "swinv2-x"}, "swinv2-"),
        ({"dataset": "ade20"}, "ade20k"),
        ({"encoding": "int9"}, "int8"),
        ({"view_recipe": "ade2k"}, "ade20k"),
        ({"levels": ("level-5",)}, "level"),
        ({"splits": ("trian",)}, "train"),
    ],
)
def test_unknown_names_suggest_the_nearest(make_job: MakeJob, change: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        extract(make_job(**change), report=quiet)
    assert not make_job().cache.exists()


def test_a_missing_data_root_is_named(make_job: MakeJob, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        extract(make_job(root=tmp_path / "nowhere"), report=quiet)
    assert not make_job().cache.exists()


def test_weights_of_another_architecture_are_refused(make_job: MakeJob, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("resnet10t", pretrained=False).state_dict(), tmp_path / "resnet.safetensors")
    with pytest.raises(DataError, match="mobilenetv2_050"):
        extract(make_job(weights=str(tmp_path / "resnet.safetensors")), report=quiet)
    assert not make_job().cache.exists()


def test_a_stranger_in_the_folder_is_left_alone(make_job: MakeJob) -> None:
    job = make_job()
    job.cache.mkdir()
    (job.cache / "thesis.tex").write_text("all of it")
    with pytest.raises(SpecError, match=r"thesis\.tex"):
        extract(job, report=quiet)
    assert [p.name for p in job.cache.iterdir()] == ["thesis.tex"]
