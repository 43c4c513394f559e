"""`fcache gc`: what nothing needs, and removing it."""

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from fcache.cache_spec.upkeep.cleaning import Garbage
    from fcache.cache_spec.upkeep.superseding import Superseded


@click.command(
    epilog="""\b
Examples:
  fcache gc ade.fcache                       list what nothing needs, remove nothing
  fcache gc ade.fcache --apply               remove it
  fcache gc /data/caches                     every cache below, and caches that another one contains
  fcache gc /data/caches --apply --superseded

\b
Listed are temporary files of dead processes, claims of dead holders, manifests of before, and files
of shards that are not committed. What a running extraction uses is not, nor are files that are not
fcache's. A superseded cache is one whose every record lies in another cache of the same features;
it is removed only with --superseded, after every byte of the other one was checked.
"""
)
@click.argument("path", metavar="CACHE|FOLDER|URL")
@click.option("--apply", is_flag=True, help="Remove what is listed; without it nothing is changed.")
@click.option("--superseded", is_flag=True, help="With --apply: remove superseded caches, too.")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def command(path: str, apply: bool, superseded: bool, as_json: bool) -> int:
    """List what nothing needs in a cache, or in all caches of a folder, with its bytes; --apply removes it."""
    from fcache.cache_spec import FcacheError, SpecError
    from fcache.cache_spec.upkeep.cleaning import find_garbage, remove_garbage
    from fcache.cache_spec.upkeep.superseding import find_caches, find_superseded, remove_superseded
    from fcache.cli.progress import Progress

    if superseded and not apply:
        raise SpecError("--superseded belongs to --apply; without both, superseded caches are listed only")
    caches = find_caches(path)
    if not caches:
        raise SpecError(f"no cache at {path} or below")
    with Progress() as progress:
        listed: list[tuple[str, Garbage]] = []
        foreign: list[tuple[str, str, int]] = []
        failed: list[FcacheError] = []
        for done, cache in enumerate(caches):
            progress.show(f"gc  {done}/{len(caches)} caches")
            try:
                found = find_garbage(cache)
                foreign += [(cache, name, size) for name, size in found.foreign]
                listed += [(cache, g) for g in (remove_garbage(cache) if apply else found.garbage)]
            except FcacheError as error:
                # A damaged cache, or one that is being created, does not keep the others from being cleaned.
                failed.append(error)
        progress.show("gc  comparing caches")
        inside = find_superseded(caches)
        for entry in inside if superseded else ():
            progress.show(f"gc  checking {entry.by}")
            remove_superseded(entry)
    if as_json:
        click.echo(json.dumps(_data(listed, inside, foreign, apply, superseded), indent=2))
    else:
        click.echo(_text(path, listed, inside, foreign, apply, superseded))
    for error in failed[1:]:
        click.echo(f"left alone: {error}", err=True)
    if failed:
        raise failed[0]
    return 0


def _data(
    listed: "list[tuple[str, Garbage]]",
    inside: "list[Superseded]",
    foreign: list[tuple[str, str, int]],
    applied: bool,
    superseded: bool,
) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "removed": applied,
        "garbage": [{"cache": cache, **asdict(g)} for cache, g in listed],
        "superseded_removed": superseded,
        "superseded": [asdict(entry) for entry in inside],
        "foreign": [{"cache": cache, "name": name, "bytes": size} for cache, name, size in foreign],
    }


def _text(
    path: str,
    listed: "list[tuple[str, Garbage]]",
    inside: "list[Superseded]",
    foreign: list[tuple[str, str, int]],
    applied: bool,
    superseded: bool,
) -> str:
    from fcache.cli.progress import size

    verb = "removed" if applied else "to remove"
    lines = [f"{verb}  {cache}/{g.name}  {g.bytes} bytes  {g.kind}: {g.why}" for cache, g in listed]
    lines += [f"left alone  {cache}/{name}  {n} bytes  not fcache's" for cache, name, n in foreign]
    for entry in inside:
        what = "removed" if superseded else "superseded"
        lines.append(f"{what}  {entry.cache}  {entry.bytes} bytes  all of it lies in {entry.by}")
    total = sum(g.bytes for _, g in listed) + sum(entry.bytes for entry in inside if superseded)
    lines.append(f"{path}: {len(listed)} files that nothing needs {verb}, {size(total)}")
    if listed and not applied:
        lines.append("nothing was changed; --apply removes them")
    if inside and not superseded:
        lines.append(f"{len(inside)} superseded caches stay; --apply --superseded removes them")
    return "\n".join(lines)
