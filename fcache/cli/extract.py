"""`fcache extract`: run a frozen backbone over a dataset and cache its features."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from fcache.cli.job import job_options, parse_job

if TYPE_CHECKING:
    from fcache.cli.progress import Progress
    from fcache.extractor import Event, ExtractResult

PARTIAL = 3


@click.command(
    epilog="""\b
Examples:
  fcache extract --model swinv2-t --dataset ade20k --data-root ADEChallengeData2016
  fcache extract --model mobilenetv2_100 --weights mobilenet.safetensors --dataset ade20k \\
      --data-root camvid --recipe camvid-small --cache camvid.fcache
  fcache extract … --dry-run            bytes, time and free space, nothing written
  fcache extract … --part 0/4           one of four machines on one cache

\b
The same command again continues. Several may run on one cache at once and share the work.
Exit status: 3 if samples were quarantined, 5 if the cache has other settings, 6 without space.
"""
)
@job_options
@click.option("--dry-run", is_flag=True, help="Say what it costs (as `fcache plan`) and stop.")
def command(dry_run: bool, **options: Any) -> int:
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

    with Progress() as progress, stop_on_signals() as should_stop:
        progress.note(
            f"extract  {job.model} ({job.weights}) on {job.device}  {job.dataset} at {job.root} -> {job.cache}"
        )
        try:
            result = extract(job, report=progress_of(progress), should_stop=should_stop)
        except Stopped:
            progress.note("extract  stopped; what is committed stays, the same command continues")
            raise KeyboardInterrupt from None
    click.echo(summary(str(job.cache), result))
    return PARTIAL if result.quarantined or result.pending else 0


def progress_of(progress: "Progress") -> "Callable[[Event], None]":
    """What renders an extraction's events."""
    from fcache.cli.progress import rate, size
    from fcache.extractor import DataNoted, ExtractionStarted, RecordsDone, SampleQuarantined, WaitingForOthers

    def report(event: "Event") -> None:
        if isinstance(event, ExtractionStarted):
            progress.note(
                f"extract  {event.records} records to do, {event.done} done before, {size(event.bytes)} to write"
            )
        elif isinstance(event, RecordsDone):
            progress.show("extract  " + rate(event.records, event.total, event.seconds, "records"))
        elif isinstance(event, DataNoted):
            progress.note(f"extract  {event.text}")
        elif isinstance(event, SampleQuarantined):
            progress.note(f"extract  left out {event.sample}: {event.reason}")
        elif isinstance(event, WaitingForOthers):
            progress.show(f"extract  waiting: the last {event.shards} parts of shards are claimed by other processes")

    return report


def summary(cache: str, result: "ExtractResult") -> str:
    """What a run did, in words."""
    from fcache.cli.progress import duration

    lines = [
        f"{cache}: {result.records} records in {duration(result.seconds)}, {result.shards} parts of shards committed"
    ]
    if result.quarantined:
        lines.append(f"{len(result.quarantined)} samples are quarantined; `fcache info {cache}` names them")
    if result.pending:
        lines.append(f"{result.pending} parts of shards are not done yet (another --part, or another process)")
    return "\n".join(lines)
