"""The root of a cache on disk: creating, growing and reading its manifest."""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fcache.cache_spec.commits import read_commits
from fcache.cache_spec.errors import CorruptError, IncompatibleError, SpecError
from fcache.cache_spec.files import explained, make_folders, write_durably
from fcache.cache_spec.identity import canonical_json, first_difference, from_json, to_json
from fcache.cache_spec.layout import FORMAT, Group, Manifest, grow_group, new_group, part_arrays
from fcache.cache_spec.shardfile import array_metadata
from fcache.cache_spec.spec import FeatureSpec, TargetSpec, targets_key

GROUP_NODE: dict[str, Any] = {"zarr_format": 3, "node_type": "group", "attributes": {}}
LOCK_SECONDS = 60.0


def is_cache(root: Path) -> bool:
    """Whether `root` holds a cache (of any state)."""
    return (root / "zarr.json").is_file()


def read_manifest(root: Path) -> Manifest:
    """The manifest of the cache at `root`.

    Raises SpecError if there is no cache, IncompatibleError for a newer format, CorruptError if a file is damaged.
    """
    try:
        attributes = json.loads((root / "zarr.json").read_bytes())["attributes"]["fcache"]
    except FileNotFoundError:
        raise SpecError(f"no cache at {root} (no zarr.json); make one with `fcache extract --cache {root} …`") from None
    except (ValueError, KeyError) as e:
        raise CorruptError(f"{root / 'zarr.json'} is no cache root: {e!r}") from e
    if attributes["format"] > FORMAT:
        raise IncompatibleError(
            f"{root} has format {attributes['format']}, this fcache reads up to {FORMAT}; update fcache"
        )
    groups = []
    for path, entry in attributes["groups"].items():
        data = _read(root / entry["file"])
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise CorruptError(f"{root / entry['file']}: the manifest of {path!r} was changed (its digest differs)")
        groups.append(from_json(Group, json.loads(data)))
    manifest = Manifest(
        features=from_json(FeatureSpec, attributes["feature_spec"]),
        targets=tuple(from_json(TargetSpec, t) for t in attributes["target_specs"]),
        groups=tuple(groups),
        random_weights=attributes["random_weights"],
        hints=attributes["hints"],
    )
    if manifest.features.key != attributes["features"] or targets_key(manifest.targets) != attributes["targets"]:
        raise CorruptError(f"{root / 'zarr.json'}: a digest does not fit its spec; the file was edited")
    return manifest


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CorruptError(f"{path} is missing, the cache's root names it") from None


def create_or_grow(root: Path, wanted: Manifest) -> Manifest:
    """Makes a cache at `root`, or grows the one there to hold what `wanted` holds beyond it; returns its manifest.

    Samples, views, groups and kinds of target may be added; what is there keeps its place. The groups of `wanted`
    have no extents yet. Raises IncompatibleError naming the first field in which the identities differ.
    """
    with explained(root):
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root):
            if not is_cache(root):
                if stray := sorted(p.name for p in root.iterdir() if p.name not in ("lock", "partial"))[:5]:
                    raise SpecError(f"{root} is not empty and no cache (it holds {', '.join(stray)}); choose another")
                grown = replace(wanted, groups=tuple(new_group(g) for g in wanted.groups))
            else:
                grown = _grown(read_manifest(root), wanted)
            _write(root, grown)
    return grown


def check_identity(found: FeatureSpec, wanted: FeatureSpec) -> None:
    """Raises IncompatibleError naming the first field in which a cache differs from what was asked."""
    if difference := first_difference(wanted, found):
        name, asked, stored = difference
        raise IncompatibleError(
            f"this cache was made with other settings: {name} is {_short(stored)} in the cache, {_short(asked)} was "
            "asked for; use the same settings, or another --cache"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _grown(old: Manifest, wanted: Manifest) -> Manifest:
    check_identity(old.features, wanted.features)
    targets = {t.kind: t for t in old.targets}
    for t in wanted.targets:
        if t.kind in targets and targets[t.kind] != t:
            name, asked, stored = first_difference(t, targets[t.kind]) or ("", None, None)
            raise IncompatibleError(
                f"targets {t.kind!r} differ from the cache's: {name} is {_short(stored)} in the cache, "
                f"{_short(asked)} was asked for; use the same annotations, or another --cache"
            )
    groups = {g.path: g for g in old.groups}
    for g in wanted.groups:
        groups[g.path] = grow_group(groups[g.path], g) if g.path in groups else new_group(g)
    added = tuple(t for t in wanted.targets if t.kind not in targets)
    return replace(old, targets=(*old.targets, *added), groups=tuple(groups.values()))


def _write(root: Path, manifest: Manifest) -> None:
    """Group manifests under new names, array metadata, then the root: a kill in between leaves the old manifest."""
    entries = {}
    for group in manifest.groups:
        data = canonical_json(group)
        sha = hashlib.sha256(data).hexdigest()
        file = f"manifest/{group.path.replace('/', '_')}-{sha[:12]}.json"
        entries[group.path] = {"file": file, "sha256": sha}
        _write_json(root, file, data)
        nodes = {group.path.rsplit("/", i)[0] for i in range(group.path.count("/") + 1)}
        for part in manifest.parts():
            for path, spec in part_arrays(group, part).items():
                metadata = array_metadata(spec, num_records=group.num_records, shard_records=group.shard_records)
                _write_json(root, f"{group.path}/{path}/zarr.json", json.dumps(metadata, indent=1).encode())
                nodes |= {f"{group.path}/{path}".rsplit("/", i)[0] for i in range(1, path.count("/") + 1)}
        for node in sorted(nodes):
            _write_json(root, f"{node}/zarr.json", json.dumps(GROUP_NODE, indent=1).encode())
    attributes = {
        "format": FORMAT,
        "features": manifest.features.key,
        "targets": targets_key(manifest.targets),
        "feature_spec": to_json(manifest.features),
        "target_specs": to_json(manifest.targets),
        "random_weights": manifest.random_weights,
        "hints": to_json(manifest.hints),
        "groups": entries,
    }
    node = {**GROUP_NODE, "attributes": {"fcache": attributes}}
    _write_json(root, "zarr.json", json.dumps(node, indent=1).encode())
    kept = {e["file"] for e in entries.values()}
    for path in (root / "manifest").iterdir():
        if f"manifest/{path.name}" not in kept:
            path.unlink()


def _write_json(root: Path, name: str, data: bytes) -> None:
    path = root / name
    if path.is_file() and path.read_bytes() == data:
        return
    make_folders(root, path.parent)
    write_durably(root, path, data)


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One process at a time creates or grows; a lock older than a minute belongs to a dead one."""
    lock = root / "lock"
    started = time.monotonic()
    while True:
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            break
        except FileExistsError:
            try:
                age = time.time() - lock.stat().st_mtime
            except FileNotFoundError:
                continue
            if age > LOCK_SECONDS or time.monotonic() - started > LOCK_SECONDS:
                lock.unlink(missing_ok=True)
            time.sleep(0.05)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


def committed_shards(root: Path, manifest: Manifest, group: str, part: str) -> set[int]:
    """Shards of a part with a valid commit. Raises IncompatibleError if features of another identity were mixed in."""
    key = manifest.part_key(part)
    return {index for index, c in read_commits(root, group, part).items() if c.key == key}
