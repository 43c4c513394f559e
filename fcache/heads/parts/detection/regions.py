"""What a detector does with its proposals: one stage (Mask R-CNN), or several (Cascade Mask R-CNN, HTC)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fcache.cache_spec import SpecError
from fcache.heads.head import Options
from fcache.heads.parts.detection import boxes as box_parts
from fcache.heads.parts.detection import masks as mask_parts
from fcache.heads.parts.detection.boxes import BoxBranch, Found, Regions, Stage, box_losses, detections, moved, sample
from fcache.heads.parts.detection.masks import MaskBranch, mask_loss, mask_probabilities
from fcache.heads.parts.detection.pooler import AlignedPooler
from fcache.heads.parts.detection.semantic import SemanticBranch
from fcache.heads.parts.detection.targets import Objects

REGION_OPTIONS: Options = {
    "rois": 512,
    "box_convs": 0,
    "box_layers": 2,
    "box_units": 1024,
    "mask_convs": 4,
    "score_threshold": 0.05,
    "nms_threshold": 0.5,
    "detections": 100,
}


@dataclass(frozen=True)
class Cascade:
    """The stages of a cascade and how they hang together.

    There is a mask branch for each stage, or a single one. `interleaved`: a mask branch trains on boxes that the box
    branch of its stage has moved. `flow`: it takes in the features of the one before. `agnostic`: boxes are moved alike
    for all classes, which stages that follow each other need.
    """

    stages: tuple[Stage, ...]
    mask_branches: int
    agnostic: bool
    interleaved: bool = False
    flow: bool = False

    def __post_init__(self) -> None:
        if not self.stages or not all(0 < s.iou < 1 for s in self.stages):
            raise SpecError(f"stages have an IoU between 0 and 1 each, got {[s.iou for s in self.stages]}")
        if len(self.stages) > 1 and not self.agnostic:
            raise SpecError("stages that follow each other move boxes alike for all classes")
        if self.mask_branches not in (1, len(self.stages)):
            raise SpecError(f"mask_branches is 1 or one a stage ({len(self.stages)}), got {self.mask_branches}")
        if self.mask_branches == 1 < len(self.stages) and (self.interleaved or self.flow):
            raise SpecError("a single mask branch has no other to be interleaved with or to take features from")


@dataclass(frozen=True)
class Pooled:
    """The maps that regions are pooled from; with the semantic branch and its embedding where there is one."""

    maps: Sequence[Tensor]
    pooler: nn.Module
    semantic: SemanticBranch | None = None
    embedding: Tensor | None = None

    def __call__(self, boxes: Sequence[Tensor], size: int) -> Tensor:
        """Boxes [n_b, 4] of every view -> [sum n_b, C, size, size]."""
        found = self.pooler(self.maps, boxes, size)
        if self.semantic is not None and self.embedding is not None:
            found = found + self.semantic.pool(self.embedding, boxes, size)
        return found


class RegionHeads(nn.Module):
    """Box and mask branches over the proposals of some views.

    A stage samples regions anew among what the stage before has moved (the objects themselves come in anew as well), as
    mmdetection does it. At test time the class probabilities of all stages are averaged on the regions as they are
    moved on, the boxes are the last stage's, and the masks of all branches are averaged on them.
    """

    def __init__(
        self, width: int, strides: Sequence[float], num_classes: int, options: Options, cascade: Cascade
    ) -> None:
        super().__init__()
        self.cascade = cascade
        self.count = options["rois"]
        self.limits = {
            "score_threshold": options["score_threshold"],
            "nms_threshold": options["nms_threshold"],
            "kept": options["detections"],
        }
        self.pooler: nn.Module = AlignedPooler(strides)
        self.boxes = nn.ModuleList(
            BoxBranch(
                width,
                num_classes,
                convs=options["box_convs"],
                layers=options["box_layers"],
                units=options["box_units"],
                normalised=options["batch_norm"],
                agnostic=cascade.agnostic,
            )
            for _ in cascade.stages
        )
        self.masks = nn.ModuleList(
            MaskBranch(
                width,
                num_classes,
                convs=options["mask_convs"],
                normalised=options["batch_norm"],
                flow=cascade.flow and k > 0,
            )
            for k in range(cascade.mask_branches)
        )

    def losses(
        self, pooled: Pooled, proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]], objects: Sequence[Objects]
    ) -> Mapping[str, Tensor]:
        """The weighted loss terms of all stages, of the proposals [p, 4] of every view; `sizes` are (height, width)."""
        truth = [(o.boxes, o.labels) for o in objects]
        terms: dict[str, Tensor] = {}
        for k, (stage, branch) in enumerate(zip(self.cascade.stages, self.boxes, strict=True)):
            name = f"_{k + 1}" if len(self.boxes) > 1 else ""
            regions = sample(proposals, truth, iou=stage.iou, count=self.count)
            boxes = [r.boxes for r in regions]
            logits, deltas = branch(pooled(boxes, box_parts.POOLED))
            classes, moves = box_losses(logits, deltas, regions, [o.boxes for o in objects], stage)
            terms |= {f"classes{name}": stage.weight * classes, f"boxes{name}": stage.weight * moves}
            if self.cascade.agnostic:
                # Objects themselves are no proposals of the next stage: they come in anew there.
                after = moved(boxes, deltas, stage, sizes)
                proposals = [p[~r.given] for p, r in zip(after, regions, strict=True)]
            if k < len(self.masks):
                if self.cascade.interleaved:
                    regions = sample(proposals, truth, iou=stage.iou, count=self.count)
                terms[f"masks{name}"] = stage.weight * self._mask_loss(k, pooled, regions, objects)
        return terms

    def _mask_loss(self, k: int, pooled: Pooled, regions: Sequence[Regions], objects: Sequence[Objects]) -> Tensor:
        branch = self.masks[k]
        boxes = [r.boxes[r.positive] for r in regions]
        if not sum(len(b) for b in boxes):
            # BatchNorm cannot take its statistics of nothing.
            return torch.stack([p.sum() for p in branch.parameters()]).sum() * 0
        features = self._mask_features(pooled(boxes, mask_parts.POOLED), upto=k)
        return mask_loss(branch(features[k]), regions, objects)

    def _mask_features(self, pooled: Tensor, *, upto: int) -> list[Tensor]:
        """The features of the mask branches up to one of them; without flow only those of this one are computed."""
        features: list[Tensor] = []
        for k in range(upto + 1):
            branch = self.masks[k]
            assert isinstance(branch, MaskBranch)
            if self.cascade.flow or k == upto:
                features.append(branch.features(pooled, features[-1] if features and self.cascade.flow else None))
            else:
                features.append(pooled.new_empty(0))
        return features

    def detect(self, pooled: Pooled, proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Found]:
        """What is found in every view, of its proposals [p, 4] and its (height, width)."""
        regions, probabilities = list(proposals), []
        logits = deltas = torch.empty(0)
        for k, (stage, branch) in enumerate(zip(self.cascade.stages, self.boxes, strict=True)):
            logits, deltas = branch(pooled(regions, box_parts.POOLED))
            probabilities.append(logits.softmax(dim=-1))
            if k + 1 < len(self.boxes):
                regions = moved(regions, deltas, stage, sizes)
        counts = [len(r) for r in regions]
        mean = (torch.stack(probabilities).mean(dim=0) if len(probabilities) > 1 else probabilities[0]).split(counts)
        decoded = self.cascade.stages[-1].coder.decode_single(deltas, torch.cat(regions))
        boxes = decoded.reshape(len(deltas), deltas.shape[1] // 4, 4)
        boxes = (boxes[:, 0] if self.cascade.agnostic else boxes).split(counts)
        kept = [detections(p, b, size, **self.limits) for p, b, size in zip(mean, boxes, sizes, strict=True)]
        masks = self._masks(pooled, kept)
        return [Found(b, s, n, m) for (b, s, n), m in zip(kept, masks, strict=True)]

    def _masks(self, pooled: Pooled, kept: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Sequence[Tensor]:
        """The mask probabilities [n, M, M] of the detections (boxes, scores, labels) of every view."""
        found = pooled([boxes for boxes, _, _ in kept], mask_parts.POOLED)
        before: Tensor | None = None
        logits: list[Tensor] = []
        for branch in self.masks:
            assert isinstance(branch, MaskBranch)
            before = branch.features(found, before)
            logits.append(branch(before))
        labels = torch.cat([label for _, _, label in kept])
        return mask_probabilities(logits, labels).split([len(label) for _, _, label in kept])
