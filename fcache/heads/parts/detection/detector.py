"""The detectors: a pyramid, proposals and regions, and the functions of their heads."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from fcache.cache_spec import LevelSpec, SpecError
from fcache.heads.batches import Batch
from fcache.heads.coco import detection_metric
from fcache.heads.head import HeadInput, Options
from fcache.heads.metrics import Metric
from fcache.heads.parts.adaptors import adapted_levels
from fcache.heads.parts.detection.boxes import Found
from fcache.heads.parts.detection.proposals import Proposals
from fcache.heads.parts.detection.pyramid import PYRAMID_OPTIONS, DetectionPyramid, check_pyramid
from fcache.heads.parts.detection.regions import REGION_OPTIONS, Cascade, Pooled, RegionHeads
from fcache.heads.parts.detection.semantic import SemanticBranch, semantic_loss
from fcache.heads.parts.detection.targets import Objects, objects_of

DETECTOR_OPTIONS: Options = {
    **PYRAMID_OPTIONS,
    "rpn_convs": 1,
    "anchor_scales": (8.0,),
    "anchor_ratios": (0.5, 1.0, 2.0),
    "candidates": (2000, 1000),
    "proposals": 1000,
    **REGION_OPTIONS,
}


class Detector(nn.Module):
    """Boxes, classes and masks of objects, from levels of a backbone.

    With `semantic_classes` it has the semantic branch of HTC, whose embedding is added to all that is pooled.
    """

    def __init__(
        self,
        levels: Sequence[LevelSpec],
        num_classes: int,
        options: Options,
        cascade: Cascade,
        *,
        semantic_classes: int = 0,
    ) -> None:
        super().__init__()
        width = options["width"]
        self.pyramid = DetectionPyramid(levels, options)
        self.proposals = Proposals(
            width,
            self.pyramid.strides,
            scales=options["anchor_scales"],
            ratios=options["anchor_ratios"],
            convs=options["rpn_convs"],
            candidates=options["candidates"],
            kept=options["proposals"],
        )
        # Regions are pooled from the backbone's levels; coarser ones are for large proposals.
        self.regions = RegionHeads(
            width, self.pyramid.strides[: self.pyramid.num_levels], num_classes, options, cascade
        )
        self.semantic = SemanticBranch(width, self.pyramid.strides, semantic_classes) if semantic_classes else None

    def losses(
        self,
        features: Mapping[str, Tensor],
        sizes: Sequence[tuple[int, int]],
        objects: Sequence[Objects],
        semantic: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Features by level name, the valid (height, width) and the objects of every view -> weighted loss terms.

        `semantic` are the labels [B, H, W] of the semantic branch.
        """
        maps = self.pyramid(features)
        proposals, terms = self.proposals(maps, sizes, [o.boxes for o in objects])
        terms = dict(terms)
        pooled, logits = self._pooled(maps)
        if logits is not None and semantic is not None:
            terms["semantic"] = semantic_loss(logits, semantic)
        return terms | dict(self.regions.losses(pooled, proposals, sizes, objects))

    def forward(self, features: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]]) -> list[Found]:
        """Features by level name and the valid (height, width) of every view -> what is found in it."""
        maps = self.pyramid(features)
        proposals, _ = self.proposals(maps, sizes)
        return self.regions.detect(self._pooled(maps)[0], proposals, sizes)

    def _pooled(self, maps: Sequence[Tensor]) -> tuple[Pooled, Tensor | None]:
        logits, embedding = self.semantic(maps) if self.semantic is not None else (None, None)
        levels = maps[: self.pyramid.num_levels]
        return Pooled(levels, self.regions.pooler, self.semantic, embedding), logits


def detector_levels(available: Sequence[LevelSpec], options: Options) -> tuple[str, ...]:
    """`Head.levels` of detectors: all, or those that the adaptors take."""
    return adapted_levels(available, options["adaptors"])


def check_detector(inputs: HeadInput, options: Options) -> None:
    """`Head.check` of what all detectors share. Raises SpecError for options out of their range."""
    check_pyramid(options)
    for name in ("rpn_convs", "proposals", "rois", "box_layers", "box_units", "mask_convs", "detections"):
        if options[name] < 1:
            raise SpecError(f"a detector needs {name} of at least 1, got {options[name]}")
    if options["box_convs"] < 0:
        raise SpecError(f"a detector needs box_convs of at least 0, got {options['box_convs']}")
    if len(options["candidates"]) != 2 or min(options["candidates"]) < 1:
        raise SpecError(
            "a detector needs candidates of at least 1 in training and at test time, as in 2000,1000, got "
            f"{options['candidates']}"
        )
    for name in ("anchor_scales", "anchor_ratios"):
        if not options[name] or min(options[name]) <= 0:
            raise SpecError(f"a detector needs {name}, all above 0, got {options[name]}")
    if not 0 <= options["score_threshold"] < 1 or not 0 < options["nms_threshold"] <= 1:
        raise SpecError(
            "a detector needs score_threshold in [0, 1) and nms_threshold in (0, 1], got "
            f"{options['score_threshold']} and {options['nms_threshold']}"
        )
    inputs.num_classes("instances")


def detection_loss(module: nn.Module, batch: Batch, options: Options) -> dict[str, Tensor]:
    """`Head.loss` of detectors."""
    assert isinstance(module, Detector)
    labels = batch.targets["semantic/map"] if module.semantic is not None else None
    assert labels is None or isinstance(labels, Tensor)
    return module.losses(batch.features, _sizes(batch), objects_of(batch), labels)


def detection_outputs(module: nn.Module, batch: Batch, options: Options) -> list[Found]:
    """`Head.outputs` of detectors."""
    return module(batch.features, _sizes(batch))


def detection_metrics(inputs: HeadInput, options: Options) -> Metric:
    """`Head.metrics` of detectors: COCO's box and mask AP, see `detection_metric`."""
    spec = inputs.target("instances")
    ids = spec.conversion.get("category_ids", range(1, len(spec.class_names) + 1))
    return detection_metric([int(i) for i in ids], detections=options["detections"])


def _sizes(batch: Batch) -> list[tuple[int, int]]:
    return [view.valid for view in batch.views]
