"""Turning a job into what is needed to run it: datasets, backbone, view recipe and the manifest that is wanted."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fcache.cache_spec import DataError, FeatureSpec, Group, Manifest, SpecError, SplitRecipe, subset_ids, to_json
from fcache.cache_spec.layout import choose_shard_records, record_bytes
from fcache.cache_spec.names import Names
from fcache.cache_spec.storage.protocol import open_storage
from fcache.cache_spec.store import read_manifest
from fcache.extractor.backbones import LAST, Backbone, load_backbone, of_clips
from fcache.extractor.datasets import DatasetSplit, Sample, open_split
from fcache.extractor.decoding import Decoder
from fcache.extractor.job import Job
from fcache.extractor.views import (
    AnyCut,
    ViewRecipe,
    canvas,
    default_recipe,
    find_view_recipe,
    instance_limits,
    truth_bytes_limit,
    with_input_size,
)

# An evaluation sample whose header cannot be read has no size; it waits, quarantined, in this image's bucket.
UNKNOWN_SIZE = (256, 256)
MIN_TRUTH_BYTES = 1 << 20
MIN_INSTANCE_LIMITS = {"instances": 128, "instances_rle_bytes": 1 << 17, "instances_truth_bytes": 1 << 18}


@dataclass(frozen=True)
class Prepared:
    """A job with its parts opened. `splits` are whole; `wanted` holds the groups of the samples that were asked for."""

    job: Job
    recipe: ViewRecipe
    splits: Mapping[str, DatasetSplit]
    backbone: Backbone
    wanted: Manifest

    @property
    def decoder(self) -> Decoder:
        """Makes the records of these splits."""
        cuts = {name: self.recipe.cut(split.role) for name, split in self.splits.items()}
        return Decoder(self.splits, cuts, self.job.seed)

    @cached_property
    def positions(self) -> Mapping[str, Mapping[str, int]]:
        """For every split, the position of each sample by its id."""
        return {name: {s.id: i for i, s in enumerate(split.samples)} for name, split in self.splits.items()}


def find_recipe(job: Job) -> ViewRecipe:
    """The view recipe of a job: its own or the dataset's usual one, at the job's input size."""
    recipe = find_view_recipe(job.view_recipe) if job.view_recipe else default_recipe(job.dataset)
    return recipe if job.input_size is None else with_input_size(recipe, job.input_size)


def load_job_backbone(job: Job, recipe: ViewRecipe) -> Backbone:
    """The backbone of a job, on its device. Of clips it gives the last maps, unless others are named."""
    backbone = load_backbone(
        job.model,
        weights=job.weights,
        input_size=canvas(recipe.training, UNKNOWN_SIZE),
        precision=job.precision,
        levels=job.levels or (None if recipe.frames is None else (LAST,)),
        window=job.window,
        device=job.device,
    )
    return backbone if recipe.frames is None else of_clips(backbone, recipe.frames)


def prepare(job: Job) -> Prepared:
    """Opens everything a job names. Raises SpecError or DataError before any work if something does not fit."""
    recipe = find_recipe(job)
    splits = {name: open_split(job.dataset, job.root, name) for name in job.splits}
    _check_kind(job, recipe, splits)
    backbone = load_job_backbone(job, recipe)
    stored = None if job.grow else read_manifest(open_storage(job.cache))
    groups = [
        g
        for split in splits.values()
        for g in (_groups(job, recipe, split, backbone) if stored is None else _stored_groups(stored, split))
    ]
    targets = {t.kind: t for split in splits.values() for t in split.targets}
    for split in splits.values():
        if {t.kind: t for t in split.targets} != targets:
            raise DataError(f"split {split.name!r} of {job.root} has other classes or targets than {job.splits[0]!r}")
    features = FeatureSpec(
        backbone=backbone.spec,
        training=SplitRecipe(to_json(recipe.training), job.encoding),
        evaluation=SplitRecipe(to_json(recipe.evaluation), job.evaluation_encoding),
        seed=job.seed,
    )
    hints = {
        "model": job.model,
        "weights": job.weights,
        "dataset": job.dataset,
        "root": str(job.root.resolve()),
        "view_recipe": recipe.name,
        "input_size": list(job.input_size) if job.input_size else None,
        "window": job.window,
        "levels": list(job.levels) if job.levels else None,
    }
    kinds = set(targets) if stored is None else {t.kind for t in stored.targets}
    wanted_targets = tuple(t for t in targets.values() if t.kind in kinds)
    wanted = Manifest(features, wanted_targets, tuple(groups), backbone.random_weights, hints)
    return Prepared(job, recipe, splits, backbone, wanted)


def _check_kind(job: Job, recipe: ViewRecipe, splits: Mapping[str, DatasetSplit]) -> None:
    """Raises SpecError if a view recipe of images meets videos, or one of clips meets images."""
    if any((split.load_frames is None) != (recipe.frames is None) for split in splits.values()):
        kinds = ("images", "videos") if recipe.frames is None else ("clips of videos", "images")
        raise SpecError(
            f"view recipe {recipe.name!r} is one of {kinds[0]}, dataset {job.dataset!r} holds {kinds[1]}; "
            f"use --view-recipe {default_recipe(job.dataset).name}"
        )


def _groups(job: Job, recipe: ViewRecipe, split: DatasetSplit, backbone: Backbone) -> list[Group]:
    samples = split.samples
    if job.subset is not None:
        kept = set(subset_ids([s.id for s in samples], job.subset))
        samples = tuple(s for s in samples if s.id in kept)
    samples = samples[: job.limit]
    training = split.role == "training"
    cut = recipe.cut(split.role)
    # A training canvas is the recipe's, and so are all of videos; only evaluation needs the size of every image.
    sized = not training and recipe.frames is None
    sizes = image_sizes(split, samples) if sized else [UNKNOWN_SIZE] * len(samples)
    members: dict[tuple[int, int], list[int]] = {}
    for i, size in enumerate(sizes):
        members.setdefault(canvas(cut, size, multiple=backbone.size_multiple), []).append(i)
    groups = []
    for size, indices in sorted(members.items()):
        levels = backbone.levels_at(size)
        encoding = job.encoding if training else job.evaluation_encoding
        records = job.shard_records or choose_shard_records(len(indices), record_bytes(levels, encoding))
        batch = job.batch_size or _images_together(job, recipe)
        groups.append(
            Group(
                path=split.name if training else f"{split.name}/{size[0]}x{size[1]}",
                split=split.name,
                role=split.role,
                canvas=size,
                levels=levels,
                encoding=encoding,
                shard_records=records,
                batch=min(batch, records),
                ids=Names.of(samples[i].id for i in indices),
                digests=Names.of(samples[i].digest for i in indices),
                views=(job.views or recipe.views) if training else 1,
                extents=(),
                compression=job.compression,
                limits=_limits(split, cut, size, [samples[i] for i in indices], [sizes[i] for i in indices]),
            )
        )
    return groups


def _images_together(job: Job, recipe: ViewRecipe) -> int:
    """Samples in one forward pass of a new group."""
    if recipe.frames is None:
        return 16 if job.device.startswith("cuda") else 4
    return max(1, (128 if job.device.startswith("cuda") else 4) // recipe.frames)


def _stored_groups(stored: Manifest, split: DatasetSplit) -> list[Group]:
    """The groups of a split as a cache has them, with the digests that the data have now: they are compared."""
    digests = {s.id: s.digest for s in split.samples}
    groups: list[Group] = []
    for group in stored.groups:
        if group.split == split.name and (ids := [i for i in group.ids if i in digests]):
            found = Names.of(digests[i] for i in ids)
            groups.append(replace(group, ids=Names.of(ids), digests=found, extents=()))
    return groups


def image_sizes(split: DatasetSplit, samples: tuple[Any, ...]) -> list[tuple[int, int]]:
    """The (height, width) of samples from their headers, `UNKNOWN_SIZE` for one that is no image.

    Raises DataError if a file cannot be read.
    """

    def size(sample: Any) -> tuple[int, int]:
        try:
            return split.image_size(split.root, sample)
        except DataError:
            return UNKNOWN_SIZE
        except OSError as e:
            raise DataError(f"{sample.path}: {e}; check the disk and permissions of {split.root}") from e

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(size, samples))


def _limits(
    split: DatasetSplit, cut: AnyCut, size: tuple[int, int], samples: list[Sample], sizes: list[tuple[int, int]]
) -> dict[str, int]:
    """Maxima of ragged targets. Padding costs almost nothing on disk, so room is left for samples that come later."""
    limits: dict[str, int] = {}
    if split.role == "evaluation" and any(t.kind == "semantic" for t in split.targets):
        largest = max(truth_bytes_limit(size) for size in sizes)
        limits["semantic_truth_bytes"] = max(MIN_TRUTH_BYTES, 1 << (2 * largest - 1).bit_length())
    if split.instances is not None:
        found = instance_limits([split.instances(s) for s in samples], cut, size, split.role)
        # Bounds of bytes are several times what images take, so that they leave room as they are.
        found["instances"] *= 2
        limits |= {name: max(MIN_INSTANCE_LIMITS[name], 1 << (n - 1).bit_length()) for name, n in found.items()}
    return limits
