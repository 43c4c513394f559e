"""Pyramid pooling (PSPNet): context of several extents around every position."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fcache.heads.parts.conv import ConvNormAct, resize


class PyramidPooling(nn.Module):
    """[B, C, H, W] -> [B, width, H, W]: the map beside its averages on s x s grids, fused by a 3x3 block.

    The grids are 1, 2, 3 and 6 in PSPNet and UPerNet. Each average goes through a 1x1 block to `width` channels.
    """

    def __init__(self, channels: int, width: int, *, scales: Sequence[int] = (1, 2, 3, 6)) -> None:
        super().__init__()
        self.pools = nn.ModuleList(nn.AdaptiveAvgPool2d(s) for s in scales)
        self.reduce = nn.ModuleList(ConvNormAct(channels, width, kernel=1) for _ in scales)
        self.fuse = ConvNormAct(channels + len(scales) * width, width, kernel=3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, width, H, W]."""
        size = (x.shape[2], x.shape[3])
        pooled = [resize(reduce(pool(x)), size) for pool, reduce in zip(self.pools, self.reduce, strict=True)]
        return self.fuse(torch.cat([x, *pooled], dim=1))
