"""LayerNorm over the channels of a map."""

from torch import Tensor, nn


class ChannelNorm(nn.Module):
    """LayerNorm over C at every position of [B, C, H, W], with trainable scale and shift.

    A cache holds raw stage outputs; the Swin backbones of segmentation frameworks end each stage in such a norm.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
