"""`fcache repair`: take back the commits of damaged shards."""

import click

PARTIAL = 3


@click.command(
    epilog="""\b
Examples:
  fcache repair ade.fcache              then run the `fcache extract` that made it again
  fcache repair ade.fcache --fast       presence and sizes only

\b
Exit status: 0 nothing was damaged, 3 shards are pending now.
"""
)
@click.argument("cache", metavar="CACHE")
@click.option("--fast", is_flag=True, help="Check presence and sizes only, not every byte.")
def command(cache: str, fast: bool) -> int:
    """Check a cache and make every damaged shard pending: the same `fcache extract` then makes only those anew."""
    from fcache.cache_spec import make_pending, verify
    from fcache.cli.progress import Progress

    with Progress() as progress:
        result = verify(
            cache, deep=not fast, report=lambda done, total: progress.show(f"verify  {done}/{total} parts of shards")
        )
    if not result.corrupt:
        click.echo(f"{cache}: nothing is damaged, {len(result.missing)} parts of shards were never committed")
        return PARTIAL if result.missing else 0
    for fault in result.corrupt:
        click.echo(
            f"{fault.group}/{fault.part}" + (f" shard {fault.shard}" if fault.shard >= 0 else "") + f": {fault.what}"
        )
    click.echo(
        f"{cache}: {make_pending(cache, result.corrupt)} parts of shards are pending now; run the `fcache extract` "
        "that made this cache again, it makes only those anew"
    )
    return PARTIAL
