"""The mask branch of a detector: masks of regions, and their loss."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import roi_align

from fcache.heads.parts.detection.boxes import Regions
from fcache.heads.parts.detection.pooler import with_image
from fcache.heads.parts.detection.targets import Objects

POOLED = 14
# Masks of objects that are resampled at once: at 1024 x 1024 they take 64 MB of float32.
TOGETHER = 16


class MaskBranch(nn.Module):
    """Pooled regions -> mask logits [N, K + 1, 28, 28], of which the first is never read.

    `convs` 3x3 convolutions (with BatchNorm where `normalised`), a deconvolution and a 1x1 convolution. With `flow` the
    last feature of the branch before it is taken in, by a 1x1 convolution and ReLU.
    """

    def __init__(self, width: int, num_classes: int, *, convs: int, normalised: bool, flow: bool = False) -> None:
        super().__init__()
        self.take_in = nn.Conv2d(width, width, 1) if flow else None
        if self.take_in is not None:
            nn.init.kaiming_normal_(self.take_in.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(self.take_in.bias)  # type: ignore[arg-type]
        norm = nn.BatchNorm2d if normalised else None
        self.body = MaskRCNNHeads(width, [width] * convs, dilation=1, norm_layer=norm)
        self.predict = MaskRCNNPredictor(width, width, num_classes + 1)

    def features(self, pooled: Tensor, before: Tensor | None = None) -> Tensor:
        """[N, width, 14, 14], and the features of the branch before -> features of the same shape."""
        if self.take_in is not None and before is not None:
            pooled = pooled + F.relu(self.take_in(before))
        return self.body(pooled)

    def forward(self, features: Tensor) -> Tensor:
        """Features -> logits, float32."""
        return self.predict(features).float()


def mask_loss(logits: Tensor, regions: Sequence[Regions], objects: Sequence[Objects]) -> Tensor:
    """Binary cross entropy of the masks of the positive regions, mean over cells; 0 without any.

    `logits` [P, K + 1, M, M] are those of the positive regions of all views in order.
    """
    if len(logits) == 0:
        return logits.sum() * 0
    wanted = torch.cat([mask_targets(r, o, logits.shape[-1]) for r, o in zip(regions, objects, strict=True)])
    labels = torch.cat([r.labels[r.positive] for r in regions])
    return F.binary_cross_entropy_with_logits(logits[torch.arange(len(labels), device=labels.device), labels], wanted)


def mask_targets(regions: Regions, objects: Objects, size: int) -> Tensor:
    """The masks of the positive regions' objects within them, float32 [P, size, size] of 0 and 1.

    A cell is 1 where the mask covers half of it or more, as Detectron2 and mmdetection have it; torchvision takes the
    share itself, of places half a pixel away.
    """
    return (resampled_masks(regions, objects, size, aligned=True) >= 0.5).float()


def resampled_masks(regions: Regions, objects: Objects, size: int, *, aligned: bool) -> Tensor:
    """The share of every cell of the positive regions that the mask of their object covers, [P, size, size]."""
    boxes, matched = regions.boxes[regions.positive], regions.matched[regions.positive].tolist()
    shares = boxes.new_zeros((len(boxes), size, size))
    # Regions of one object after each other: its mask is decoded and converted once.
    order = sorted(range(len(matched)), key=lambda i: matched[i])
    needed = list(dict.fromkeys(matched[i] for i in order))
    for first in range(0, len(needed), TOGETHER):
        some = needed[first : first + TOGETHER]
        masks = torch.stack(objects.masks(some))[:, None].to(boxes.dtype)
        mine = [[i for i in order if matched[i] == j] for j in some]
        rows = torch.tensor([i for group in mine for i in group], device=boxes.device)
        rois = with_image([boxes[group] for group in mine])
        shares[rows] = roi_align(masks, rois, size, 1.0, -1, aligned=aligned)[:, 0]
    return shares


def mask_probabilities(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """The mean over branches of the mask probabilities of each detection's class (from 0 on): [n, M, M]."""
    rows = torch.arange(len(labels), device=labels.device)
    return torch.stack([x[rows, labels + 1].sigmoid() for x in logits]).mean(dim=0)
