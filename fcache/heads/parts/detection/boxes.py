"""The box branch of a detector: sampling of regions, their classes and boxes, losses, and what remains at test time."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Private to torchvision, which has no public form of them; `tests/heads/parts/detection/test_torchvision.py` compares
# what is made of them with torchvision's own models, so that a change there is seen.
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, remove_small_boxes

POOLED = 7
# Share of the sampled regions that are positive, if there are enough.
POSITIVE = 0.25
# Boxes with a side below this many pixels are no detections.
SMALLEST = 1e-2


@dataclass(frozen=True)
class Stage:
    """What a stage of a cascade trains on: regions are positive from `iou` on; deltas of boxes are multiplied by
    `deltas` (x, y, width, height); the losses count `weight`, that of the boxes is smooth L1 with `beta`.
    """

    iou: float
    deltas: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    weight: float = 1.0
    beta: float = 1 / 9

    @property
    def coder(self) -> BoxCoder:
        """What makes deltas of boxes, and boxes of deltas."""
        return BoxCoder(self.deltas)


@dataclass(frozen=True)
class Regions:
    """The regions of one view that are trained on: `boxes` [n, 4], `labels` [n] (0 for background), the index of the
    object that each is matched with in `matched` [n] (any for background), and in `given` [n] whether it is one itself.
    """

    boxes: Tensor
    labels: Tensor
    matched: Tensor
    given: Tensor

    @property
    def positive(self) -> Tensor:
        """Indices of those that are no background."""
        return torch.where(self.labels > 0)[0]


@dataclass(frozen=True)
class Found:
    """What a detector says about one view, best first, on its device.

    `boxes` float32 [n, 4] in pixels of the canvas, `scores` [n], `labels` int64 [n] from 0 on, and `masks` [n, M, M],
    the probability of each cell of the box.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor


class BoxBranch(nn.Module):
    """Pooled regions -> class logits [N, K + 1], the background first, and deltas [N, 4 (K + 1)], float32.

    `convs` 3x3 convolutions (with BatchNorm where `normalised`) and `layers` linear layers of `units`. With `agnostic`
    the deltas are [N, 4], the same for all classes. Initial weights of the last layers are normal with deviations 0.01
    and 0.001.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        convs: int,
        layers: int,
        units: int,
        normalised: bool,
        agnostic: bool,
    ) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if normalised else None
        self.body = FastRCNNConvFCHead((width, POOLED, POOLED), [width] * convs, [units] * layers, norm_layer=norm)
        self.classify = nn.Linear(units, num_classes + 1)
        self.regress = nn.Linear(units, 4 if agnostic else 4 * (num_classes + 1))
        for layer, deviation in ((self.classify, 0.01), (self.regress, 0.001)):
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """[N, width, 7, 7] -> logits and deltas."""
        x = self.body(pooled)
        return self.classify(x).float(), self.regress(x).float()


def sample(
    proposals: Sequence[Tensor], objects: Sequence[tuple[Tensor, Tensor]], *, iou: float, count: int
) -> list[Regions]:
    """At most `count` regions a view, of its proposals and objects (boxes and labels), drawn at random.

    A region is positive if it overlaps an object by `iou`, and of its class, else background.
    """
    matcher, sampler = Matcher(iou, iou), BalancedPositiveNegativeSampler(count, POSITIVE)
    regions: list[Regions] = []
    for found, (boxes, labels) in zip(proposals, objects, strict=True):
        together = torch.cat([found, boxes])
        matched = torch.zeros(len(together), dtype=torch.int64, device=together.device)
        classes = matched.clone()
        if len(boxes):
            best = matcher(box_iou(boxes, together))
            matched = best.clamp(min=0)
            classes = torch.where(best >= 0, labels[matched], 0)
        given = torch.arange(len(together), device=together.device) >= len(found)
        regions.append(Regions(together, classes, matched, given))
    positive, negative = sampler([r.labels for r in regions])
    drawn: list[Regions] = []
    for r, p, n in zip(regions, positive, negative, strict=True):
        kept = torch.where(p | n)[0]
        drawn.append(Regions(r.boxes[kept], r.labels[kept], r.matched[kept], r.given[kept]))
    return drawn


def box_losses(
    logits: Tensor, deltas: Tensor, regions: Sequence[Regions], objects: Sequence[Tensor], stage: Stage
) -> tuple[Tensor, Tensor]:
    """Cross entropy of the classes, and smooth L1 of the positive regions' deltas over the number of all regions.

    `objects` are the boxes of the objects of each view. Without any region both are 0.
    """
    labels = torch.cat([r.labels for r in regions])
    if len(labels) == 0:
        return logits.sum() * 0, deltas.sum() * 0
    positive = torch.where(labels > 0)[0]
    truth = torch.cat([boxes[r.matched[r.positive]] for r, boxes in zip(regions, objects, strict=True)])
    wanted = stage.coder.encode_single(truth, torch.cat([r.boxes for r in regions])[positive])
    agnostic = deltas.shape[1] == 4
    said = deltas[positive] if agnostic else deltas.reshape(len(labels), -1, 4)[positive, labels[positive]]
    boxes = F.smooth_l1_loss(said, wanted, beta=stage.beta, reduction="sum") / len(labels)
    return F.cross_entropy(logits, labels), boxes


def moved(boxes: Sequence[Tensor], deltas: Tensor, stage: Stage, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Boxes [n_b, 4] of some views moved by deltas [sum n_b, 4] and clipped to the views, without gradient."""
    found = stage.coder.decode_single(deltas.detach(), torch.cat(list(boxes)))
    parts = found.split([len(b) for b in boxes])
    return [clip_boxes_to_image(part, size) for part, size in zip(parts, sizes, strict=True)]


def detections(
    probabilities: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    *,
    score_threshold: float,
    nms_threshold: float,
    kept: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What remains of the regions of one view: boxes [n, 4], scores [n] and labels [n] from 0 on, best first.

    `probabilities` [N, K + 1] are those of the classes, the background first; `boxes` [N, 4], or [N, K + 1, 4] of each
    class. Boxes of a class that overlap a better one by more than `nms_threshold` are left out.
    """
    scores = probabilities[:, 1:]
    region, label = torch.where(scores > score_threshold)
    scores = scores[region, label]
    boxes = clip_boxes_to_image(boxes[region] if boxes.ndim == 2 else boxes[region, label + 1], size)
    large = remove_small_boxes(boxes, SMALLEST)
    boxes, scores, label = boxes[large], scores[large], label[large]
    best = batched_nms(boxes, scores, label, nms_threshold)[:kept]
    return boxes[best], scores[best], label[best]
