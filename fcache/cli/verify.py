"""`fcache verify`: compare a cache with its commits."""

import json
from dataclasses import asdict

import click

PARTIAL = 3
SHOWN = 20


@click.command(
    epilog="""\b
Examples:
  fcache verify ade.fcache
  fcache verify ade.fcache --deep       read every byte

\b
Exit status: 0 complete and unharmed, 3 shards are missing, 4 corrupt.
"""
)
@click.argument("cache", metavar="CACHE")
@click.option("--deep", is_flag=True, help="Read every byte and compare SHA-256 digests, not only presence and sizes.")
@click.option("--json", "as_json", is_flag=True, help="Print all faults as JSON.")
def command(cache: str, deep: bool, as_json: bool) -> int:
    """Check that a cache is complete and that its files hold what their commits say. Changes nothing."""
    from fcache.cache_spec import CorruptError, verify
    from fcache.cli.progress import Progress, size

    with Progress() as progress:
        result = verify(
            cache, deep=deep, report=lambda done, total: progress.show(f"verify  {done}/{total} parts of shards")
        )
    if as_json:
        click.echo(json.dumps(asdict(result), indent=2))
    else:
        faults = [*result.corrupt, *result.missing]
        for fault in faults[:SHOWN]:
            where = f"{fault.group}/{fault.part}" + (f" shard {fault.shard}" if fault.shard >= 0 else "")
            click.echo(f"{fault.kind:8}{where}: {fault.what}")
        if len(faults) > SHOWN:
            click.echo(f"… and {len(faults) - SHOWN} more (--json shows all)")
        how = "every byte read" if deep else "presence and sizes; --deep reads every byte"
        click.echo(f"{result.committed} of {result.parts} parts of shards committed, {size(result.bytes)} ({how})")
    if result.corrupt:
        raise CorruptError(f"{cache}: {len(result.corrupt)} parts of shards are corrupt; run `fcache repair {cache}`")
    return PARTIAL if result.missing else 0
