"""Caches to torture: all numbers that one holds, its bytes, and its metadata as data that is signed again."""

import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fcache.cache_spec import StreamConfig, digest, open_cache, open_source


def numbers(root, mode, kinds, **options):
    """All that can be read: features, geometry and targets of every record."""
    found = []
    with warnings.catch_warnings():
        # A flipped exponent of a scale makes decoding overflow: numbers are wrong, which is what is looked for.
        warnings.simplefilter("ignore", RuntimeWarning)
        reader = open_cache(root, mode=mode, **options)
        for split in reader.splits:
            config = StreamConfig(2, kinds=kinds, order="sequential", all_views=True, threads=1)
            for block in open_source(reader, split, config).blocks(0):
                found += [block.ids, block.views, block.view_indices]
                found += [x.tobytes() for x in block.pyramid(np).levels.values()]
                found += [[np.asarray(v).tobytes() for v in values] for values in block.targets.values()]
            found.append(sorted(reader.quarantined(split).items()))
        found.append(reader.manifest.random_weights)
    return found


def contents(root: Path) -> dict[str, bytes]:
    """Every file by name; of commits everything but what says when, where and by whom they were written."""
    found = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name, data = path.relative_to(root).as_posix(), path.read_bytes()
        if name.startswith("commits/"):
            body = json.loads(data)
            data = json.dumps({k: v for k, v in body.items() if k not in ("run", "digest")}, sort_keys=True).encode()
        found[name] = data
    return found


@dataclass
class Metadata:
    """The JSON of a cache: the root's fields, group manifests and commits by file name."""

    root: dict[str, Any]
    manifests: dict[str, Any]
    commits: dict[str, Any]


def read_metadata(root: Path) -> Metadata:
    """What a sound cache says about itself."""
    fields = json.loads((root / "zarr.json").read_bytes())["attributes"]["fcache"]
    manifests = {e["file"]: json.loads((root / e["file"]).read_bytes()) for e in fields["groups"].values()}
    commits = {p.relative_to(root).as_posix(): json.loads(p.read_bytes()) for p in root.glob("commits/**/*.json")}
    return Metadata(fields, manifests, commits)


def write_metadata(root: Path, said: Metadata, *, names: set[str]) -> None:
    """Writes the root and the named manifests and commits with digests that fit, as only malice would."""
    for name in names & set(said.manifests):
        data = text(said.manifests[name])
        (root / name).write_bytes(data)
        for entry in said.root["groups"].values():
            if isinstance(entry, dict) and entry.get("file") == name:
                entry["sha256"] = hashlib.sha256(data).hexdigest()
    for name in names & set(said.commits):
        (root / name).write_bytes(text(signed(said.commits[name])))
    node = {"zarr_format": 3, "node_type": "group", "attributes": {"fcache": signed(said.root)}}
    (root / "zarr.json").write_bytes(text(node))


def signed(body: Any) -> Any:
    """A JSON object with the digest that fits the rest of it."""
    if not isinstance(body, dict):
        return body
    rest = {k: v for k, v in body.items() if k != "digest"}
    try:
        return {**rest, "digest": digest(rest)}
    except (ValueError, RecursionError):
        # NaN has no canonical form.
        return {**rest, "digest": "0" * 64}


def text(body: Any) -> bytes:
    """JSON as Python writes it, NaN and lone surrogates included."""
    return json.dumps(body).encode("utf-8", "surrogatepass")
