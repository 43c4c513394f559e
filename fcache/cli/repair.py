"""`fcache repair`: damaged shards are extracted anew, and only those."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from fcache.cache_spec import Fault, Manifest
    from fcache.extractor import Job

PARTIAL = 3
CORRUPT = 4


@click.command(
    epilog="""\b
Examples:
  fcache repair ade.fcache
  fcache repair ade.fcache --dry-run              list what is damaged, change nothing
  fcache repair ade.fcache --quarantined          try the samples again that could not be used
  fcache repair s3://bucket/ade.fcache --data-root ADEChallengeData2016 --weights swin.pth

\b
Model, weights and data are those that the cache was made from, as it recorded them; they are checked
by digest before anything is changed. Shards of the same splits that were never committed are made,
too.
Exit status: 0 nothing is damaged (any more), 3 samples are quarantined or shards are pending,
4 damaged (--dry-run), 5 the weights or the data are others.
"""
)
@click.argument("cache", metavar="CACHE")
@click.option("--fast", is_flag=True, help="Check presence and sizes only, not every byte.")
@click.option("--quarantined", is_flag=True, help="Make shards with quarantined samples again, too.")
@click.option("--dry-run", is_flag=True, help="List the shards and stop.")
@click.option("--weights", help="The backbone's weights, if they have moved.", metavar="FILE")
@click.option("--data-root", help="The data, if they have moved.", metavar="DIR")
@click.option("--device", help="cpu, cuda, cuda:1, mps; by default the first GPU, else the CPU.", metavar="NAME")
@click.option("--workers", type=int, help="Decoding processes; 0 decodes in this one.", metavar="N")
def command(
    cache: str,
    fast: bool,
    quarantined: bool,
    dry_run: bool,
    weights: str | None,
    data_root: str | None,
    device: str | None,
    workers: int | None,
) -> int:
    """Check a cache and extract its damaged shards anew, and only those."""
    from fcache.cache_spec import make_pending, open_storage, verify
    from fcache.cache_spec.store import read_manifest
    from fcache.cli.progress import Progress

    with Progress() as progress:
        result = verify(
            cache, deep=not fast, report=lambda done, total: progress.show(f"verify  {done}/{total} parts of shards")
        )
    manifest = read_manifest(open_storage(cache))
    bad = list(result.corrupt)
    if quarantined:
        from fcache.extractor import find_quarantined

        bad += find_quarantined(open_storage(cache), manifest)
    for fault in bad:
        where = f"{fault.group}/{fault.part}" if fault.group else "the root"
        click.echo(where + (f" shard {fault.shard}" if fault.shard >= 0 else "") + f": {fault.what}")
    if not bad:
        click.echo(f"{cache}: nothing is damaged, {len(result.missing)} parts of shards were never committed")
        return PARTIAL if result.missing else 0
    if dry_run:
        click.echo(f"{cache}: {len(bad)} faults would be repaired; nothing was changed")
        return CORRUPT if result.corrupt else PARTIAL
    # Commits of shards that the manifest does not have are only removed.
    stray = [f for f in bad if f.shard >= 0 and f.shard >= manifest.group(f.group).num_shards]
    make_pending(cache, stray)
    shards = [f for f in bad if f.shard >= 0 and f not in stray]
    if len(shards) + len(stray) < len(bad):
        restore_metadata(cache, manifest)
    if not shards:
        click.echo(f"{cache}: repaired, no shard had to be made")
        return PARTIAL if result.missing else 0
    splits = tuple(dict.fromkeys(manifest.group(f.group).split for f in shards))
    return run(job_of_cache(cache, manifest, splits, weights, data_root, device, workers), shards)


def restore_metadata(cache: str, manifest: "Manifest") -> None:
    """Writes what other zarr readers go by as the manifest implies it.

    Raises CorruptError if something stays damaged: only a copy has what the manifest does not imply.
    """
    from dataclasses import replace

    from fcache.cache_spec import CorruptError, open_writer, verify

    open_writer(cache, replace(manifest, groups=tuple(replace(g, extents=()) for g in manifest.groups)))
    if left := [f for f in verify(cache).corrupt if f.shard < 0]:
        raise CorruptError(f"{cache}: {left[0].what}; this cannot be made anew, restore it from a copy")


def job_of_cache(
    cache: str,
    manifest: "Manifest",
    splits: tuple[str, ...],
    weights: str | None,
    root: str | None,
    device: str | None,
    workers: int | None,
) -> "Job":
    """The extraction that splits of a cache were made by, of what its manifest has; what is given replaces its hints.

    Raises SpecError if the cache does not say how it was made.
    """
    from fcache.cache_spec import SpecError
    from fcache.cli.job import best_device
    from fcache.extractor import Job

    made: Any = manifest.hints
    if missing := [name for name in ("model", "weights", "dataset", "root") if name not in made]:
        raise SpecError(f"{cache} does not say its {missing[0]}: run the `fcache extract` that made it again")
    size, levels = made.get("input_size"), made.get("levels")
    return Job(
        model=made["model"],
        dataset=made["dataset"],
        root=Path(root or made["root"]),
        cache=cache,
        weights=weights or made["weights"],
        splits=splits,
        view_recipe=made.get("view_recipe"),
        input_size=(size[0], size[1]) if size else None,
        window=made.get("window"),
        levels=tuple(levels) if levels else None,
        encoding=manifest.features.training.encoding,
        precision=manifest.features.backbone.precision,
        seed=manifest.features.seed,
        device=device or best_device(),
        workers=workers,
        grow=False,
    )


def run(job: "Job", faults: "Sequence[Fault]") -> int:
    """Makes shards anew; returns the exit status."""
    from fcache.cli.extract import progress_of, summary
    from fcache.cli.interrupts import stop_on_signals
    from fcache.cli.progress import Progress
    from fcache.extractor import Stopped, repair

    with Progress() as progress, stop_on_signals() as should_stop:
        progress.note(f"repair  {job.model} ({job.weights}) on {job.device}  {job.dataset} at {job.root}")
        try:
            result = repair(job, faults, report=progress_of(progress), should_stop=should_stop)
        except Stopped:
            progress.note("repair  stopped; what is committed stays, the rest is pending: `fcache extract` makes it")
            raise KeyboardInterrupt from None
    click.echo(summary(str(job.cache), result))
    return PARTIAL if result.quarantined or result.pending else 0
