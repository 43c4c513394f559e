"""A backbone of images on clips: it sees every frame alone."""

import functools
from dataclasses import replace

from torch import Tensor

from fcache.cache_spec import LevelSpec
from fcache.extractor.backbones.architecture import Size
from fcache.extractor.backbones.backbone import Backbone


def of_clips(backbone: Backbone, frames: int) -> Backbone:
    """The same backbone for clips of `frames` frames, all of which go through it at once.

    `forward` takes [B, T, 3, H, W]; levels have the axes of their maps behind T: [B, T, C, h, w].
    """

    def levels_at(canvas: Size) -> tuple[LevelSpec, ...]:
        return tuple(_in_time(level, frames) for level in backbone.levels_at(canvas))

    def forward(clips: Tensor) -> dict[str, Tensor]:
        maps = backbone.forward(clips.flatten(0, 1))
        return {name: x.unflatten(0, (-1, frames)) for name, x in maps.items()}

    levels = tuple(_in_time(level, frames) for level in backbone.spec.levels)
    return replace(
        backbone,
        spec=replace(backbone.spec, levels=levels),
        levels_at=functools.cache(levels_at),
        forward=forward,
    )


def _in_time(level: LevelSpec, frames: int) -> LevelSpec:
    return replace(level, dims=f"T {level.dims}", shape=(frames, *level.shape))
