"""Comparison of runs: mean and spread over seeds, and paired differences from the best over resampled samples."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fcache.cache_spec import DataError, IncompatibleError, SpecError, first_difference, to_json
from fcache.heads.metrics import Metric
from fcache.heads.runs import Run, load_states
from fcache.heads.tasks import find_head


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds (None with a single one)."""

    mean: float
    sd: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """Mean score minus that of the best row on the same resampled samples, with its 95 % interval, and the share of
    resamples in which this row is the better one.
    """

    mean: float
    low: float
    high: float
    better: float


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed only: scores by name, cost as means, and the difference from the task's best.

    `difference` is None for the best row itself, and for rows whose samples are not those of the best.
    """

    task: str
    head: str
    label: str
    runs: tuple[Run, ...]
    metrics: Mapping[str, Spread]
    primary: str
    parameters: int
    seconds_per_iteration: float
    difference: Difference | None


@dataclass(frozen=True)
class Comparison:
    """Rows by task, best first, and the runs that stopped and have no scores. `mixed` says that they were told to
    be compared although their data differ.
    """

    rows: tuple[Row, ...]
    stopped: tuple[Run, ...]
    mixed: bool


def compare(runs: Sequence[Run], *, mixed: bool = False, resamples: int = 1000, seed: int = 0) -> Comparison:
    """Runs compared on their evaluation split.

    Differences are paired: every resample draws samples with replacement, the same for all rows, and scores all of
    them on it; rows of several seeds count as the mean over these. Runs on data that are not equal (features,
    targets, samples, views or committed shards) raise IncompatibleError that names the field, unless `mixed`.
    Raises SpecError if there is no run, or none with scores.
    """
    if not runs:
        raise SpecError("there is no run to compare; train-head writes one folder a head below --out")
    scored = [run for run in runs if run.status == "finished" and run.metrics]
    if not mixed:
        # A head that stopped read less of a cache that grew than those that went on; it has no scores to compare.
        _check_equal_data(scored or runs)
    if not scored:
        raise SpecError("none of these runs has scores: they stopped, or had no validation split to be scored on")
    groups: dict[str, list[Run]] = {}
    for run in scored:
        groups.setdefault(_group_key(run, mixed), []).append(run)
    rows: list[Row] = []
    for task in dict.fromkeys(run.task for run in scored):
        rows += _rank([_row(g) for g in groups.values() if g[0].task == task], resamples, seed)
    stopped = tuple(run for run in runs if run not in scored)
    return Comparison(tuple(rows), stopped, mixed)


def _check_equal_data(runs: Sequence[Run]) -> None:
    first = runs[0]
    for run in runs[1:]:
        for what, a, b in (
            ("features", first.features_key, run.features_key),
            ("extent", first.extent, run.extent),
        ):
            if difference := first_difference(a, b, what):
                raise _unequal(first, run, difference)
    # Runs of different tasks read different targets: these must agree within a task.
    by_task: dict[str, Run] = {}
    for run in runs:
        one = by_task.setdefault(run.task, run)
        if difference := first_difference(one.targets_key, run.targets_key, "targets"):
            raise _unequal(one, run, difference)


def _unequal(a: Run, b: Run, difference: tuple[str, Any, Any]) -> IncompatibleError:
    name, one, other = difference
    return IncompatibleError(
        f"runs {a.folder.name} and {b.folder.name} are not comparable: {name} is {_short(one)} and {_short(other)}; "
        "compare runs of one cache and extent, or pass --mixed to compare them all the same"
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


def _group_key(run: Run, mixed: bool) -> str:
    """Equal for runs that are one head, trained equally from different seeds."""
    train = replace(run.train, seed=0, evaluate_every=0, checkpoint_every=0)
    data = [run.features_key, run.targets_key, run.extent] if mixed else []
    return json.dumps(to_json([run.head, run.options, train, data]), sort_keys=True)


def _metric(run: Run) -> Metric:
    return find_head(run.head).metrics(run.inputs, run.options)


def _row(runs: Sequence[Run]) -> Row:
    runs = sorted(runs, key=lambda r: r.seed)
    names = [n for n in runs[0].metrics if all(n in r.metrics for r in runs)]
    return Row(
        task=runs[0].task,
        head=runs[0].head,
        label=runs[0].label,
        runs=tuple(runs),
        metrics={n: _spread([r.metrics[n] for r in runs]) for n in names},
        primary=_metric(runs[0]).primary,
        parameters=runs[0].cost.parameters,
        seconds_per_iteration=float(np.mean([r.cost.seconds_per_iteration for r in runs])),
        difference=None,
    )


def _spread(values: Sequence[float]) -> Spread:
    return Spread(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None, len(values))


def _rank(rows: Sequence[Row], resamples: int, seed: int) -> list[Row]:
    """Rows of one task, best first, with their differences from the best."""
    better = 1.0 if _metric(rows[0].runs[0]).larger_is_better else -1.0
    ordered = sorted(rows, key=lambda row: -better * row.metrics[row.primary].mean)
    best_ids, best = _resampled(ordered[0], resamples, seed)
    ranked = [ordered[0]]
    for row in ordered[1:]:
        ids, scores = _resampled(row, resamples, seed)
        if ids != best_ids or not ids:
            ranked.append(row)
            continue
        gaps = (scores - best)[~np.isnan(best)]
        low, high = np.percentile(gaps, [2.5, 97.5])
        difference = Difference(float(gaps.mean()), float(low), float(high), float(np.mean(better * gaps > 0)))
        ranked.append(replace(row, difference=difference))
    return ranked


def _resampled(row: Row, resamples: int, seed: int) -> tuple[tuple[str, ...], np.ndarray]:
    """The samples' ids, and the primary score of each resample, mean over the row's runs."""
    total = np.zeros(resamples)
    ids: tuple[str, ...] = ()
    for run in row.runs:
        found, states = load_states(run)
        if ids and found != ids:
            return (), total
        ids = found
        # The same draws for every run of equal samples: this is what pairs them.
        generator = np.random.default_rng(seed)
        primary = _metric(run).primary_of(states)
        for r in range(resamples):
            drawn = np.bincount(generator.integers(len(ids), size=len(ids)), minlength=len(ids))
            try:
                total[r] += primary(drawn)
            except DataError:
                # No drawn sample is labelled, which depends on the samples and not on the run: left out for all rows.
                total[r] = np.nan
    return ids, total / len(row.runs)


def comparison_json(comparison: Comparison, *, cache: str) -> dict[str, Any]:
    """A comparison as JSON data: `{"cache", "runs": [{"head", "seed", "metrics", …}], "rows", "stopped"}`.

    Scores are fractions. `head` is the short name; `label` what the head was chosen by.
    """
    rows = comparison.rows
    return {
        "cache": cache,
        "mixed": comparison.mixed,
        "runs": [_run_json(run) for row in rows for run in row.runs],
        "rows": [
            {
                "task": row.task,
                "head": row.head.partition("/")[2],
                "label": row.label,
                "seeds": [run.seed for run in row.runs],
                "primary": row.primary,
                "metrics": {n: to_json(s) for n, s in row.metrics.items()},
                "difference": to_json(row.difference) if row.difference else None,
                "parameters": row.parameters,
                "seconds_per_iteration": row.seconds_per_iteration,
            }
            for row in rows
        ],
        "stopped": [{**_run_json(run), "reason": run.reason} for run in comparison.stopped],
    }


def _run_json(run: Run) -> dict[str, Any]:
    return {
        "head": run.head.partition("/")[2],
        "task": run.task,
        "label": run.label,
        "seed": run.seed,
        "metrics": dict(run.metrics),
        "status": run.status,
        "folder": str(run.folder),
        "recipe": run.recipe,
        "options": to_json(run.options),
        "iterations": run.iterations,
        "parameters": run.cost.parameters,
        "seconds_per_iteration": run.cost.seconds_per_iteration,
        "random_weights": run.random_weights,
        "features": run.features_key,
        "targets": run.targets_key,
    }
