"""The region proposal network, driven by maps alone: torchvision's, with anchors of fixed strides."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import box_iou

# Pairs of an object and an anchor that are compared at once: 64 MB of float32.
PAIRS = 1 << 24


class StrideAnchors(nn.Module):
    """torchvision's anchors, at the given strides of the maps and always in float32.

    torchvision takes strides from the sizes of image and maps, which is wrong for sizes that the strides do not divide,
    and anchors in the type of the maps, which is too coarse under autocast. A map has an anchor of each ratio
    (height / width) and scale, whose side is scale times stride.
    """

    def __init__(self, strides: Sequence[float], scales: Sequence[float], ratios: Sequence[float]) -> None:
        super().__init__()
        self.strides = tuple(strides)
        sizes = tuple(tuple(scale * stride for scale in scales) for stride in strides)
        self.generator = AnchorGenerator(sizes, (tuple(ratios),) * len(sizes))  # type: ignore[arg-type]
        self.per_place = len(scales) * len(ratios)

    def forward(self, images: ImageList, maps: Sequence[Tensor]) -> list[Tensor]:
        """Anchors [n, 4] for each image, level by level and row by row."""
        device = maps[0].device
        self.generator.set_cell_anchors(torch.float32, device)
        strides = [[torch.tensor(s, device=device)] * 2 for s in self.strides]
        anchors = torch.cat(self.generator.grid_anchors([list(x.shape[-2:]) for x in maps], strides))
        return [anchors] * len(images.image_sizes)


class ProposalHead(nn.Module):
    """torchvision's RPNHead with float32 results: boxes are computed from them, for which bfloat16 is too coarse."""

    def __init__(self, width: int, anchors: int, *, convs: int) -> None:
        super().__init__()
        self.head = RPNHead(width, anchors, conv_depth=convs)

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps [B, width, H_i, W_i] -> objectness [B, A, H_i, W_i] and deltas [B, 4 A, H_i, W_i] by map."""
        scores, deltas = self.head(maps)
        return [x.float() for x in scores], [x.float() for x in deltas]


class Proposals(nn.Module):
    """torchvision's RegionProposalNetwork: 256 anchors an image in the loss, half of them positive; IoU 0.7 and 0.3.

    `candidates` of each level go into the non-maximum suppression in training and at test time, `kept` of all come out.
    """

    def __init__(
        self,
        width: int,
        strides: Sequence[float],
        *,
        scales: Sequence[float],
        ratios: Sequence[float],
        convs: int,
        candidates: tuple[int, int],
        kept: int,
    ) -> None:
        super().__init__()
        anchors = StrideAnchors(strides, scales, ratios)
        self.network = RegionProposalNetwork(
            anchors,  # type: ignore[arg-type]
            ProposalHead(width, anchors.per_place, convs=convs),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": candidates[0], "testing": candidates[1]},
            post_nms_top_n={"training": kept, "testing": kept},
            nms_thresh=0.7,
        )
        self.network.box_similarity = box_iou_in_parts  # type: ignore[assignment]

    def forward(
        self, maps: Sequence[Tensor], sizes: Sequence[tuple[int, int]], boxes: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], Mapping[str, Tensor]]:
        """Maps, the valid (height, width) and in training the objects' boxes [n, 4] of B images -> the proposals [p, 4]
        of each, best first and without gradient, and in training the loss terms.
        """
        # Of the images nothing is read but their sizes.
        images = ImageList(maps[0], list(sizes))
        targets = None if boxes is None else [{"boxes": b} for b in boxes]
        found, losses = self.network(images, {str(i): x for i, x in enumerate(maps)}, targets)
        names = {"loss_objectness": "objectness", "loss_rpn_box_reg": "proposals"}
        return found, {names[name]: loss for name, loss in losses.items()}


def box_iou_in_parts(objects: Tensor, anchors: Tensor) -> Tensor:
    """IoU [n, m] of boxes [n, 4] and [m, 4]. Objects are taken a few at a time: hundreds of them with the quarter of a
    million anchors of a large view would need gigabytes for what lies between.
    """
    step = max(1, PAIRS // max(1, len(anchors)))
    if len(objects) <= step:
        return box_iou(objects, anchors)
    return torch.cat([box_iou(part, anchors) for part in objects.split(step)])
