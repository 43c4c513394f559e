"""`fcache copy`: a cache to another folder or object store."""

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from fcache.cache_spec.upkeep.copying import CopyProgress

PARTIAL = 3
SHOWN = 20


@click.command(
    epilog="""\b
Examples:
  fcache copy ade.fcache s3://bucket/caches/ade.fcache
  fcache copy s3://bucket/caches/ade.fcache /nvme/ade.fcache --split train
  fcache copy ade.fcache /mnt/copy/ade.fcache --dry-run      only say what there is to do

\b
The same command again continues: what is at the target is not copied again. Credentials and endpoint
of an object store come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION,
AWS_ENDPOINT_URL).
Exit status: 0 all is there, 3 shards are not committed at the source or being written at the target,
4 shards are damaged at the source and were left out, 5 the target is another cache, 6 no space.
"""
)
@click.argument("source", metavar="SOURCE")
@click.argument("target", metavar="TARGET")
@click.option("--split", help="Which splits; by default all.", metavar="LIST")
@click.option("--dry-run", is_flag=True, help="Say what would be copied and stop.")
def command(source: str, target: str, split: str | None, dry_run: bool) -> int:
    """Copy a cache between folders and object stores, each shard checked against its digest on the way."""
    from fcache.cache_spec import CorruptError
    from fcache.cache_spec.upkeep.copying import copy_cache, plan_copy
    from fcache.cli.job import words
    from fcache.cli.progress import Progress, size

    splits = None if split is None else words(split)
    if dry_run:
        plan = plan_copy(source, target, splits=splits)
        faults, missing, busy = plan.faults, plan.missing, 0
        done = f"{plan.copy} parts of shards to copy, {size(plan.bytes)}; {plan.skip} are there already"
    else:
        with Progress() as progress:

            def report(now: "CopyProgress") -> None:
                progress.show(
                    f"copy  {now.parts}/{now.total_parts} parts of shards  {size(now.bytes)} of {size(now.total_bytes)}"
                )

            result = copy_cache(source, target, splits=splits, report=report)
        faults, missing, busy = result.faults, result.missing, result.busy
        done = f"{result.copied} parts of shards copied, {size(result.bytes)} read; {result.skipped} were there already"
    for fault in faults[:SHOWN]:
        click.echo(f"damaged {fault.group}/{fault.part} shard {fault.shard}: {fault.what}")
    if len(faults) > SHOWN:
        click.echo(f"… and {len(faults) - SHOWN} more")
    click.echo(f"{target}: {done}")
    if missing:
        click.echo(f"{missing} parts of shards are not committed at the source; they are pending at the target")
    if busy:
        click.echo(f"{busy} parts of shards are being written at the target by another process")
    if faults:
        raise CorruptError(
            f"{source}: {len(faults)} parts of shards are damaged and were left out; run `fcache repair {source}`, "
            "then this command again"
        )
    return PARTIAL if missing or busy else 0
