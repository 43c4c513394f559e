import json
from dataclasses import replace

import numpy as np
import pytest

from fcache.cache_spec import IncompatibleError, SpecError
from fcache.heads import TrainConfig, choose_heads, compare, comparison_json, train
from fcache.heads.runs import load_states

CONFIG = TrainConfig(iterations=8, batch_size=4, lr=3e-3)
TEXTS = ["linear", "upernet:width=8"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trains heads on a source in a new folder."""

    def make(source, held, texts=TEXTS, config=CONFIG):
        out = tmp_path_factory.mktemp("runs")
        return train(source, choose_heads(texts, source.info, config), config, out=out, validation=held)

    return make


def test_rows_are_ranked_and_spread_over_seeds(scenes, trained):
    source, held = scenes(8), scenes(12, role="evaluation")
    runs = [r for s in (0, 1, 2) for r in trained(source, held, config=replace(CONFIG, seed=s))]
    found = compare(runs, resamples=50)
    assert sorted(row.label for row in found.rows) == sorted(TEXTS)
    for row in found.rows:
        values = [r.metrics["miou"] for r in runs if r.label == row.label]
        assert row.metrics["miou"].mean == pytest.approx(np.mean(values))
        assert row.metrics["miou"].sd == pytest.approx(np.std(values, ddof=1))
        assert row.metrics["miou"].count == 3
    assert found.rows[0].metrics["miou"].mean >= found.rows[1].metrics["miou"].mean
    assert found.rows[0].difference is None
    assert found.rows[1].difference is not None


def test_the_paired_difference_is_that_of_resampled_samples(scenes, trained):
    runs = trained(scenes(8), scenes(12, role="evaluation"))
    best, other = compare(runs, resamples=400, seed=3).rows
    states = [load_states(row.runs[0])[1] for row in (best, other)]

    def miou(s, drawn):
        inter, union = (
            s["intersection"][drawn].sum(0),
            (s["predicted"] + s["labelled"] - s["intersection"])[drawn].sum(0),
        )
        return np.mean(inter[union > 0] / union[union > 0])

    rng = np.random.default_rng(3)
    draws = [rng.integers(12, size=12) for _ in range(400)]
    gaps = np.array([miou(states[1], d) - miou(states[0], d) for d in draws])
    assert other.difference.mean == pytest.approx(gaps.mean(), abs=1e-12)
    assert (other.difference.low, other.difference.high) == pytest.approx(np.percentile(gaps, [2.5, 97.5]), abs=1e-12)
    assert other.difference.better == np.mean(gaps > 0)


def test_a_comparison_is_the_same_every_time(scenes, trained):
    runs = trained(scenes(8), scenes(6, role="evaluation"))
    assert compare(runs, resamples=50) == compare(runs, resamples=50)


def test_equal_predictions_differ_by_nothing(scenes, trained):
    source, held = scenes(8), scenes(6, role="evaluation")
    one = trained(source, held, ["linear"])[0]
    twin = replace(trained(source, held, ["linear"])[0], label="twin", train=replace(one.train, clip=99.0))
    difference = compare([one, twin], resamples=20).rows[1].difference
    assert (difference.mean, difference.low, difference.high, difference.better) == (0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"encoding": "int8"}, "features"),
        ({"count": 12}, r"extent\.training\.samples"),
    ],
)
def test_runs_on_unequal_data_are_compared_only_when_told(scenes, trained, change, field: str):
    encoding = change.get("encoding", "fp32")
    one = trained(scenes(8), scenes(6, role="evaluation"), ["linear"])
    other = trained(
        scenes(change.get("count", 8), encoding=encoding), scenes(6, role="evaluation", encoding=encoding), ["linear"]
    )
    with pytest.raises(IncompatibleError, match=f"not comparable: {field}"):
        compare(one + other)
    mixed = compare(one + other, mixed=True, resamples=20)
    assert mixed.mixed
    assert len(mixed.rows) == 2


def test_runs_on_other_targets_are_refused(scenes, trained):
    runs = trained(scenes(8), scenes(6, role="evaluation"))
    with pytest.raises(IncompatibleError, match="targets"):
        compare([runs[0], replace(runs[1], targets_key="0" * 64)])


def test_rows_on_other_samples_have_no_difference(scenes, trained):
    one = trained(scenes(8), scenes(6, role="evaluation"), ["linear"])
    other = trained(scenes(8), scenes(4, role="evaluation"), ["linear"])
    rows = compare(one + other, mixed=True, resamples=20).rows
    assert [row.difference for row in rows] == [None, None]


def test_stopped_runs_are_named_apart(scenes, trained):
    runs = trained(scenes(8), scenes(6, role="evaluation"))
    stopped = replace(runs[1], status="stopped", reason="the loss is nan", evaluations=())
    found = compare([runs[0], stopped], resamples=20)
    assert [row.label for row in found.rows] == ["linear"]
    assert found.stopped == (stopped,)


def test_nothing_to_compare_is_an_error(scenes, trained):
    with pytest.raises(SpecError, match="no run"):
        compare([])
    with pytest.raises(SpecError, match="none of these runs has scores"):
        compare(trained(scenes(8), None, ["linear"]))


def test_the_json_form_names_cache_heads_seeds_and_fractions(scenes, trained):
    runs = trained(scenes(8), scenes(6, role="evaluation"))
    found = json.loads(json.dumps(comparison_json(compare(runs, resamples=20), cache="x.fcache"), allow_nan=False))
    assert found["cache"] == "x.fcache"
    assert {(r["head"], r["seed"]) for r in found["runs"]} == {("linear", 0), ("upernet", 0)}
    for r in found["runs"]:
        assert 0 <= r["metrics"]["miou"] <= 1
        assert set(r["metrics"]) == {"miou", "pixel_accuracy", "mean_accuracy"}
