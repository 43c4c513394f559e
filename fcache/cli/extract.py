"""`fcache extract`: run a frozen backbone over a dataset and cache its features."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from fcache.cli.job import job_options, parse_job

if TYPE_CHECKING:
    from fcache.cli.progress import Progress
    from fcache.extractor import Event, ExtractResult, Job
    from fcache.extractor.engines import Engine

PARTIAL = 3


@click.command(
    epilog="""\b
Examples:
  fcache extract --model swinv2-t --dataset ade20k --data-root ADEChallengeData2016
  fcache extract --model mobilenetv2_100 --weights mobilenet.safetensors --dataset ade20k \\
      --data-root camvid --recipe camvid-small --cache camvid.fcache
  fcache extract … --dry-run            bytes, time and free space, nothing written
  fcache extract … --devices 0,1,2,3    one process a GPU; they share the shards
  fcache extract … --scheduler tcp://node1:8786
                                        the workers of a dask cluster do the work

\b
The same command again continues. Several may run on one cache at once, on one machine or many, and
share the shards: start it as an array of jobs (--part i/n divides them beforehand instead).
Exit status: 3 if samples were quarantined, 5 if the cache has other settings, 6 without space.
"""
)
@job_options
@click.option(
    "--scheduler",
    help="Have the workers of a dask cluster do the work, each on its first GPU or on --devices.",
    metavar="ADDRESS",
)
@click.option("--dry-run", is_flag=True, help="Say what it costs (as `fcache plan`) and stop.")
def command(dry_run: bool, scheduler: str | None, **options: Any) -> int:
    """Run a frozen backbone over a dataset once and cache its feature pyramids."""
    from fcache.cli.interrupts import stop_on_signals
    from fcache.cli.progress import Progress

    job = parse_job(options)
    if dry_run:
        from fcache.cli.plan import NO_SPACE, show_plan
        from fcache.extractor import plan

        found = plan(job)
        click.echo(show_plan(found))
        return 0 if found.fits else NO_SPACE
    from fcache.extractor import Stopped, extract

    engine, where = engine_of(job, options["devices"], scheduler)
    with Progress() as progress, stop_on_signals() as should_stop:
        progress.note(f"extract  {job.model} ({job.weights}) on {where}  {job.dataset} at {job.root} -> {job.cache}")
        try:
            result = extract(job, report=progress_of(progress), should_stop=should_stop, engine=engine)
        except Stopped:
            progress.note("extract  stopped; what is committed stays, the same command continues")
            raise KeyboardInterrupt from None
    click.echo(summary(str(job.cache), result))
    return PARTIAL if result.quarantined or result.pending else 0


def engine_of(job: "Job", devices: str | None, scheduler: str | None) -> "tuple[Engine, str]":
    """Who does the work, and that in words. Raises SpecError if both several devices and a scheduler are named."""
    from fcache.cache_spec import SpecError
    from fcache.extractor import on_devices, parse_devices
    from fcache.extractor.engines.local import local

    named = parse_devices(devices) if devices else ()
    if scheduler is None:
        return (on_devices(named), ", ".join(named)) if len(named) > 1 else (local, job.device)
    if len(named) > 1:
        raise SpecError(
            f"each dask worker computes on one device, got --devices {devices}; start a worker a GPU (`dask cuda "
            "worker`) and leave --devices out"
        )
    # Here only, because distributed takes long to import.
    from fcache.extractor.engines.cluster import on_cluster

    return on_cluster(scheduler, device=named[0] if named else None), f"the workers of {scheduler}"


def progress_of(progress: "Progress") -> "Callable[[Event], None]":
    """What renders an extraction's events."""
    from fcache.cli.progress import rate, size
    from fcache.extractor import (
        ExtractionStarted,
        RecordsDone,
        SampleQuarantined,
        WaitingForOthers,
        WaitingForWorkers,
        WorkerLost,
    )

    def report(event: "Event") -> None:
        if isinstance(event, ExtractionStarted):
            progress.note(
                f"extract  {event.records} records to do, {event.done} done before, {size(event.bytes)} to write"
            )
        elif isinstance(event, RecordsDone):
            progress.show("extract  " + rate(event.records, event.total, event.seconds, "records"))
        elif isinstance(event, SampleQuarantined):
            progress.note(f"extract  left out {event.sample}: {event.reason}")
        elif isinstance(event, WaitingForOthers):
            progress.show(f"extract  waiting: the last {event.shards} shards are claimed by other processes")
        elif isinstance(event, WaitingForWorkers):
            progress.show("extract  waiting: the cluster has no workers")
        elif isinstance(event, WorkerLost):
            progress.note(f"extract  lost {event.worker} ({event.reason}); the others take over its shards")

    return report


def summary(cache: str, result: "ExtractResult") -> str:
    """What a run did, in words."""
    from fcache.cli.progress import duration

    lines = [
        f"{cache}: {result.records} records in {duration(result.seconds)}, {result.shards} parts of shards committed"
    ]
    if result.records and (whole := result.spent.total) > 0:
        spent = result.spent
        parts = {
            "waiting for decoding": spent.decoding,
            "backbone": spent.computing,
            "waiting for writing": spent.writing,
        }
        lines.append("time: " + ", ".join(f"{seconds / whole:.0%} {what}" for what, seconds in parts.items()))
    if result.quarantined:
        lines.append(f"{len(result.quarantined)} samples are quarantined; `fcache info {cache}` names them")
    if result.pending:
        lines.append(f"{result.pending} parts of shards are not done yet (another --part, or another process)")
    return "\n".join(lines)
