"""A backbone of images on clips: it sees every frame alone."""

import functools
from dataclasses import replace

from torch import Tensor

from fcache.cache_spec import LevelSpec
from fcache.extractor.backbones.backbone import Backbone


def of_clips(backbone: Backbone, frames: int) -> Backbone:
    """The same backbone for clips of `frames` frames, all of which go through it at once.

    `forward` takes [B, T, 3, H, W]; levels have the axes of their maps behind T: [B, T, C, h, w].
    """

    def forward(clips: Tensor) -> dict[str, Tensor]:
        maps = backbone.forward(clips.flatten(0, 1))
        return {name: x.unflatten(0, (-1, frames)) for name, x in maps.items()}

    return replace(
        backbone,
        spec=replace(backbone.spec, levels=_in_time(backbone.spec.levels, frames)),
        levels_at=functools.cache(lambda canvas: _in_time(backbone.levels_at(canvas), frames)),
        offered_at=functools.cache(lambda canvas: _in_time(backbone.offered_at(canvas), frames)),
        forward=forward,
    )


def _in_time(levels: tuple[LevelSpec, ...], frames: int) -> tuple[LevelSpec, ...]:
    return tuple(replace(level, dims=f"T {level.dims}", shape=(frames, *level.shape)) for level in levels)
