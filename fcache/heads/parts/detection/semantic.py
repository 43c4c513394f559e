"""The semantic branch of Hybrid Task Cascade: classes of all pixels, and a map that regions take context from."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from fcache.cache_spec import IGNORE
from fcache.heads.parts.detection.pooler import with_image

WEIGHT = 0.2
CONVS = 4


class SemanticBranch(nn.Module):
    """Maps of a pyramid, resized to the second of them and summed -> class logits and an embedding there.

    Every map passes a 1x1 convolution and ReLU; the sum four 3x3 ones; then logits and embedding are 1x1 convolutions.
    As mmdetection's FusedSemanticHead.
    """

    def __init__(self, width: int, strides: Sequence[float], num_classes: int) -> None:
        super().__init__()
        self.fused = min(1, len(strides) - 1)
        self.stride = strides[self.fused]
        self.lateral = nn.ModuleList(_block(width, kernel=1) for _ in strides)
        self.body = nn.Sequential(*(_block(width, kernel=3) for _ in range(CONVS)))
        self.embed = _block(width, kernel=1)
        self.classify = nn.Conv2d(width, num_classes, 1)
        nn.init.kaiming_normal_(self.classify.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.classify.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Maps [B, width, H_i, W_i] -> logits [B, K, H, W] and the embedding [B, width, H, W]."""
        size = (maps[self.fused].shape[2], maps[self.fused].shape[3])
        resized = [F.interpolate(x, size=size, mode="bilinear", align_corners=True) for x in maps]
        total = sum(lateral(x) for lateral, x in zip(self.lateral, resized, strict=True))
        x = self.body(total)
        return self.classify(x).float(), self.embed(x)

    def pool(self, embedding: Tensor, boxes: Sequence[Tensor], size: int) -> Tensor:
        """The embedding within boxes [n_b, 4] (input pixels) of each view: [sum n_b, width, size, size], float32."""
        with torch.autocast(embedding.device.type, enabled=False):
            return roi_align(embedding.float(), with_image(boxes), size, 1 / self.stride, 0, aligned=True)


def semantic_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of logits [B, K, h, w] over the labelled places of `labels` [B, H, W], taken where the logits are.

    Weighted as in HTC; 0 without any labelled place.
    """
    nearest = F.interpolate(labels[:, None].float(), size=logits.shape[-2:], mode="nearest-exact")[:, 0].long()
    total = F.cross_entropy(logits, nearest, ignore_index=IGNORE, reduction="sum")
    return WEIGHT * total / (nearest != IGNORE).sum().clamp(min=1)


def _block(width: int, *, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(width, width, kernel, padding=kernel // 2)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return nn.Sequential(conv, nn.ReLU())
