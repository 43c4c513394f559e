"""A plan and a run in words, from known numbers."""

from dataclasses import replace
from pathlib import Path

import pytest

from fcache.cache_spec import SpecError
from fcache.cli.extract import engine_of, summary
from fcache.cli.plan import break_even, price, show_plan
from fcache.extractor import Job, Plan, SplitPlan, TimeSpent
from fcache.extractor.costs import Costs, Rates
from fcache.extractor.engine import ExtractResult
from fcache.extractor.engines.local import local

SPLIT = SplitPlan("train", 1000, 4, 4000, 4000, 63, 63, 4 * 10**9, 4 * 10**9, ((64, 64),))
PLAN = Plan(
    cache="ade.fcache", features="ab" * 32, splits=(SPLIT,), level_bytes={"level-4": 10**6}, level_choices={},
    free_bytes=10**12, random_weights=None, view_bytes={1: 10**9, 4: 4 * 10**9}, targets=("semantic",), devices=8,
    rates=Rates(0.01, 0.72, 1e9, 2e9), costs=Costs(3600.0, "the backbone", 900.0, 0.5, 5),
)  # fmt: skip


def test_the_price_is_that_of_all_devices() -> None:
    assert price(PLAN, 2.5) == pytest.approx(20)
    assert price(replace(PLAN, costs=None), 2.5) is None
    text = show_plan(PLAN, 2.5)
    assert "1 h 00 min at 1.11 records/s on 8 devices like this one; the backbone sets the pace" in text
    assert "20.00 for 8 x 2.5 an hour" in text


def test_a_plan_says_from_when_on_a_cache_pays_and_when_it_never_does() -> None:
    assert break_even(PLAN) == (
        "from 5 passes on (heads trained one by one x epochs): one pass over the training samples takes 15 min 00 s "
        "with the backbone, 0.5 s from this disk; 100 passes end 23 h 59 min sooner"
    )
    never = break_even(replace(PLAN, costs=Costs(3600.0, "the backbone", 2.0, 4.0, None)))
    assert never.startswith("never here: one pass over the training samples takes 2 s with the backbone, 4 s from")
    unknown = break_even(replace(PLAN, costs=Costs(3600.0, "the backbone", 2.0, None, None)))
    assert unknown.startswith("not known, as the disk was not measured")


def test_views_are_advised_for_segmentation_only() -> None:
    assert "On CamVid" in show_plan(PLAN)
    other = show_plan(replace(PLAN, targets=("class",)))
    assert "On CamVid" not in other
    assert "training views" in other


def test_a_run_says_what_it_waited_for() -> None:
    result = ExtractResult(2, 8, 10.0, {}, 0, TimeSpent(1.0, 8.5, 0.5))
    assert (
        summary("c", result).splitlines()[1] == "time: 10% waiting for decoding, 85% backbone, 5% waiting for writing"
    )
    assert "time:" not in summary("c", ExtractResult(0, 0, 1.0, {}, 0, TimeSpent()))


def test_devices_and_a_scheduler_choose_the_engine() -> None:
    job = Job(model="resnet18", dataset="ade20k", root=Path("data"), cache="c", weights="random:0")
    assert engine_of(job, None, None) == (local, "cpu")
    assert engine_of(job, "cpu", None) == (local, "cpu")
    assert engine_of(job, "cpu,cpu", None)[1] == "cpu, cpu"
    assert engine_of(job, None, "tcp://node1:8786")[1] == "the workers of tcp://node1:8786"
    with pytest.raises(SpecError, match="each dask worker computes on one device, got --devices 0,1"):
        engine_of(job, "0,1", "tcp://node1:8786")
