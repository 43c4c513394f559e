"""`fcache compare`: the runs of one cache side by side."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from fcache.heads import Comparison, Row, Run, Spread


@click.command(
    epilog="""\b
Examples:
  fcache compare --cache ade.fcache runs/*
  fcache compare --cache ade.fcache     the runs below ./runs that are of this cache
  fcache compare --cache ade.fcache runs --json

\b
Runs that differ in their seed only make one row: mean ± standard deviation. "from best" is the
mean difference from the best row over resampled validation samples, with its 95 % interval.
Scores are fractions.
"""
)
@click.option("--cache", required=True, help="The cache whose runs are compared.", metavar="PATH")
@click.argument("runs", nargs=-1, metavar="[RUN...]")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
@click.option("--mixed", is_flag=True, help="Compare even runs of other caches, extents or targets.")
def command(cache: str, runs: tuple[str, ...], as_json: bool, mixed: bool) -> None:
    """Compare the runs of one cache. A RUN is a run's folder, or a folder of runs."""
    from fcache.cache_spec import open_cache
    from fcache.heads import compare, comparison_json

    key = open_cache(cache, allow_partial=True).manifest.features.key
    found = named_runs(runs, cache, key, mixed=mixed) if runs else runs_below(Path("runs"), key)
    comparison = compare(found, mixed=mixed)
    click.echo(json.dumps(comparison_json(comparison, cache=cache), indent=2) if as_json else text(comparison))


def named_runs(paths: tuple[str, ...], cache: str, key: str, *, mixed: bool) -> "list[Run]":
    """The runs at or below each path. Raises SpecError if a path holds none, IncompatibleError if one is of another
    cache and not `mixed`.
    """
    from fcache.cache_spec import IncompatibleError
    from fcache.heads import find_runs, load_run

    folders = [folder for path in paths for folder in find_runs(path) or (Path(path),)]
    found = [load_run(folder) for folder in dict.fromkeys(folders)]
    for run in found:
        if run.features_key != key and not mixed:
            raise IncompatibleError(
                f"{run.folder} was trained on features {run.features_key[:12]}, {cache} holds {key[:12]}; name the "
                "run's own cache, or pass --mixed"
            )
    return found


def runs_below(folder: Path, key: str) -> "list[Run]":
    """The runs directly below a folder that were trained on the features of this key."""
    from fcache.heads import find_runs, load_run

    found = [load_run(path) for path in find_runs(folder)]
    kept = [run for run in found if run.features_key == key]
    if len(kept) < len(found):
        click.echo(f"compare  {len(found) - len(kept)} runs below {folder} are of other caches", err=True)
    return kept


def text(comparison: "Comparison") -> str:
    """One table a task, best row first, then what stopped."""
    from fcache.cli.tables import table

    blocks: list[str] = []
    for task in dict.fromkeys(row.task for row in comparison.rows):
        rows = [row for row in comparison.rows if row.task == task]
        names = [name for name in rows[0].metrics if "/" not in name]
        header = [task, *names, "seeds", "from best", "parameters", "s/iter"]
        blocks.append(table(header, [_cells(row, names) for row in rows]))
    if seeds := {run.random_weights for row in comparison.rows for run in row.runs} - {None}:
        blocks.append(f"The backbone's weights are RANDOM ({', '.join(sorted(map(str, seeds)))}).")
    if comparison.mixed:
        blocks.append("MIXED: these runs may differ in features, samples or targets.")
    blocks += [f"{run.label} (seed {run.seed}) {run.status}: {run.reason}" for run in comparison.stopped]
    return "\n\n".join(blocks)


def _cells(row: "Row", names: list[str]) -> list[str]:
    gap = row.difference
    return [
        row.label,
        *(_spread(row.metrics[name]) if name in row.metrics else "-" for name in names),
        ",".join(str(run.seed) for run in row.runs),
        f"{gap.mean:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]" if gap else "-",
        f"{row.parameters:,}",
        f"{row.seconds_per_iteration:.4f}",
    ]


def _spread(score: "Spread") -> str:
    return f"{score.mean:.4f}" if score.sd is None else f"{score.mean:.4f} ± {score.sd:.4f}"
