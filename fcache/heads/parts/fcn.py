"""The fully convolutional head of mmsegmentation: 3x3 blocks on one level, and a classifier."""

import torch
from torch import Tensor, nn

from fcache.heads.parts.conv import ConvNormAct, classifier


class FCN(nn.Module):
    """[B, C, H, W] -> logits [B, K, H, W]: `num_convs` 3x3 blocks, channel dropout, a 1x1 convolution.

    `concat_input` puts the input beside the last block's result and fuses both by another 3x3 block.
    """

    def __init__(
        self, channels: int, num_classes: int, *, width: int, num_convs: int, concat_input: bool, dropout: float
    ) -> None:
        super().__init__()
        self.convs = nn.Sequential(*(ConvNormAct(width if i else channels, width, kernel=3) for i in range(num_convs)))
        self.fuse = nn.ModuleList([ConvNormAct(channels + width, width, kernel=3)] if concat_input else [])
        self.dropout = nn.Dropout2d(dropout)
        self.classify = classifier(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B, K, H, W]."""
        y = self.convs(x)
        for fuse in self.fuse:
            y = fuse(torch.cat([x, y], dim=1))
        return self.classify(self.dropout(y))
