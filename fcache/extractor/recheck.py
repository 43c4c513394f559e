"""Continuing on another machine or with other library versions: first show that it computes the same numbers."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from fcache.cache_spec import (
    CacheWriter,
    IncompatibleError,
    LevelSpec,
    canonical_json,
    find_encoding,
    first_difference,
    open_cache,
    to_json,
)
from fcache.cache_spec.commits import Commit, read_commits
from fcache.cache_spec.encodings import Encoding
from fcache.cache_spec.layout import FEATURES
from fcache.extractor.backbones import fingerprint
from fcache.extractor.decoding import Request
from fcache.extractor.forward import features_of
from fcache.extractor.prepare import Prepared
from fcache.extractor.work import Task

# Where products are added in another order, fewer codes than this round the other way.
CODES_APART = 0.01


def backbone_fingerprint(prepared: Prepared) -> dict[str, Any]:
    """What this process computes with."""
    found = fingerprint(prepared.backbone.device, precision=prepared.job.precision)
    if prepared.recipe.frames is not None:
        found["versions"]["decord"] = version("decord")
    return found


def recheck(writer: CacheWriter, prepared: Prepared, tasks: list[Task]) -> None:
    """If features are to be added under another fingerprint, recomputes one committed shard and compares.

    Raises IncompatibleError naming the field of the fingerprint that differs, if a feature lies outside the
    encoding's tolerance.
    """
    if not any(FEATURES in t.parts for t in tasks):
        return
    now = backbone_fingerprint(prepared)
    other = _other_commit(writer, prepared, now)
    if other is None:
        return
    name, current, before = first_difference(now, other.fingerprint) or ("", None, None)
    if worst := _outside(writer, prepared, other):
        raise IncompatibleError(
            f"this process computes other numbers than the one that made shard {other.shard} of {other.group!r}: "
            f"{worst}; {name} is {current!r}, it was {before!r}; continue on the same kind of machine with the same "
            "versions, or use another --cache"
        )


def _other_commit(writer: CacheWriter, prepared: Prepared, now: dict[str, Any]) -> Commit | None:
    """A committed shard of these splits that has records and another fingerprint."""
    key = canonical_json(to_json(now))
    for group in writer.manifest.groups:
        if group.split in prepared.splits:
            for commit in read_commits(writer.storage, group.path, FEATURES).values():
                if canonical_json(commit.fingerprint) != key and len(commit.quarantined) < commit.count:
                    return commit
    return None


def _outside(writer: CacheWriter, prepared: Prepared, commit: Commit) -> str:
    """Where recomputed features leave the tolerance, "" if nowhere."""
    group = writer.manifest.group(commit.group)
    encoding = find_encoding(group.encoding)
    reader, decoder = open_cache(writer.storage, allow_partial=True), prepared.decoder
    for start in range(0, commit.count, group.batch):
        positions = range(start, min(start + group.batch, commit.count))
        requests = [
            Request(group.split, prepared.positions[group.split][commit.ids[p]], commit.view, group.canvas)
            for p in positions
            if commit.ids[p] not in commit.quarantined
        ]
        records = [commit.first + p for p in positions if commit.ids[p] not in commit.quarantined]
        if not records:
            continue
        images = [torch.from_numpy(decoder[r].image) for r in requests]
        features = features_of(images, group.canvas, prepared.backbone)
        tables = reader.tables(group)
        for level in group.levels:
            fitted = tables.get(level.name, {})
            found = features[level.name].cpu().numpy()
            stored = {
                p.suffix: np.stack([reader.read(group.path, level.name + p.suffix, r) for r in records])
                for p in encoding.parts(level)
            }
            if worst := _difference(encoding, stored, found, level, fitted):
                return f"level {level.name!r} {worst}"
    return ""


def _difference(
    encoding: Encoding,
    stored: Mapping[str, np.ndarray],
    found: np.ndarray,
    level: LevelSpec,
    tables: Mapping[str, np.ndarray],
) -> str:
    """How features leave the tolerance around what is stored, "" if they do not."""
    if encoding.codes is not None:
        # As in an extraction: numpy's products may round otherwise.
        on_torch = {name: torch.tensor(table) for name, table in tables.items()}
        again = encoding.encode(torch.from_numpy(found), level, on_torch, torch)[""].numpy()
        before, now = (
            np.stack([encoding.codes(r, level) for r in rows]).astype(np.int64) for rows in (stored[""], again)
        )
        steps, share = int(abs(now - before).max()), float((now != before).mean())
        if steps <= 1 and share <= CODES_APART:
            return ""
        return f"has {share:.1%} other codes of {encoding.name}, by up to {steps}; by 1, {CODES_APART:.0%} are allowed"
    error = np.abs(encoding.decode(stored, level, tables, np) - found) - encoding.error(found, level, tables, np)
    largest = float(error.max())
    return f"differs by {largest:g} more than {encoding.name} allows" if largest > 0 else ""
