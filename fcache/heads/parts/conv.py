"""The convolution block of dense heads, its BatchNorm, the classifier at every pixel, and bilinear resizing."""

import torch.nn.functional as F
from torch import Tensor, nn

from fcache.cache_spec import SpecError


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [B, C, H, W] resized bilinearly to `size` (height, width), pixel centres at half-integers."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def batch_norm(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """[B, C, H, W] normalised by `norm`.

    Raises SpecError in training if there is one value a channel only, which BatchNorm cannot normalise.
    """
    if norm.training and x.numel() == x.shape[1]:
        raise SpecError(
            "BatchNorm cannot normalise a 1x1 map of a single sample: train with batch_size 2 or more, and open "
            "the source with drop_last so that no shorter batch ends an epoch"
        )
    return norm(x)


def classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """A 1x1 convolution from features to logits; initial weights normal with deviation 0.01, biases 0."""
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


class ConvNormAct(nn.Module):
    """Convolution without bias, BatchNorm, ReLU: [B, C, H, W] -> [B, out, H, W], the size kept.

    Kaiming normal initial weights (fan out), as the reference implementations of UPerNet.
    Raises SpecError in training if there is one value a channel only, which BatchNorm cannot normalise.
    """

    def __init__(self, channels: int, out: int, *, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(out)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, out, H, W]."""
        return F.relu(batch_norm(self.norm, self.conv(x)))
