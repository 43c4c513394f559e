"""Live sources: the backbone run on the fly, for parity, test-time views and photos."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fcache.cache_spec import Block, CodedLevel, DataError, Group, SourceInfo, View
from fcache.cache_spec.layout import new_group
from fcache.cache_spec.streams.order import epoch_batches, span
from fcache.extractor.backbones import Backbone
from fcache.extractor.datasets import RawSample
from fcache.extractor.decoding import Decoded, Request
from fcache.extractor.forward import features_of
from fcache.extractor.images import load_image
from fcache.extractor.job import Job
from fcache.extractor.prepare import Prepared, find_recipe, load_job_backbone, prepare
from fcache.extractor.views import ViewRecipe, canvas, cut_view


def coded(features: dict[str, Tensor], backbone: Backbone, size: tuple[int, int]) -> dict[str, CodedLevel[Tensor]]:
    """Live features as levels of a block."""
    levels = {level.name: level for level in backbone.levels_at(size)}
    return {name: CodedLevel(levels[name], "fp32", {"": x}, {}) for name, x in features.items()}


@dataclass(frozen=True)
class LiveSource:
    """A `BlockSource` that decodes, cuts views and runs the backbone in every epoch.

    Records, views and order are those of a cache of the same job: epoch e takes view e mod K.
    """

    prepared: Prepared
    split: str
    batch_size: int
    order: str
    seed: int
    drop_last: bool
    groups: tuple[Group, ...] = field(init=False)

    def __post_init__(self) -> None:
        groups = tuple(new_group(g) for g in self.prepared.wanted.split(self.split))
        object.__setattr__(self, "groups", groups)

    @property
    def info(self) -> SourceInfo:
        """Identity, levels, targets and extent."""
        wanted, first = self.prepared.wanted, self.groups[0]
        levels = first.levels if len(self.groups) == 1 else tuple(level.free() for level in first.levels)
        extent = {"split": self.split, "samples": sum(len(g.ids) for g in self.groups), "views": first.views}
        return SourceInfo(
            split=self.split,
            role=first.role,
            features=wanted.features,
            targets=wanted.targets,
            levels=levels,
            canvas=first.canvas,
            random_weights=wanted.random_weights,
            extent={**extent, "live": True},
        )

    def num_blocks(self, epoch: int) -> int:
        """Blocks in an epoch."""
        return len(self._batches(epoch))

    def blocks(self, epoch: int, *, start: int = 0, epochs: int | None = 1) -> Iterator[Block[Tensor]]:
        """The blocks of epochs. Raises DataError for a sample that cannot be decoded."""
        decoder = self.prepared.decoder
        with ThreadPoolExecutor(2, "fcache-decode") as pool:
            for number in span(epoch, epochs):
                view = number % self.groups[0].views
                for index, chosen in self._batches(number)[start if number == epoch else 0 :]:
                    group = self.groups[index]
                    positions = [self.prepared.positions[self.split][group.ids[i]] for i in chosen]
                    requests = [Request(self.split, p, view, group.canvas) for p in positions]
                    yield self._block(group, list(pool.map(decoder.__getitem__, requests)))

    def _batches(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        return epoch_batches(
            [len(g.ids) for g in self.groups],
            batch_size=self.batch_size,
            shuffle=self.order == "shuffled",
            drop_last=self.drop_last,
            key=(self.seed, epoch),
            world=(0, 1),
        )

    def _block(self, group: Group, decoded: Sequence[Decoded]) -> Block[Tensor]:
        split = self.prepared.splits[self.split]
        for d in decoded:
            if d.failure is not None:
                raise DataError(f"sample {split.samples[d.request.sample].id!r}: {d.failure}")
        features = features_of([_tensor(d.image) for d in decoded], group.canvas, self.prepared.backbone)
        targets: dict[str, Any] = {}
        for spec in self.prepared.wanted.targets:
            for a in group.target_arrays(spec.kind):
                if not a.path.endswith(".count"):
                    values = [(d.targets or {})[a.path] for d in decoded]
                    targets[a.path] = values if a.ragged else np.stack(values)
        return Block(
            ids=tuple(split.samples[d.request.sample].id for d in decoded),
            views=tuple(d.view for d in decoded if d.view is not None),
            view_indices=tuple(d.request.view for d in decoded),
            levels=coded(features, self.prepared.backbone, group.canvas),
            targets=targets,
        )


def _tensor(image: np.ndarray | None) -> Tensor:
    assert image is not None, "a record without failure has an image"
    return torch.from_numpy(image)


def open_live(
    job: Job, split: str, *, batch_size: int, order: str = "shuffled", seed: int = 0, drop_last: bool = False
) -> LiveSource:
    """A live block source over a split of a job (its cache is not touched). Raises as `prepare`."""
    return LiveSource(prepare(job), split, batch_size, order, seed, drop_last)


@dataclass(frozen=True)
class Photo:
    """A photo and its block of one record: uint8 RGB `image` [H, W, 3] and the features of its test view."""

    path: Path
    image: np.ndarray
    block: Block[Tensor]


@dataclass(frozen=True)
class PhotoReader:
    """Turns photos into blocks as the evaluation split of a job does; loads the backbone once."""

    recipe: ViewRecipe
    backbone: Backbone

    def __call__(self, path: Path) -> Photo:
        """One photo, orientation applied. Raises DataError or OSError if it cannot be read."""
        image = load_image(path, apply_orientation=True)
        size = (image.shape[0], image.shape[1])
        cut = self.recipe.evaluation
        shape = canvas(cut, size, multiple=self.backbone.size_multiple)
        viewed = cut_view(
            cut, seed=0, sample_id=path.name, view=0, raw=RawSample(image, {}), canvas=shape, role="evaluation"
        )
        levels = coded(features_of([viewed.image], shape, self.backbone), self.backbone, shape)
        views: tuple[View, ...] = (viewed.view,)
        return Photo(path, image, Block((str(path),), views, (0,), levels, {}))


def open_photos(job: Job) -> PhotoReader:
    """A reader of photos with the backbone and test view of a job. Raises SpecError or DataError."""
    recipe = find_recipe(job)
    return PhotoReader(recipe, load_job_backbone(job, recipe))
