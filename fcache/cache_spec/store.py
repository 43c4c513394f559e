"""The root of a cache on disk: creating, growing and reading its manifest."""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any

from fcache.cache_spec.claims import LOCK, Claims
from fcache.cache_spec.commits import read_commits
from fcache.cache_spec.errors import CorruptError, IncompatibleError, SpecError
from fcache.cache_spec.identity import canonical_json, digest, first_difference, from_json, to_json
from fcache.cache_spec.layout import FORMAT, Group, Manifest, grow_group, new_group, part_arrays
from fcache.cache_spec.names import Names
from fcache.cache_spec.shardfile import array_metadata
from fcache.cache_spec.spec import FeatureSpec, TargetSpec, targets_key
from fcache.cache_spec.storage.protocol import Storage

ROOT = "zarr.json"
MANIFESTS = "manifest"
MANIFEST_FILE = re.compile(rf"{MANIFESTS}/[A-Za-z0-9][A-Za-z0-9._-]*")
# Fields of a group that lie in files of their own: they grow with the number of samples.
NAMED = ("ids", "digests")
GROUP_NODE: dict[str, Any] = {"zarr_format": 3, "node_type": "group", "attributes": {}}


def is_cache(storage: Storage) -> bool:
    """Whether a cache (of any state) lies there."""
    try:
        storage.size(ROOT)
    except FileNotFoundError:
        return False
    return True


def read_manifest(storage: Storage) -> Manifest:
    """The manifest of a cache.

    Raises SpecError if there is no cache, IncompatibleError for a newer format, CorruptError if a file is damaged.
    """
    data = _read_root(storage)
    while True:
        try:
            return _manifest(storage, data)
        except CorruptError:
            # A process that grows the cache removes the group manifests of before: then the root is new, too.
            now = _read_root(storage)
            if now == data:
                raise
            data = now


def _read_root(storage: Storage) -> bytes:
    try:
        return storage.read(ROOT)
    except FileNotFoundError:
        raise SpecError(
            f"no cache at {storage.url} (no {ROOT}); make one with `fcache extract --cache {storage.url} …`"
        ) from None


def _manifest(storage: Storage, data: bytes) -> Manifest:
    name = f"{storage.url}/{ROOT}"
    try:
        attributes = json.loads(data)["attributes"]["fcache"]
        if attributes["format"] > FORMAT:
            raise IncompatibleError(
                f"{storage.url} has format {attributes['format']}, this fcache reads up to {FORMAT}; update fcache"
            )
        stated = attributes.pop("digest")
        if stated != digest(attributes):
            raise CorruptError(f"{name} was changed (its digest differs); restore it from a copy")
        return _build(storage, attributes)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CorruptError(f"{name} is no root of a cache ({type(e).__name__}: {e}); restore it from a copy") from e


def _build(storage: Storage, attributes: dict[str, Any]) -> Manifest:
    groups = []
    for path, entry in attributes["groups"].items():
        file = str(entry["file"])
        if not MANIFEST_FILE.fullmatch(file):
            raise CorruptError(f"{storage.url}: group manifests lie in {MANIFESTS}/, not at {file!r}")
        try:
            data = storage.read(file)
        except FileNotFoundError:
            raise CorruptError(
                f"{storage.url}/{file} is missing, the cache's root names it; restore it from a copy"
            ) from None
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise CorruptError(f"{storage.url}/{file}: the manifest of {path!r} was changed (its digest differs)")
        body = json.loads(data)
        # In format 1 the names stand in the manifest itself.
        named = {k: _lazy_names(storage, body[k]) for k in NAMED if isinstance(body[k], dict)}
        group = from_json(Group, body | named)
        if not group.extents:
            raise CorruptError(f"{storage.url}/{file}: the group {path!r} has no extents; restore it from a copy")
        # Now: a cache that grows removes the files of before. Digests are kept by nobody who does not grow it.
        _ = group.ids.data
        group.ids.check()
        group.digests.check()
        groups.append(group)
    manifest = Manifest(
        features=from_json(FeatureSpec, attributes["feature_spec"]),
        targets=tuple(from_json(TargetSpec, t) for t in attributes["target_specs"]),
        groups=tuple(groups),
        random_weights=attributes["random_weights"],
        hints=attributes["hints"],
    )
    if manifest.features.key != attributes["features"] or targets_key(manifest.targets) != attributes["targets"]:
        raise CorruptError(f"{storage.url}/{ROOT}: a digest does not fit its spec; the file was edited")
    return manifest


def _lazy_names(storage: Storage, entry: Mapping[str, Any]) -> Names:
    """The names in a file beside a manifest, read when the first one is asked for."""
    file, size, sha, count = str(entry["file"]), entry["bytes"], entry["sha256"], entry["count"]
    if not MANIFEST_FILE.fullmatch(file):
        raise CorruptError(f"{storage.url}: names lie in {MANIFESTS}/, not at {file!r}")
    if type(size) is not int or type(count) is not int or not 0 <= count <= size + 1 <= 2**40:
        raise CorruptError(f"{storage.url}: {file} cannot hold {count} names in {size} bytes")
    where = f"{storage.url}/{file}"

    def load() -> bytes:
        try:
            if (found := storage.size(file)) != size:
                raise CorruptError(f"{where} has {found} bytes, the manifest says {size}; restore it from a copy")
            data = storage.read(file)
        except FileNotFoundError:
            raise CorruptError(f"{where} is missing, the manifest names it; restore it from a copy") from None
        if hashlib.sha256(data).hexdigest() != sha:
            raise CorruptError(f"{where} was changed (its digest differs); restore it from a copy")
        return data

    return Names(count, load)


def create_or_grow(storage: Storage, wanted: Manifest) -> Manifest:
    """Makes a cache, or grows the one there to hold what `wanted` holds beyond it; returns its manifest.

    Samples, views, groups and kinds of target may be added; what is there keeps its place. The groups of `wanted`
    have no extents yet. Raises IncompatibleError naming the first field in which the identities differ.
    """
    if not is_cache(storage):
        _check_empty(storage)
    claims = Claims(storage)
    with claims.lock():
        grown = preview(storage, wanted)
        write_manifest(storage, grown, claims)
    return grown


def _check_empty(storage: Storage) -> None:
    if name := foreign_file(storage, (LOCK, "partial", ROOT)):
        raise SpecError(f"{storage.url} is not empty and no cache (it holds {name}); choose another")


def foreign_file(storage: Storage, own: Collection[str]) -> str:
    """A file that no creation of a cache has written, "" if there is none; `own` are what that writes at the top."""
    # Manifests are the first thing in a new cache: with one, somebody creates it now, or was interrupted.
    if storage.names(MANIFESTS):
        return ""
    for name, _ in storage.walk():
        # Asked again: since then another process may have begun.
        if name.split("/")[0] not in own:
            return "" if storage.names(MANIFESTS) else name
    return ""


def preview(storage: Storage, wanted: Manifest) -> Manifest:
    """The manifest that `create_or_grow` would give; writes nothing. Raises as that."""
    if is_cache(storage):
        return _grown(read_manifest(storage), wanted)
    return replace(wanted, groups=tuple(new_group(g) for g in wanted.groups))


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


def write_manifest(storage: Storage, manifest: Manifest, claims: Claims) -> None:
    """Group manifests under new names, array metadata, then the root: a kill in between leaves the old manifest."""
    entries: dict[str, dict[str, str]] = {}
    kept: set[str] = set()
    for group in manifest.groups:
        claims.beat()
        body = {f.name: getattr(group, f.name) for f in fields(group)}
        for name in NAMED:
            names: Names = body[name]
            found = _write_named(storage, group.path, names.data, name)
            kept.add(found["file"])
            body[name] = {**found, "bytes": len(names.data), "count": len(names)}
        entries[group.path] = _write_named(storage, group.path, canonical_json(body), "json")
        kept.add(entries[group.path]["file"])
        nodes = {f"{path}/{ROOT}": node for path, node in zarr_nodes(group, manifest.parts()).items()}
        # Together: a disk or an object store answers each after milliseconds, but many at once.
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda item: _write_json(storage, item[0], _indented(item[1])), nodes.items()))
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
    node = {**GROUP_NODE, "attributes": {"fcache": {**attributes, "digest": digest(attributes)}}}
    _write_json(storage, ROOT, _indented(node))
    for name in storage.names(MANIFESTS):
        if f"{MANIFESTS}/{name}" not in kept:
            storage.remove(f"{MANIFESTS}/{name}")


def _write_named(storage: Storage, group: str, data: bytes, suffix: str) -> dict[str, str]:
    """Writes a file of a group's manifest under a name of its content."""
    sha = hashlib.sha256(data).hexdigest()
    file = f"{MANIFESTS}/{group.replace('/', '_')}-{sha[:12]}.{suffix}"
    _write_json(storage, file, data)
    return {"file": file, "sha256": sha}


def zarr_nodes(group: Group, parts: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The content of every `zarr.json` of a group, by the path of its folder below the cache."""
    nodes = {group.path.rsplit("/", i)[0]: GROUP_NODE for i in range(group.path.count("/") + 1)}
    for part in parts:
        for path, spec in part_arrays(group, part).items():
            full = f"{group.path}/{path}"
            nodes |= {full.rsplit("/", i)[0]: GROUP_NODE for i in range(1, path.count("/") + 1)}
            nodes[full] = array_metadata(spec, num_records=group.num_records, shard_records=group.shard_records)
    return nodes


def _indented(node: Mapping[str, Any]) -> bytes:
    return json.dumps(node, indent=1).encode()


def _write_json(storage: Storage, name: str, data: bytes) -> None:
    try:
        if storage.read(name) == data:
            return
    except FileNotFoundError:
        pass
    storage.write(name, data)


def committed_shards(storage: Storage, manifest: Manifest, group: str, part: str) -> set[int]:
    """Shards of a part with a valid commit of the manifest's identity. Raises CorruptError if a commit is damaged."""
    key = manifest.part_key(part)
    return {index for index, c in read_commits(storage, group, part).items() if c.key == key}
