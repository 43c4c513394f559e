import shutil
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from fcache.cache_spec import (
    DataError,
    LevelSpec,
    StreamConfig,
    find_encoding,
    open_cache,
    open_source,
    open_writer,
    verify,
)
from fcache.cache_spec.tables import read_tables
from fcache.extractor import Job, extract, open_live
from fcache.extractor.encode import LevelFacts, encode_batch, tables_on
from fcache.extractor.fit import SAMPLES, chosen_samples, fit_tables
from fcache.extractor.prepare import Prepared, prepare

MakeJob = Callable[..., Job]


def opened(job: Job) -> tuple[Prepared, object]:
    prepared = prepare(job)
    return prepared, open_writer(job.cache, prepared.wanted)


def test_tables_are_those_of_the_features_of_the_training_samples(make_job: MakeJob) -> None:
    prepared, writer = opened(make_job(encoding="rot:1"))
    found = fit_tables(prepared, writer)
    assert found.digest
    for level in prepared.wanted.group("train").levels:
        tables = found.levels[level.name]
        assert tables["rotation"].shape == (level.channels, level.channels)
        np.testing.assert_allclose(tables["rotation"] @ tables["rotation"].T, np.eye(level.channels), atol=1e-5)
        assert (tables["scale"] > 0).all()


def test_a_second_fit_and_another_process_take_what_is_committed(make_job: MakeJob) -> None:
    prepared, writer = opened(make_job(encoding="rot:1"))
    first = fit_tables(prepared, writer)
    # Fewer samples would give other tables.
    less, same = opened(make_job(encoding="rot:1", limit=2))
    assert fit_tables(less, same).digest == first.digest


def test_processes_that_fit_at_the_same_time_get_the_same_tables(make_job: MakeJob) -> None:
    jobs = [opened(make_job(encoding="rot:1", limit=n)) for n in (10, 3)]
    found: list[str] = []
    threads = [threading.Thread(target=lambda j=j: found.append(fit_tables(*j).digest)) for j in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert len(set(found)) == 1


def test_two_caches_of_one_job_have_equal_tables(make_job: MakeJob, tmp_path) -> None:
    a = fit_tables(*opened(make_job(encoding="rot:1")))
    b = fit_tables(*opened(make_job(encoding="rot:1", cache=tmp_path / "other", workers=1)))
    assert a.digest == b.digest


def test_nothing_is_fitted_for_an_encoding_that_needs_nothing(make_job: MakeJob) -> None:
    prepared, writer = opened(make_job())
    assert not fit_tables(prepared, writer)
    assert not read_tables(writer.storage, writer.manifest)


def test_the_choice_of_samples_is_fixed_spread_and_at_most_so_many(make_job: MakeJob) -> None:
    group = prepare(make_job(encoding="rot:1")).wanted.group("train")
    many = replace(group, ids=tuple(f"s{i}" for i in range(1000)), digests=("d",) * 1000)
    chosen = chosen_samples((many,))
    assert len(chosen) == SAMPLES
    numbers = [int(i[1:]) for _, i in chosen]
    assert numbers == sorted(numbers)
    assert numbers[0] < 100 < 900 < numbers[-1]
    assert chosen_samples((many,)) == chosen
    assert chosen_samples((group,)) == [(group, i) for i in group.ids]


def test_samples_that_cannot_be_decoded_are_left_out(make_job: MakeJob, tmp_path) -> None:
    root = tmp_path / "data"
    job = make_job(encoding="rot:1")
    shutil.copytree(job.root, root)
    photos = sorted((root / "images" / "training").iterdir())
    photos[0].write_bytes(b"no photo")
    prepared, writer = opened(replace(job, root=root))
    assert fit_tables(prepared, writer)
    for photo in photos:
        photo.write_bytes(b"no photo")
    prepared, writer = opened(replace(job, root=root, cache=tmp_path / "other"))
    with pytest.raises(DataError, match="none of the samples that rot:1 is fitted to can be decoded"):
        fit_tables(prepared, writer)


def test_what_does_not_fit_the_tables_is_an_error_that_names_the_sample(make_job: MakeJob) -> None:
    prepared, writer = opened(make_job(encoding="rot:0.5"))
    tables = tables_on(fit_tables(prepared, writer).levels, "cpu")
    group = prepared.wanted.group("train")
    rng = torch.Generator().manual_seed(0)
    features = {level.name: torch.randn(2, *level.shape, generator=rng) for level in group.levels}
    ids = group.ids[:2]
    stored = encode_batch(features, group, ids, LevelFacts(), tables=tables)
    assert {a.path for a in group.feature_arrays() if not a.path.startswith("index/")} == set(stored)
    name = group.levels[1].name
    features[name][1, 0, 0, 0] = 1e20
    with pytest.raises(DataError, match=rf"sample '{ids[1]}': level '{name}' lies more than 32767 steps"):
        encode_batch(features, group, ids, LevelFacts(), tables=tables)


def test_levels_of_any_axes_are_fitted() -> None:
    fit = find_encoding("rot:1").fit
    assert fit is not None
    level = LevelSpec("clip", "T C H W", (2, 3, 4, 4), 16)
    sums = fit.add(fit.start(level), np.ones((2, *level.shape), np.float32), level)
    assert float(sums["count"]) == 2 * 2 * 16


def test_a_cache_of_fitted_codes_reads_back_within_the_error_that_the_encoding_states(make_job: MakeJob) -> None:
    job = make_job(encoding="rot:0.5")
    assert extract(job, report=lambda _: None).pending == 0
    assert not verify(job.cache, deep=True).faults
    reader, live = open_cache(job.cache), open_live(job, "train", batch_size=4, order="sequential")
    encoding, tables = find_encoding("rot:0.5"), reader.tables(reader.manifest.group("train"))
    assert not reader.tables(reader.manifest.split("val")[0])
    expected = {i: b for b in live.blocks(0) for i in b.ids}
    seen = 0
    for block in open_source(reader, "train", StreamConfig(3, order="sequential")).blocks(0):
        for level, coded in block.levels.items():
            decoded = coded.decode(np)
            for i, sample in enumerate(block.ids):
                if block.view_indices[i] == 0:
                    there = expected[sample].levels[level]
                    x = there.decode(torch).numpy()[expected[sample].ids.index(sample)][None]
                    bound = encoding.error(x, coded.level, tables[level], np)
                    assert (abs(decoded[i : i + 1] - x) <= bound).all()
                    seen += 1
    assert seen == 10 * len(reader.manifest.group("train").levels)


def test_two_extractions_of_fitted_codes_are_equal_byte_for_byte(make_job: MakeJob, tmp_path) -> None:
    jobs = make_job(encoding="rot:1"), make_job(encoding="rot:1", cache=tmp_path / "other")
    for job in jobs:
        extract(job, report=lambda _: None)
    files = [p.relative_to(jobs[0].cache) for p in sorted(jobs[0].cache.rglob("c.*"))]
    assert any(p.parts[0] == "tables" for p in files)
    for path in files:
        assert (jobs[0].cache / path).read_bytes() == (jobs[1].cache / path).read_bytes()
