"""The top-down path of a feature pyramid network."""

from collections.abc import Sequence

from torch import Tensor, nn

from fcache.heads.parts.conv import ConvNormAct, resize


class TopDown(nn.Module):
    """A feature pyramid network below a given top: levels from fine to coarse and the top -> maps of `width` channels.

    Every level below the top passes a 1x1 block, the next coarser sum is added to it, and a 3x3 block smooths it.
    The top is taken as it is.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(ConvNormAct(c, width, kernel=1) for c in channels)
        self.smooth = nn.ModuleList(ConvNormAct(width, width, kernel=3) for _ in channels)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Levels [B, C_i, H_i, W_i] and last the top [B, width, H, W] -> as many maps of `width` channels."""
        sums = [lateral(x) for lateral, x in zip(self.lateral, levels[:-1], strict=True)] + [levels[-1]]
        for i in range(len(sums) - 1, 0, -1):
            sums[i - 1] = sums[i - 1] + resize(sums[i], (sums[i - 1].shape[2], sums[i - 1].shape[3]))
        return [smooth(x) for smooth, x in zip(self.smooth, sums[:-1], strict=True)] + [sums[-1]]
