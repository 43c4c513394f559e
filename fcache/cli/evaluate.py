"""`fcache evaluate`: score trained heads on the evaluation split."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from fcache.cache_spec import BlockSource
    from fcache.heads import Run, Scored


@click.command(
    epilog="""\b
Examples:
  fcache evaluate runs/*
  fcache evaluate runs/upernet-seed0 --cache /mnt/copy/ade.fcache
  fcache evaluate runs/upernet-seed0 --live --data-root ADEChallengeData2016

\b
Heads of one cache are scored in one pass. Runs are not changed.
"""
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--cache", help="Where the cache is now; by default where it was in training.", metavar="PATH")
@click.option("--live", is_flag=True, help="Run the backbone on the photos instead of reading the cache.")
@click.option("--weights", help="With --live: the backbone's weights, if they have moved.", metavar="FILE")
@click.option("--data-root", help="With --live: the photos, if they have moved.", metavar="DIR")
@click.option("--device", help="cpu, cuda, cuda:1, mps; by default the first GPU, else the CPU.", metavar="NAME")
@click.option("--json", "as_json", is_flag=True, help="Print scores as JSON, per class too.")
def command(
    runs: tuple[str, ...],
    cache: str | None,
    live: bool,
    weights: str | None,
    data_root: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Score trained heads on the evaluation split they were made for."""
    from fcache.cache_spec import SpecError
    from fcache.cli.job import best_device
    from fcache.cli.progress import Progress
    from fcache.cli.tables import table
    from fcache.cli.train_head import progress_of
    from fcache.heads import check_source, evaluate_heads, load_head, load_run

    if not live and (weights or data_root):
        raise SpecError("--weights and --data-root belong to --live: a cache holds all that scoring needs")
    device = device or best_device()
    groups: dict[str, list[Run]] = {}
    for run in map(load_run, dict.fromkeys(runs)):
        groups.setdefault(cache or run.hints.get("cache", ""), []).append(run)
    found: dict[str, tuple[Run, Scored]] = {}
    with Progress() as progress:
        for path, members in groups.items():
            if live:
                source = live_source(members[0], weights, data_root, device)
            else:
                source = stored_source(path, members, device)
            for run in members:
                check_source(run, source)
            heads = [load_head(run, device=device) for run in members]
            results = evaluate_heads(heads, source, device=device, report=progress_of(progress))
            found |= {str(run.folder): (run, r) for run, r in zip(members, results, strict=True)}
    ordered = [found[str(Path(run))] for run in dict.fromkeys(runs)]
    if as_json:
        click.echo(json.dumps([as_data(run, scored) for run, scored in ordered], indent=2))
        return
    names = list(dict.fromkeys(name for _, scored in ordered for name in scored.scores.values if "/" not in name))
    rows = [
        [str(run.folder), run.label, str(len(scored.ids)), *_cells(scored.scores.values, names)]
        for run, scored in ordered
    ]
    click.echo(table(["run", "head", "samples", *names], rows, left=2))


def _cells(values: Mapping[str, float], names: list[str]) -> list[str]:
    return [f"{values[name]:.4f}" if name in values else "-" for name in names]


def as_data(run: "Run", scored: "Scored") -> dict[str, Any]:
    """Scores of one run as JSON data; a class without a score has null."""
    scores = scored.scores
    per_class = {name: [None if x != x else float(x) for x in values] for name, values in scores.per_class.items()}
    metrics = {name: float(value) for name, value in scores.values.items()}
    return {
        "run": str(run.folder),
        "head": run.label,
        "seed": run.seed,
        "samples": len(scored.ids),
        "metrics": metrics,
        "chosen": scores.chosen,
        "per_class": per_class,
    }


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


def live_source(run: "Run", weights: str | None, data_root: str | None, device: str) -> "BlockSource":
    """The evaluation split with the backbone run on the fly."""
    from fcache.cli.job import job_of_run
    from fcache.extractor import find_dataset, open_live

    job = job_of_run(run, weights=weights, root=data_root, device=device)
    splits = find_dataset(job.dataset).splits
    split = next(name for name, role in splits.items() if role == "evaluation")
    return open_live(replace(job, splits=(split,)), split, batch_size=run.train.batch_size, order="sequential")
