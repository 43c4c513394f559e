"""Repair: damaged shards, and those with quarantined samples, are made pending and extracted anew."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from fcache.cache_spec import CorruptError, DataError, Fault, Group, Manifest, make_pending
from fcache.cache_spec.claims import Claims
from fcache.cache_spec.commits import commit_path, find_commit
from fcache.cache_spec.layout import FEATURES, grow_group
from fcache.cache_spec.names import Names
from fcache.cache_spec.storage.protocol import Storage, open_storage
from fcache.cache_spec.store import check_identity, preview, read_manifest, write_manifest
from fcache.cache_spec.tables import read_tables
from fcache.extractor.engine import ExtractResult, extract
from fcache.extractor.events import Event
from fcache.extractor.job import Job
from fcache.extractor.prepare import Prepared, prepare
from fcache.extractor.views import canvas


def find_quarantined(storage: Storage, manifest: Manifest) -> list[Fault]:
    """The parts of shards that lack samples which could not be used; damaged commits are passed over."""
    found: list[Fault] = []
    for group in manifest.groups:
        for part in manifest.parts():
            for shard in group.shards():
                left_out = _quarantined(storage, group.path, part, shard.index)
                if left_out:
                    what = f"without {len(left_out)} samples ({', '.join(sorted(left_out)[:5])})"
                    found.append(Fault(group.path, part, shard.index, "quarantined", what))
    return found


def repair(
    job: Job,
    faults: Sequence[Fault],
    *,
    report: Callable[[Event], None],
    should_stop: Callable[[], bool] = lambda: False,
) -> ExtractResult:
    """Makes the shards of `faults` pending and extracts what the cache lacks; `job` must not grow it.

    Model, weights and data are checked before anything is changed. The file of a quarantined sample may have changed;
    that of any other may not. Raises as `extract`, DataError if samples of these shards are gone, CorruptError if
    fitted tables are damaged.
    """
    assert not job.grow, "a repair adds nothing"
    storage = open_storage(job.cache)
    prepared = prepare(job)
    if any(f.kind == "quarantined" for f in faults):
        _renew(storage, prepared)
    manifest = preview(storage, prepared.wanted)
    _check_samples(manifest, prepared, faults)
    read_tables(storage, manifest)
    make_pending(storage, [replace(f, kind="corrupt") for f in faults])
    return extract(job, report=report, should_stop=should_stop)


def _quarantined(storage: Storage, group: str, part: str, shard: int) -> set[str]:
    try:
        commit = find_commit(storage, commit_path(group, part, shard))
    except CorruptError:
        return set()
    return set(commit.quarantined) if commit is not None else set()


def _check_samples(manifest: Manifest, prepared: Prepared, faults: Sequence[Fault]) -> None:
    for fault in faults:
        group = manifest.group(fault.group)
        shard = next(s for s in group.shards() if s.index == fault.shard)
        for name in group.ids[shard.sample : shard.sample + shard.count]:
            if name not in prepared.positions[group.split]:
                raise DataError(
                    f"sample {name!r} of shard {shard.index} of {group.path!r} is not in {prepared.job.root}; restore "
                    "the data, or name their folder with --data-root"
                )


def _renew(storage: Storage, prepared: Prepared) -> None:
    """Gives samples that have no record the digest of their file as it is now: the file may have been mended."""
    claims = Claims(storage)
    with claims.lock():
        stored = read_manifest(storage)
        wanted = {g.path: g for g in prepared.wanted.groups}
        groups = tuple(_renewed(storage, g, prepared) if g.path in wanted else g for g in stored.groups)
        check_identity(stored.features, prepared.wanted.features)
        for group in groups:
            if group.path in wanted:
                # All other samples are the same.
                grow_group(group, wanted[group.path])
        if groups != stored.groups:
            write_manifest(storage, replace(stored, groups=groups), claims)


def _renewed(storage: Storage, group: Group, prepared: Prepared) -> Group:
    split = prepared.splits[group.split]
    left_out, used = set[str](), set[str]()
    for shard in group.shards():
        bad = _quarantined(storage, group.path, FEATURES, shard.index)
        left_out |= bad
        used |= set(group.ids[shard.sample : shard.sample + shard.count]) - bad
    digests = list(group.digests)
    for place, name in enumerate(group.ids):
        if name not in left_out - used or name not in prepared.positions[group.split]:
            continue
        sample = split.samples[prepared.positions[group.split][name]]
        cut = prepared.recipe.cut(split.role)
        try:
            size = group.canvas
            if split.role != "training":
                size = canvas(cut, split.image_size(split.root, sample), multiple=prepared.backbone.size_multiple)
        except (DataError, OSError):
            continue
        # A sample of another size belongs to another group: an extraction adds it there.
        if size == group.canvas:
            digests[place] = sample.digest
    return replace(group, digests=Names.of(digests))
