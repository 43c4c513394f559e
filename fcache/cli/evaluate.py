"""`fcache evaluate`: score trained heads on the evaluation split."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fcache.cli.job import tta_option

if TYPE_CHECKING:
    from fcache.cache_spec import BlockSource
    from fcache.extractor import TTA, Job
    from fcache.heads import Report, Run, Scored


@click.command(
    epilog="""\b
Examples:
  fcache evaluate runs/*
  fcache evaluate runs/upernet-seed0 --cache /mnt/copy/ade.fcache
  fcache evaluate runs/upernet-seed0 --live --data-root ADEChallengeData2016
  fcache evaluate runs/* --tta ms-flip                   six scales, each mirrored too
  fcache evaluate runs/* --tta ms-flip:scales=0.75,1,1.25
  fcache evaluate runs/* --tta slide:window=512,stride=341

\b
Heads of one cache are scored in one pass: the backbone runs once a view for all of them. Runs
are not changed, and `compare` knows single views only. The column "views" says what the scores
are of.
"""
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--cache", help="Where the cache is now; by default where it was in training.", metavar="PATH")
@click.option("--live", is_flag=True, help="Run the backbone on the photos instead of reading the cache.")
@tta_option
@click.option("--weights", help="Live: the backbone's weights, if they have moved.", metavar="FILE")
@click.option("--data-root", help="Live: the photos, if they have moved.", metavar="DIR")
@click.option("--limit", type=click.IntRange(1), help="Live: only the first photos.", metavar="N")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    help="Live: photos in one forward pass. With --tta by default as many as make a megapixel, at most 16.",
    metavar="N",
)
@click.option("--device", help="cpu, cuda, cuda:1, mps; by default the first GPU, else the CPU.", metavar="NAME")
@click.option("--json", "as_json", is_flag=True, help="Print scores as JSON, per class too.")
def command(
    runs: tuple[str, ...],
    cache: str | None,
    live: bool,
    tta: str | None,
    weights: str | None,
    data_root: str | None,
    limit: int | None,
    batch_size: int | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Score trained heads on the evaluation split they were made for. --tta runs the backbone, as --live does."""
    from fcache.cache_spec import SpecError
    from fcache.cli.job import best_device
    from fcache.cli.progress import Progress
    from fcache.cli.tables import table
    from fcache.cli.train_head import progress_of
    from fcache.heads import load_run

    live = live or tta is not None
    if not live and (weights or data_root or limit or batch_size):
        raise SpecError(
            "--weights, --data-root, --limit and --batch-size belong to --live or --tta: a cache holds all that "
            "scoring needs"
        )
    device = device or best_device()
    groups: dict[str, list[Run]] = {}
    for run in map(load_run, dict.fromkeys(runs)):
        # Live features are the same for all copies of a cache: one pass.
        where = run.features_key if live else cache or run.hints.get("cache", "")
        groups.setdefault(where, []).append(run)
    found: dict[str, tuple[Run, Scored, TTA | None]] = {}
    with Progress() as progress:
        for where, members in groups.items():
            report = progress_of(progress)
            views: TTA | None = None
            if tta is not None:
                job, split = live_job(members[0], weights, data_root, limit, device)
                views, results = score_views(members, job, split, tta, batch_size, report)
            elif live:
                job, split = live_job(members[0], weights, data_root, limit, device)
                size = batch_size or members[0].train.batch_size
                results = score(members, live_source(job, split, size), device, report)
            else:
                results = score(members, stored_source(where, members, device), device, report)
            found |= {str(run.folder): (run, r, views) for run, r in zip(members, results, strict=True)}
    ordered = [found[str(Path(run))] for run in dict.fromkeys(runs)]
    if as_json:
        click.echo(json.dumps([as_data(*one) for one in ordered], indent=2))
        return
    names = list(dict.fromkeys(name for _, scored, _ in ordered for name in scored.scores.values if "/" not in name))
    rows = [
        [
            str(run.folder),
            run.label,
            str(len(scored.ids)),
            views.name if views else "plain",
            *_cells(scored.scores.values, names),
        ]
        for run, scored, views in ordered
    ]
    click.echo(table(["run", "head", "samples", "views", *names], rows, left=2))


def _cells(values: Mapping[str, float], names: list[str]) -> list[str]:
    return [f"{values[name]:.4f}" if name in values else "-" for name in names]


def as_data(run: "Run", scored: "Scored", views: "TTA | None") -> dict[str, Any]:
    """Scores of one run as JSON data. `views` are test-time views, if there were.

    Lists in "per_class" are in the order of "classes"; a class without a score has null.
    """
    from fcache.cache_spec import to_json

    scores = scored.scores
    per_class = {name: [None if x != x else float(x) for x in values] for name, values in scores.per_class.items()}
    metrics = {name: float(value) for name, value in scores.values.items()}
    return {
        "run": str(run.folder),
        "head": run.label,
        "seed": run.seed,
        "samples": len(scored.ids),
        "views": views.name if views else "plain",
        "tta": to_json(views) if views else None,
        "metrics": metrics,
        "chosen": scores.chosen,
        "classes": list(run.targets[0].class_names),
        "per_class": per_class,
    }


def score(runs: "list[Run]", source: "BlockSource", device: str, report: "Report") -> "list[Scored]":
    """The heads of runs scored on single views. Raises IncompatibleError if a run is of other features or targets."""
    from fcache.heads import check_source, evaluate_heads, load_head

    for run in runs:
        check_source(run, source)
    return evaluate_heads([load_head(run, device=device) for run in runs], source, device=device, report=report)


def score_views(
    runs: "list[Run]", job: "Job", split: str, tta: str, batch_size: int | None, report: "Report"
) -> "tuple[TTA, list[Scored]]":
    """The heads of runs scored on test-time views, and these. Raises as `score`, and SpecError for the views."""
    from fcache.extractor import find_tta, open_views
    from fcache.heads import check_source, evaluate_views, load_head

    views = find_tta(tta, job)
    source = open_views(job, split, tta=views, batch_size=batch_size)
    for run in runs:
        check_source(run, source)
    heads = [load_head(run, device=job.device) for run in runs]
    return views, evaluate_views(heads, source, device=job.device, report=report)


def stored_source(path: str, runs: "list[Run]", device: str) -> "BlockSource":
    """The evaluation split of the runs' cache. Raises SpecError if it has none, or no cache is known."""
    from fcache.cache_spec import SpecError, StreamConfig, open_cache
    from fcache.cli.train_head import decoded_for, evaluation_source, split_of

    if not path:
        raise SpecError(f"{runs[0].folder} does not say where its cache is; name it with --cache")
    reader = open_cache(path)
    split = split_of(reader, "evaluation")
    if split is None:
        raise SpecError(f"{path} has no evaluation split; extract it with --split val")
    levels = tuple(dict.fromkeys(level.name for run in runs for level in run.levels))
    kinds = tuple(dict.fromkeys(target.kind for run in runs for target in run.targets))
    batch = min(run.train.batch_size for run in runs)
    stream = StreamConfig(batch_size=batch, levels=levels, kinds=kinds, decode=decoded_for(device))
    return evaluation_source(reader, split, stream)


def live_job(
    run: "Run", weights: str | None, data_root: str | None, limit: int | None, device: str
) -> "tuple[Job, str]":
    """The job that makes a run's features anew, for its evaluation split alone, and that split's name."""
    from fcache.cli.job import job_of_run
    from fcache.extractor import find_dataset

    job = job_of_run(run, weights=weights, root=data_root, device=device)
    splits = find_dataset(job.dataset).splits
    split = next(name for name, role in splits.items() if role == "evaluation")
    return replace(job, splits=(split,), limit=limit), split


def live_source(job: "Job", split: str, batch_size: int) -> "BlockSource":
    """A split with the backbone run on the fly."""
    from fcache.extractor import open_live

    return open_live(job, split, batch_size=batch_size, order="sequential")
