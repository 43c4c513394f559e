import math

import pytest

from fcache.cache_spec import SpecError
from fcache.heads.schedules import SCHEDULES, Schedule


@pytest.mark.parametrize("t", [0, 1, 499, 999])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", lambda t: 1.0),
        ("poly", lambda t: (1 - t / 1000) ** 0.9),
        ("linear", lambda t: 1 - t / 1000),
        ("cosine", lambda t: math.cos(math.pi * t / 2000) ** 2),
    ],
)
def test_factors_equal_their_closed_forms(name: str, expected, t: int):
    assert Schedule(name, 1000).factor(t) == pytest.approx(expected(t), abs=1e-12)


def test_multi_step_drops_at_its_milestones():
    # Steps at epochs 8 and 11 of 12, as the COCO tables have them.
    schedule = Schedule("multi-step", 1200, milestones=(800, 1100))
    factors = [schedule.factor(t) for t in (0, 799, 800, 1099, 1100, 1199)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01], abs=1e-15)


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_rises_linearly_and_then_leaves_the_schedule_alone(name: str):
    plain = Schedule(name, 1000, milestones=(500,))
    warm = Schedule(name, 1000, milestones=(500,), warmup=100)
    for t in (0, 10, 99):
        assert warm.factor(t) == pytest.approx(plain.factor(t) * (t + 1) / 100, abs=1e-15)
    assert all(warm.factor(t) == plain.factor(t) for t in (100, 500, 999))


def test_a_floor_is_where_the_schedule_ends():
    schedule = Schedule("poly", 1000, floor=0.06)
    assert schedule.factor(0) == 1.0
    assert schedule.factor(1000) == pytest.approx(0.06, abs=1e-15)


@pytest.mark.parametrize(
    "values",
    [
        {"name": "polly"},
        {"name": "multi-step"},
        {"name": "poly", "power": 0.0},
        {"name": "poly", "warmup": -1},
        {"name": "multi-step", "milestones": (5, 3)},
        {"name": "poly", "floor": 1.5},
    ],
)
def test_values_out_of_range_are_refused(values):
    with pytest.raises(SpecError):
        Schedule(iterations=10, **values)
