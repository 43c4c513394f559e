"""COCO's box and mask scores, as pycocotools defines them, from one state a sample."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fcache.cache_spec import DataError
from fcache.heads.coco.curves import COUNTS, accumulated, curves_of
from fcache.heads.coco.matching import AREAS, KINDS, decode_objects, observe_image
from fcache.heads.detections import Detections
from fcache.heads.metrics import Metric, Scores, States


def detection_metric(category_ids: Sequence[int], *, detections: int) -> Metric:
    """COCO's twelve numbers of boxes and of masks: average precision and recall over images at original size.

    Predictions are `Detections`, at most `detections` an image; truth is `instances/truth`, in whose annotations
    classes are numbered by `category_ids`, in the order of the classes. The scores are pycocotools' (`COCOeval`),
    number by number: "box_ap" (the mean over IoU 0.5 to 0.95), "box_ap50", "box_ap75", "box_ap/small", "/medium",
    "/large", "box_ar/1", "/10", "/100", "/small", "/medium", "/large", and "mask_…"; one that is not defined, as no
    object has such a size, is left out. Per class "box_ap" and "mask_ap", NaN for classes without objects.

    The state of a sample: of its detections, best first, padded to `detections`, `classes` (-1 beyond), `scores`,
    `ranks` (place among those of the class), and per kind and area [4, detections] the IoU thresholds (bit 0 is 0.5) at
    which it is a true positive, `box_true`, or counts for nothing, `box_ignored`; `objects` [4, classes] to be found.
    Raises DataError if a truth is of another size or holds other categories, or no object at all is to be found.
    """
    classes = {category: k for k, category in enumerate(category_ids)}

    def observe(prediction: Detections, targets: Mapping[str, Any]) -> States:
        truth = decode_objects(targets["instances/truth"])
        if truth.size != prediction.size:
            raise DataError(f"the image is {truth.size}, the detections are of {prediction.size}; re-extract the split")
        if unknown := sorted(set(truth.categories) - set(classes)):
            raise DataError(f"an image has objects of category {unknown[0]}, which is none of the split's categories")
        labels = np.array([classes[c] for c in truth.categories], dtype=np.int64)
        return observe_image(prediction, truth, labels, len(classes), detections)

    def reduce(states: States, weights: np.ndarray) -> Scores:
        values: dict[str, float] = {}
        per_class: dict[str, np.ndarray] = {}
        for kind in KINDS:
            found = {area: accumulated(states, kind, area, weights, COUNTS) for area in AREAS}
            values |= {f"{kind}_{name}": v for name, v in _summary(found).items() if v is not None}
            per_class[f"{kind}_ap"] = found["all"][0].mean(axis=(0, 1))
        if "box_ap" not in values:
            raise DataError("no object of the evaluation split is to be found; there is nothing to score")
        return Scores(values=values, per_class=per_class)

    def resample(states: States) -> Callable[[np.ndarray], float]:
        curves = list(curves_of(states, "box", "all"))

        def box_ap(weights: np.ndarray) -> float:
            precision = np.stack([c.precision(weights) for c in curves], axis=-1)
            if np.isnan(precision).all():
                raise DataError("no object of the drawn samples is to be found; there is nothing to score")
            return float(np.mean(precision[~np.isnan(precision)]))

        return box_ap

    return Metric(primary="box_ap", observe=observe, reduce=reduce, resample=resample)


def _summary(found: Mapping[str, tuple[np.ndarray, dict[int, np.ndarray]]]) -> dict[str, float | None]:
    precision, recall = found["all"]
    return {
        "ap": _mean(precision),
        "ap50": _mean(precision[0]),
        "ap75": _mean(precision[5]),
        **{f"ap/{area}": _mean(found[area][0]) for area in AREAS if area != "all"},
        **{f"ar/{n}": _mean(recall[n]) for n in COUNTS},
        **{f"ar/{area}": _mean(found[area][1][COUNTS[-1]]) for area in AREAS if area != "all"},
    }


def _mean(values: np.ndarray) -> float | None:
    defined = values[~np.isnan(values)]
    return float(np.mean(defined)) if len(defined) else None
