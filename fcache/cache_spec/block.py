"""Blocks: what a cache writer takes and what every source of training or test data gives."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from fcache.cache_spec.encodings import find_encoding
from fcache.cache_spec.errors import SpecError
from fcache.cache_spec.spec import FeatureSpec, LevelSpec, TargetSpec
from fcache.cache_spec.view import View

A = TypeVar("A")


@dataclass(frozen=True)
class FeaturePyramid(Generic[A]):
    """Decoded levels by name, float32 [B, *level.shape] each. Raises SpecError if their batch sizes differ."""

    levels: Mapping[str, A]

    def __post_init__(self) -> None:
        sizes = {name: getattr(x, "shape", (len(x),))[0] for name, x in self.levels.items()}  # type: ignore[arg-type]
        if len(set(sizes.values())) > 1:
            raise SpecError(f"levels of one pyramid share the batch axis, got {sizes}")


@dataclass(frozen=True)
class CodedLevel(Generic[A]):
    """One level as stored: its spec (true sizes), its encoding and one array a part, [B, …] each."""

    level: LevelSpec
    encoding: str
    parts: Mapping[str, A]
    tables: Mapping[str, A]

    def decode(self, xp: Any) -> A:
        """The features, float32 [B, *level.shape], computed with the namespace (numpy or torch) of the parts."""
        return find_encoding(self.encoding).decode(self.parts, self.level, self.tables, xp)


@dataclass(frozen=True)
class Block(Generic[A]):
    """Some records: ids, geometry, coded levels and targets, all in the same order.

    `targets` maps an array path of `targets.KINDS` ("semantic/map") to an array [B, …], or to a sequence of B arrays
    for a ragged one. Arrays may be buffers that the source fills again: they hold until the next-but-one block is
    asked for, copy what must last longer.
    """

    ids: tuple[str, ...]
    views: tuple[View, ...]
    view_indices: tuple[int, ...]
    levels: Mapping[str, CodedLevel[A]]
    targets: Mapping[str, np.ndarray | Sequence[np.ndarray]]

    def __len__(self) -> int:
        return len(self.ids)

    def pyramid(self, xp: Any) -> FeaturePyramid[A]:
        """All levels decoded."""
        return FeaturePyramid({name: coded.decode(xp) for name, coded in self.levels.items()})


@dataclass(frozen=True)
class SourceInfo:
    """What a block source gives: identity, levels (free sizes where records differ), targets and extent.

    `random_weights` is the seed text of a random backbone ("random:0"), else None. `extent` is plain data that a run
    records: samples, views and committed shards used.
    """

    split: str
    role: str
    features: FeatureSpec
    targets: tuple[TargetSpec, ...]
    levels: tuple[LevelSpec, ...]
    canvas: tuple[int, int]
    random_weights: str | None
    extent: Mapping[str, Any]

    def target(self, kind: str) -> TargetSpec:
        """The spec of one kind of target. Raises SpecError if the source has none."""
        for spec in self.targets:
            if spec.kind == kind:
                return spec
        raise SpecError(f"targets of kind {kind!r} are needed, this source has {[t.kind for t in self.targets]}")


class BlockSource(Protocol):
    """A repeatable stream of blocks: the cache reader's, or a backbone run on the fly."""

    @property
    def info(self) -> SourceInfo:
        """What the blocks hold."""
        ...

    def num_blocks(self, epoch: int) -> int:
        """Blocks in an epoch."""
        ...

    def blocks(self, epoch: int, *, start: int = 0, epochs: int | None = 1) -> Iterator[Block[Any]]:
        """The blocks of an epoch from the `start`-th on, in an order that depends on the seed and the epoch only.

        Those of `epochs` epochs follow each other, and are read ahead over their ends; of None without end.
        """
        ...


@dataclass(frozen=True)
class ImageViews(Generic[A]):
    """Some images, each in the same number of views.

    `blocks()` gives one block a view, `num_views` in all: its records are the images in the order of `ids`, its `views`
    say where each lies. A backbone may run in it, a block at a time. `targets` are those of the images' evaluation
    records, in the form of `Block.targets`; the blocks have none.
    """

    ids: tuple[str, ...]
    num_views: int
    blocks: Callable[[], Iterator[Block[A]]]
    targets: Mapping[str, np.ndarray | Sequence[np.ndarray]]

    def __len__(self) -> int:
        return len(self.ids)


class ViewSource(Protocol):
    """An evaluation split with several views an image: test-time augmentation."""

    @property
    def info(self) -> SourceInfo:
        """What the blocks hold."""
        ...

    @property
    def num_groups(self) -> int:
        """How many times `groups` gives some images."""
        ...

    def groups(self) -> Iterator[ImageViews[Any]]:
        """All images, some at a time, each image once."""
        ...
