"""Fitting the tables of an encoding to a sample of features, once, before the first shard."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from fcache.cache_spec import CacheWriter, DataError, Group, find_encoding
from fcache.cache_spec.streams.order import subset_mask
from fcache.cache_spec.tables import FittedTables, fitted_groups, fitted_levels, read_tables, write_tables
from fcache.extractor.decoding import Request
from fcache.extractor.forward import features_of
from fcache.extractor.prepare import Prepared

SAMPLES = 64


def fit_tables(prepared: Prepared, writer: CacheWriter) -> FittedTables:
    """The tables of the cache: the committed ones, else fitted now under the cache's lock; empty if none are needed.

    They are fitted to view 0 of at most 64 samples of the training groups that need them: a fixed choice of the ids
    that the cache has at that time. Samples that cannot be decoded are left out. Keep the claims of `writer` alive
    meanwhile. Raises DataError if no sample can be used or one holds features that are not finite.
    """
    manifest = writer.manifest
    if not fitted_groups(manifest):
        return FittedTables()
    if found := read_tables(writer.storage, manifest):
        return found
    with writer.claims.lock():
        # Another process may have been faster.
        if found := read_tables(writer.storage, manifest):
            return found
        used, tables = _fitted(prepared, writer)
        return write_tables(writer.storage, manifest, tables, samples=used)


def chosen_samples(groups: tuple[Group, ...], *, count: int = SAMPLES) -> list[tuple[Group, str]]:
    """The samples that tables are fitted to, in the order of their groups: at most `count`, chosen by their names."""
    every = [(group, i) for group in groups for i in group.ids]
    if len(every) <= count:
        return every
    kept = subset_mask([f"{group.path}/{i}" for group, i in every], count / len(every))
    return [every[i] for i in np.flatnonzero(kept).tolist()]


def _fitted(prepared: Prepared, writer: CacheWriter) -> tuple[tuple[str, ...], Mapping[str, Mapping[str, np.ndarray]]]:
    levels = fitted_levels(writer.manifest)
    groups = fitted_groups(writer.manifest)
    fit = find_encoding(groups[0].encoding).fit
    assert fit is not None, "a fitted group has a fitted encoding"
    sums = {name: fit.start(level) for name, level in levels.items()}
    used: list[str] = []
    for group, ids, features in _batches(prepared, groups):
        used += [f"{group.path}/{i}" for i in ids]
        for level in group.levels:
            x = features[level.name]
            if not np.isfinite(x).all():
                raise DataError(
                    f"samples {', '.join(map(repr, ids))}: level {level.name!r} holds NaN or infinite features; check "
                    "the weights, or compute with --precision fp32"
                )
            sums[level.name] = fit.add(sums[level.name], x, level)
    if not used:
        raise DataError(
            f"none of the samples that {groups[0].encoding} is fitted to can be decoded; check the data, or use "
            "--encoding int8"
        )
    return tuple(used), {name: fit.tables(sums[name], level) for name, level in levels.items()}


def _batches(prepared: Prepared, groups: tuple[Group, ...]) -> Iterator[tuple[Group, list[str], dict[str, np.ndarray]]]:
    """The features of the chosen samples, some at a time, on the host."""
    decoder = prepared.decoder
    # A split that this job does not name may be there, too: its samples cannot be decoded here.
    chosen = chosen_samples(tuple(g for g in groups if g.split in prepared.splits))
    for group in groups:
        ids = [i for g, i in chosen if g is group]
        for start in range(0, len(ids), group.batch):
            some = ids[start : start + group.batch]
            positions = prepared.positions[group.split]
            decoded = [decoder[Request(group.split, positions[i], 0, group.canvas)] for i in some]
            good = [(i, d.image) for i, d in zip(some, decoded, strict=True) if d.image is not None]
            if good:
                images = [torch.from_numpy(image) for _, image in good]
                features = features_of(images, group.canvas, prepared.backbone)
                yield group, [i for i, _ in good], {name: x.float().cpu().numpy() for name, x in features.items()}
