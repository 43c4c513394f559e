"""Live sources: the backbone run on the fly, in place of a cache."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fcache.cache_spec import Block, CodedLevel, DataError, Group, SourceInfo
from fcache.cache_spec.layout import new_group
from fcache.cache_spec.streams.order import epoch_batches, span
from fcache.extractor.backbones import Backbone
from fcache.extractor.decoding import Decoded, Request
from fcache.extractor.forward import features_of
from fcache.extractor.job import Job
from fcache.extractor.prepare import Prepared, prepare


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
        return live_info(self.prepared, self.split)

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
        return Block(
            ids=tuple(split.samples[d.request.sample].id for d in decoded),
            views=tuple(d.view for d in decoded if d.view is not None),
            view_indices=tuple(d.request.view for d in decoded),
            levels=coded(features, self.prepared.backbone, group.canvas),
            targets=stacked_targets(self.prepared, group, [d.targets or {} for d in decoded]),
        )


def live_info(prepared: Prepared, split: str) -> SourceInfo:
    """What live blocks of a split hold."""
    wanted, groups = prepared.wanted, prepared.wanted.split(split)
    first = groups[0]
    return SourceInfo(
        split=split,
        role=first.role,
        features=wanted.features,
        targets=wanted.targets,
        levels=first.levels if len(groups) == 1 else tuple(level.free() for level in first.levels),
        canvas=first.canvas,
        random_weights=wanted.random_weights,
        extent={"split": split, "samples": sum(len(g.ids) for g in groups), "views": first.views, "live": True},
    )


def stacked_targets(prepared: Prepared, group: Group, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The targets of single records of a group, by array path, as `Block.targets` has them."""
    targets: dict[str, Any] = {}
    for spec in prepared.wanted.targets:
        for a in group.target_arrays(spec.kind):
            if not a.path.endswith(".count"):
                values = [record[a.path] for record in records]
                targets[a.path] = values if a.ragged else np.stack(values)
    return targets


def _tensor(image: np.ndarray | None) -> Tensor:
    assert image is not None, "a record without failure has an image"
    return torch.from_numpy(image)


def open_live(
    job: Job, split: str, *, batch_size: int, order: str = "shuffled", seed: int = 0, drop_last: bool = False
) -> LiveSource:
    """A live block source over a split of a job (its cache is not touched). Raises as `prepare`."""
    return LiveSource(prepare(job), split, batch_size, order, seed, drop_last)
