"""The feature pyramid network of detectors, with residual blocks where they are asked for."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fcache.heads.parts.conv import batch_norm


class FPN(nn.Module):
    """Levels from fine to coarse -> as many maps of `width` channels, and `extra_levels` coarser ones.

    torchvision's FeaturePyramidNetwork with LastLevelMaxPool: a 1x1 convolution, the coarser sum enlarged to the
    nearest neighbour and added, a 3x3 convolution; an extra level is every second position of the one before. With
    `normalised` every convolution has BatchNorm in place of its bias. `residual_blocks` of `ResidualBlock` stand behind
    every 1x1 convolution; they begin as identities.
    """

    def __init__(
        self,
        channels: Sequence[int],
        width: int,
        *,
        extra_levels: int = 0,
        normalised: bool = False,
        residual_blocks: int = 0,
    ) -> None:
        super().__init__()
        self.extra_levels = extra_levels
        self.lateral = nn.ModuleList(_Conv(c, width, kernel=1, normalised=normalised) for c in channels)
        self.smooth = nn.ModuleList(_Conv(width, width, kernel=3, normalised=normalised) for _ in channels)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(width) for _ in range(residual_blocks))) for _ in channels
        )

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Levels [B, C_i, H_i, W_i] -> maps [B, width, H_i, W_i], and the extra levels of half the size each."""
        sums = [blocks(lateral(x)) for blocks, lateral, x in zip(self.blocks, self.lateral, levels, strict=True)]
        for i in range(len(sums) - 1, 0, -1):
            size = (sums[i - 1].shape[2], sums[i - 1].shape[3])
            sums[i - 1] = sums[i - 1] + F.interpolate(sums[i], size=size, mode="nearest")
        maps = [smooth(x) for smooth, x in zip(self.smooth, sums, strict=True)]
        for _ in range(self.extra_levels):
            maps.append(maps[-1][:, :, ::2, ::2])
        return maps


class ResidualBlock(nn.Module):
    """x + convolutions of x: BatchNorm, ReLU and a 3x3 convolution, twice. The last convolution begins at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        first, last = self.convs
        nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """[B, width, H, W] -> [B, width, H, W]."""
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            assert isinstance(norm, nn.BatchNorm2d)
            y = conv(F.relu(batch_norm(norm, y)))
        return x + y


class _Conv(nn.Module):
    """A convolution that keeps the size, with bias or BatchNorm; initial weights as torchvision's FPN."""

    def __init__(self, channels: int, out: int, *, kernel: int, normalised: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=not normalised)
        self.norm = nn.BatchNorm2d(out) if normalised else None
        nn.init.kaiming_uniform_(self.conv.weight, a=1)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.norm is None else batch_norm(self.norm, x)
