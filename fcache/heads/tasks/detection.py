"""Detection and instance segmentation: `maskrcnn`, `cascade`, `htc` and `htc-without-semantic`.

Labels `instances/…`, and `semantic/map` for the semantic branch; scores at original size.
"""

from collections.abc import Callable
from functools import partial

from torch import nn

from fcache.heads.head import Head, HeadInput, Options
from fcache.heads.parts.detection import (
    DETECTOR_OPTIONS,
    Cascade,
    Detector,
    Stage,
    check_detector,
    detection_loss,
    detection_metrics,
    detection_outputs,
    detector_levels,
    merge_detections,
)
from fcache.heads.parts.levels import fine_to_coarse

MASK_RCNN_OPTIONS: Options = {**DETECTOR_OPTIONS, "class_agnostic": False}
CASCADE_OPTIONS: Options = {**DETECTOR_OPTIONS, "stage_ious": (0.5, 0.6, 0.7), "mask_branches": 3}
HTC_OPTIONS: Options = {**CASCADE_OPTIONS, "interleaved": True, "mask_flow": True}

_NO_STUFF = (
    "its semantic branch learns from a label map of the whole image: extract COCO with COCO-Stuff's maps in "
    "stuffthingmaps (docs/howto/own-data.md), or take htc-without-semantic"
)


def _single(options: Options) -> Cascade:
    return Cascade((Stage(0.5),), mask_branches=1, agnostic=options["class_agnostic"])


def _cascade(options: Options) -> Cascade:
    """Of stage k from 0 on deltas are finer by k + 1, and losses count 1, 1/2, 1/4, as mmdetection has them."""
    stages = tuple(
        Stage(iou, (10.0 * (k + 1), 10.0 * (k + 1), 5.0 * (k + 1), 5.0 * (k + 1)), weight=0.5**k, beta=1.0)
        for k, iou in enumerate(options["stage_ious"])
    )
    return Cascade(
        stages,
        mask_branches=options["mask_branches"],
        agnostic=True,
        interleaved=options.get("interleaved", False),
        flow=options.get("mask_flow", False),
    )


def _build(
    inputs: HeadInput, options: Options, *, form: Callable[[Options], Cascade], semantic: bool = False
) -> nn.Module:
    return Detector(
        fine_to_coarse(inputs),
        inputs.num_classes("instances"),
        options,
        form(options),
        semantic_classes=inputs.num_classes("semantic") if semantic else 0,
    )


def _check(inputs: HeadInput, options: Options, *, form: Callable[[Options], Cascade], semantic: bool = False) -> None:
    fine_to_coarse(inputs)
    check_detector(inputs, options)
    form(options)
    if semantic:
        inputs.num_classes("semantic")


def _head(form: Callable[[Options], Cascade], options: Options, *, semantic: bool = False) -> Head:
    return Head(
        needs=frozenset({"instances", "semantic"} if semantic else {"instances"}),
        build=partial(_build, form=form, semantic=semantic),
        loss=detection_loss,
        outputs=detection_outputs,
        merge=merge_detections,
        metrics=detection_metrics,
        levels=detector_levels,
        check=partial(_check, form=form, semantic=semantic),
        options=options,
        absent=_NO_STUFF if semantic else Head.absent,
    )


HEADS = {
    "maskrcnn": _head(_single, MASK_RCNN_OPTIONS),
    "cascade": _head(_cascade, CASCADE_OPTIONS),
    "htc": _head(_cascade, HTC_OPTIONS, semantic=True),
    "htc-without-semantic": _head(_cascade, HTC_OPTIONS),
}
