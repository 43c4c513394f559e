"""Costs from constructed rates: known answers."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from fcache.extractor.costs import Rates, Work, costs, disk_rates

# 1000 records of 1 MB; a pass reads 250 of them.
WORK = Work(records=1000, bytes=10**9, pass_records=250, pass_bytes=250 * 10**6, decoders=4, devices=1)
RATES = Rates(decoding=0.04, computing=0.1, writing=200e6, reading=500e6)


def test_the_slowest_of_decoding_backbone_and_writing_sets_the_pace() -> None:
    assert (costs(RATES, WORK).extraction, costs(RATES, WORK).limit) == (pytest.approx(100), "the backbone")
    slow = costs(replace(RATES, decoding=0.8), WORK)
    assert (slow.extraction, slow.limit) == (pytest.approx(200), "decoding")
    disk = costs(replace(RATES, writing=5e6), WORK)
    assert (disk.extraction, disk.limit) == (pytest.approx(200), "writing")


def test_one_process_that_decodes_and_computes_takes_the_sum() -> None:
    found = costs(RATES, replace(WORK, decoders=0))
    assert found.extraction == pytest.approx(140)
    assert found.live_pass == pytest.approx(35)


def test_devices_divide_decoding_and_backbone_but_not_the_disk() -> None:
    assert costs(RATES, replace(WORK, devices=8)).extraction == pytest.approx(12.5)
    many = costs(RATES, replace(WORK, devices=100))
    assert (many.extraction, many.limit) == (pytest.approx(5), "writing")


def test_a_cache_pays_from_the_pass_on_that_makes_up_for_its_extraction() -> None:
    found = costs(RATES, WORK)
    # A pass: 25 s with the backbone, 0.5 s from the disk; 100 s of extraction are 4.08 times the difference.
    assert (found.live_pass, found.cached_pass, found.passes) == (pytest.approx(25), pytest.approx(0.5), 5)
    exact = costs(replace(RATES, reading=250e6 / 5), WORK)
    assert (exact.cached_pass, exact.passes) == (pytest.approx(5), 5)


def test_a_disk_slower_than_the_backbone_never_pays() -> None:
    assert costs(replace(RATES, reading=10e6), WORK).passes is None
    assert costs(replace(RATES, reading=9e6), WORK).cached_pass == pytest.approx(250 / 9)
    assert costs(replace(RATES, computing=0.0005, decoding=0.0005), WORK).passes is None


def test_without_a_measured_disk_nothing_is_said_about_it() -> None:
    found = costs(replace(RATES, writing=None, reading=None), WORK)
    assert (found.extraction, found.cached_pass, found.passes) == (pytest.approx(100), None, None)


def test_the_disk_is_measured_without_a_trace(tmp_path: Path) -> None:
    writing, reading = disk_rates(tmp_path / "not" / "yet", size=4 << 20) or (0, 0)
    assert writing > 1e5
    assert reading > 1e5
    assert os.listdir(tmp_path) == []
