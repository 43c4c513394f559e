"""`fcache ls`: the caches and runs below a folder."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

DEPTH = 5


@click.command(
    epilog="""\b
Examples:
  fcache ls
  fcache ls /data/caches --json
"""
)
@click.argument("folder", default=".", metavar="[FOLDER|URL]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
def command(folder: str, as_json: bool) -> None:
    """List the caches and runs below FOLDER (the current one by default, five levels deep), or below a URL."""
    from fcache.cache_spec import SpecError
    from fcache.cache_spec.storage.protocol import is_url
    from fcache.cache_spec.upkeep.superseding import find_caches
    from fcache.cli.progress import size
    from fcache.cli.tables import table

    if is_url(folder):
        found = [_describe("cache", url) for url in find_caches(folder)]
    elif Path(folder).is_dir():
        found = [_describe(kind, str(path)) for kind, path in find(Path(folder))]
    else:
        raise SpecError(f"{folder} is no folder")
    if as_json:
        click.echo(json.dumps(found, indent=2))
    elif not found:
        click.echo(f"no cache and no run below {folder}")
    else:
        rows = [[f["path"], f["kind"], f["what"], size(f["bytes"]), f["state"]] for f in found]
        click.echo(table(["path", "kind", "what", "size", "state"], rows, left=3))


def find(root: Path) -> Iterator[tuple[str, Path]]:
    """("cache" or "run", folder) for each below `root`, in the order of their paths; hidden folders are passed over."""
    for folder, folders, files in os.walk(root):
        path = Path(folder)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        if len(path.relative_to(root).parts) >= DEPTH:
            folders.clear()
        if "zarr.json" in files and _holds(path / "zarr.json", "attributes", "fcache"):
            yield "cache", path
            folders.clear()
        elif "run.json" in files and _holds(path / "run.json", "head"):
            yield "run", path
            folders.clear()


def _holds(path: Path, *keys: str) -> bool:
    """Whether the JSON file has a value under these keys; an unreadable one counts, so that it is listed."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return True
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            return False
        value = value[key]
    return True


def _describe(kind: str, path: str) -> dict[str, Any]:
    from fcache.cache_spec import FcacheError

    entry: dict[str, Any] = {"path": path, "kind": kind, "what": "", "bytes": 0, "state": ""}
    try:
        return entry | (_cache(path) if kind == "cache" else _run(Path(path)))
    except (FcacheError, OSError, ValueError, KeyError, TypeError) as error:
        return entry | {"state": f"unreadable: {' '.join(str(error).split())}"}


def _cache(path: str) -> dict[str, Any]:
    from fcache.cache_spec import open_cache

    reader = open_cache(path, allow_partial=True)
    spec = reader.manifest.features
    commits = [reader.committed(g, part) for g in reader.manifest.groups for part in reader.manifest.parts()]
    total = sum(g.num_shards for g in reader.manifest.groups) * len(reader.manifest.parts())
    done = sum(map(len, commits))
    dataset = reader.manifest.targets[0].dataset if reader.manifest.targets else "no targets"
    return {
        "what": f"{spec.backbone.name} · {dataset}",
        "bytes": sum(found.bytes for found in commits),
        "state": "complete" if done == total else f"{done}/{total} parts of shards",
    }


def _run(path: Path) -> dict[str, Any]:
    record = json.loads((path / "run.json").read_bytes())
    scores = record["evaluations"][-1]["metrics"] if record["evaluations"] else {}
    best = next((f"{name} {value:.4f}" for name, value in scores.items()), "not evaluated")
    return {
        "what": f"{record['label']} · seed {record['train']['seed']}",
        "bytes": sum(f.stat().st_size for f in path.rglob("*") if f.is_file()),
        "state": f"{record['status']}, {best}",
    }
