"""An in-memory BlockSource: for tests, and for features that come from somewhere else than a cache."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fcache.cache_spec.block import Block, CodedLevel, SourceInfo
from fcache.cache_spec.encodings import find_encoding
from fcache.cache_spec.errors import SpecError
from fcache.cache_spec.spec import BackboneSpec, FeatureSpec, LevelSpec, SplitRecipe, TargetSpec
from fcache.cache_spec.streams.order import span
from fcache.cache_spec.view import View

TargetArrays = Mapping[str, "np.ndarray | Sequence[np.ndarray]"]


def plain_view(canvas: tuple[int, int], *, valid: tuple[int, int] | None = None, image_size: tuple[int, int]) -> View:
    """The view of a whole image resized to `valid` (height, width) at the top left of `canvas`."""
    valid = canvas if valid is None else valid
    scale_y, scale_x = valid[0] / image_size[0], valid[1] / image_size[1]
    return View((scale_x, 0.0, 0.0, 0.0, scale_y, 0.0), canvas=canvas, valid=valid, image_size=image_size)


@dataclass(frozen=True)
class MemorySource:
    """Records held in memory, given as blocks in an order that depends on the seed and the epoch only.

    `features` maps a level's name to float32 [N, *level.shape]; they are encoded block by block with `encoding`.
    `targets` maps an array path to an array [N, …], or to a sequence of N arrays for a ragged one.
    """

    info: SourceInfo
    ids: tuple[str, ...]
    views: tuple[View, ...]
    features: Mapping[str, np.ndarray]
    targets: TargetArrays
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False
    encoding: str = "fp32"

    def __post_init__(self) -> None:
        lengths = {"views": len(self.views)} | {k: len(v) for k, v in {**self.features, **self.targets}.items()}
        if wrong := {k: n for k, n in lengths.items() if n != len(self.ids)}:
            raise SpecError(f"{len(self.ids)} ids were given, but {wrong}")
        if self.batch_size < 1:
            raise SpecError(f"batch_size must be positive, got {self.batch_size}")

    def num_blocks(self, epoch: int) -> int:
        """Blocks in an epoch: the same in all."""
        full, rest = divmod(len(self.ids), self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def blocks(self, epoch: int, *, start: int = 0, epochs: int | None = 1) -> Iterator[Block[np.ndarray]]:
        """The blocks of epochs, of the first from the `start`-th on."""
        for number in span(epoch, epochs):
            order = np.arange(len(self.ids))
            if self.shuffle:
                order = np.random.default_rng([self.seed, number]).permutation(order)
            for b in range(start if number == epoch else 0, self.num_blocks(number)):
                yield self._block(order[b * self.batch_size : (b + 1) * self.batch_size])

    def _block(self, rows: np.ndarray) -> Block[np.ndarray]:
        return Block(
            ids=tuple(self.ids[i] for i in rows),
            views=tuple(self.views[i] for i in rows),
            view_indices=(0,) * len(rows),
            levels={level.name: self._coded(level, rows) for level in self.info.levels},
            targets={
                path: values[rows] if isinstance(values, np.ndarray) else [values[i] for i in rows]
                for path, values in self.targets.items()
            },
        )

    def _coded(self, level: LevelSpec, rows: np.ndarray) -> CodedLevel[np.ndarray]:
        parts = find_encoding(self.encoding).encode(self.features[level.name][rows], level, {}, np)
        return CodedLevel(level=level, encoding=self.encoding, parts=parts, tables={})


def memory_source(
    features: Mapping[str, np.ndarray],
    targets: TargetArrays,
    *,
    strides: Mapping[str, int],
    specs: tuple[TargetSpec, ...],
    batch_size: int,
    role: str = "training",
    views: tuple[View, ...] | None = None,
    seed: int = 0,
    shuffle: bool | None = None,
    drop_last: bool = False,
    encoding: str = "fp32",
    random_weights: str | None = None,
) -> MemorySource:
    """A `MemorySource` over float32 features by level name: [N, C, H, W] or [N, C]; [N, T, C, H, W] or [N, T, C].

    The canvas is the first level's size times its stride, and views are plain unless given. Training sources are
    shuffled unless told otherwise, evaluation sources are not.
    """
    dims = {2: "C", 3: "T C", 4: "C H W", 5: "T C H W"}
    levels = tuple(LevelSpec(name, dims[x.ndim], tuple(x.shape[1:]), strides[name]) for name, x in features.items())
    first, count = levels[0], len(next(iter(features.values())))
    canvas = (224, 224)
    if "H" in first.dims:
        canvas = (first.shape[-2] * first.stride, first.shape[-1] * first.stride)
    backbone = BackboneSpec(
        name="memory",
        arguments={},
        weights_sha256="0" * 64,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        precision="fp32",
        levels=tuple(level.free() for level in levels),
    )
    recipe = SplitRecipe(views={"kind": "plain"}, encoding=encoding)
    info = SourceInfo(
        split="train" if role == "training" else "val",
        role=role,
        features=FeatureSpec(backbone=backbone, training=recipe, evaluation=recipe, seed=0),
        targets=specs,
        levels=levels,
        canvas=canvas,
        random_weights=random_weights,
        extent={"samples": count, "views": 1},
    )
    return MemorySource(
        info=info,
        ids=tuple(f"sample-{i:04d}" for i in range(count)),
        views=views if views is not None else (plain_view(canvas, image_size=canvas),) * count,
        features=features,
        targets=targets,
        batch_size=batch_size,
        seed=seed,
        shuffle=role == "training" if shuffle is None else shuffle,
        drop_last=drop_last,
        encoding=encoding,
    )
