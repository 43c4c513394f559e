"""The pixel decoder of Mask2Former: deformable attention over the coarse levels, a top-down path to the finest."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fcache.heads.parts.conv import resize
from fcache.heads.parts.deformable import DeformableBlock, places_of
from fcache.heads.parts.positions import sine_positions


def group_norm(width: int) -> nn.GroupNorm:
    """GroupNorm of 32 groups, as at the original's width of 256; fewer where a group would have less than 8 channels.

    A group of one channel would make every 1x1 map zero.
    """
    groups = max(1, min(32, width // 8))
    while width % groups:
        groups -= 1
    return nn.GroupNorm(groups, width)


def _xavier(convolution: nn.Conv2d) -> nn.Conv2d:
    nn.init.xavier_uniform_(convolution.weight)
    return _without_bias(convolution)


def _caffe2(convolution: nn.Conv2d) -> nn.Conv2d:
    """Filled as Caffe2's "Xavier", and so detectron2: uniform, of variance 1 / inputs."""
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    return _without_bias(convolution)


def _without_bias(convolution: nn.Conv2d) -> nn.Conv2d:
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    return convolution


class PixelDecoder(nn.Module):
    """Levels from fine to coarse -> the `encoded` coarsest ones after attention, coarse first, and mask features.

    The coarsest levels are brought to `width` channels and pass `blocks` blocks of deformable attention together. The
    others join on the way up: each is added to the resized coarser map and smoothed. The mask features are a 1x1
    convolution of the finest map. In the paper three of four levels (strides 8, 16, 32) are encoded.
    """

    def __init__(
        self, channels: Sequence[int], *, encoded: int, width: int, heads: int, blocks: int, hidden: int, dropout: float
    ) -> None:
        super().__init__()
        coarse, fine = channels[::-1][:encoded], channels[::-1][encoded:]
        self.project = nn.ModuleList(nn.Sequential(_xavier(nn.Conv2d(c, width, 1)), group_norm(width)) for c in coarse)
        self.level_positions = nn.Parameter(torch.empty(encoded, width))
        nn.init.normal_(self.level_positions)
        self.blocks = nn.ModuleList(
            DeformableBlock(width, heads=heads, levels=encoded, hidden=hidden, dropout=dropout) for _ in range(blocks)
        )
        self.lateral = nn.ModuleList(
            nn.Sequential(_caffe2(nn.Conv2d(c, width, 1, bias=False)), group_norm(width)) for c in fine
        )
        self.smooth = nn.ModuleList(
            nn.Sequential(_caffe2(nn.Conv2d(width, width, 3, padding=1, bias=False)), group_norm(width), nn.ReLU())
            for _ in fine
        )
        self.mask_features = _caffe2(nn.Conv2d(width, width, 1))

    def forward(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Levels [B, C_i, H_i, W_i], fine to coarse -> encoded maps [B, width, h, w], coarse to fine; mask features."""
        rising = levels[::-1]
        maps = [project(x) for project, x in zip(self.project, rising, strict=False)]
        sizes = [(x.shape[2], x.shape[3]) for x in maps]
        device, dtype, width = maps[0].device, maps[0].dtype, maps[0].shape[1]
        positions = torch.cat(
            [
                sine_positions(size, width, device=device, dtype=dtype) + level
                for size, level in zip(sizes, self.level_positions, strict=True)
            ]
        )
        places = places_of(sizes, device=device, dtype=dtype)
        x = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)
        for block in self.blocks:
            x = block(x, positions, places)
        encoded = [
            part.transpose(1, 2).unflatten(2, size)
            for part, size in zip(x.split([math.prod(s) for s in sizes], dim=1), sizes, strict=True)
        ]
        top = encoded[-1]
        for lateral, smooth, level in zip(self.lateral, self.smooth, rising[len(maps) :], strict=True):
            side = lateral(level)
            top = smooth(side + resize(top, (side.shape[2], side.shape[3])))
        return encoded, self.mask_features(top)
