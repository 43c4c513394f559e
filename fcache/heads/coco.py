"""COCO's box and mask scores, as pycocotools defines them, from one state a sample."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from pycocotools import mask as coco_masks
from torch import Tensor

from fcache.cache_spec import DataError
from fcache.heads.detections import Detections
from fcache.heads.metrics import Metric, Scores, States

IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
# Areas in pixels of the image, both ends included.
AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
# How many detections of a class in an image count, at most; the last is that of all scores but the recalls named by it.
COUNTS = (1, 10, 100)
KINDS = ("box", "mask")


def detection_metric(category_ids: Sequence[int], *, detections: int) -> Metric:
    """COCO's twelve numbers of boxes and of masks: average precision and recall over images at original size.

    Predictions are `Detections`, at most `detections` an image; truth is `instances/truth`, in whose annotations classes
    are numbered by `category_ids`, in the order of the classes. The scores are pycocotools' (`COCOeval`), number by
    number: "box_ap" (the mean over IoU 0.5 to 0.95), "box_ap50", "box_ap75", "box_ap/small", "/medium", "/large",
    "box_ar/1", "/10", "/100", "/small", "/medium", "/large", and "mask_…"; one that is not defined, as no object has such
    a size, is left out. Per class "box_ap" and "mask_ap", NaN for classes without objects.

    The state of a sample: of its detections, best first, padded to `detections`, `classes` (-1 beyond), `scores`,
    `ranks` (place among those of the class), and per kind and area [4, detections] the IoU thresholds (bit 0 is 0.5) at
    which it is a true positive, `box_true`, or counts for nothing, `box_ignored`; `objects` [4, classes] to be found.
    Raises DataError if a truth is of another size or holds other categories, or no object at all is to be found.
    """
    classes = {category: k for k, category in enumerate(category_ids)}

    def observe(prediction: Detections, targets: Mapping[str, Any]) -> States:
        truth = _truth(targets["instances/truth"])
        if truth.size != prediction.size:
            raise DataError(f"the image is {truth.size}, the detections are of {prediction.size}; re-extract the split")
        if unknown := sorted(set(truth.categories) - set(classes)):
            raise DataError(f"an image has objects of category {unknown[0]}, which is none of the split's categories")
        labels = np.array([classes[c] for c in truth.categories], dtype=np.int64)
        return _observed(prediction, truth, labels, len(classes), detections)

    def reduce(states: States, weights: np.ndarray) -> Scores:
        values: dict[str, float] = {}
        per_class: dict[str, np.ndarray] = {}
        for kind in KINDS:
            found = {area: _accumulated(states, kind, area, weights, COUNTS) for area in AREAS}
            values |= {f"{kind}_{name}": v for name, v in _summary(found).items() if v is not None}
            per_class[f"{kind}_ap"] = _class_means(found["all"][0])
        if "box_ap" not in values:
            raise DataError("no object of the evaluation split is to be found; there is nothing to score")
        return Scores(values=values, per_class=per_class)

    def resample(states: States) -> Callable[[np.ndarray], float]:
        curves = list(_curves(states, "box", "all"))

        def box_ap(weights: np.ndarray) -> float:
            precision = np.stack([c.precision(weights) for c in curves], axis=-1)
            if np.isnan(precision).all():
                raise DataError("no object of the drawn samples is to be found; there is nothing to score")
            return float(np.mean(precision[~np.isnan(precision)]))

        return box_ap

    return Metric(primary="box_ap", observe=observe, reduce=reduce, resample=resample)


@dataclass(frozen=True)
class Truth:
    """What is to be found in one image: `boxes` [n, 4] as x, y, width, height; masks as COCO RLE; `crowd` bool [n]."""

    size: tuple[int, int]
    categories: tuple[int, ...]
    boxes: np.ndarray
    masks: tuple[Mapping[str, Any], ...]
    areas: np.ndarray
    crowd: np.ndarray


def _truth(stored: Tensor) -> Truth:
    return _decoded(stored.numpy().tobytes())


@lru_cache(maxsize=32)
def _decoded(text: bytes) -> Truth:
    # Several heads score the same sample one after another; they share the decoded truth.
    record = json.loads(text)
    found = record["annotations"]
    return Truth(
        size=(record["image"]["height"], record["image"]["width"]),
        categories=tuple(a["category_id"] for a in found),
        boxes=np.array([a["bbox"] for a in found], dtype=np.float64).reshape(-1, 4),
        masks=tuple(a["segmentation"] for a in found),
        areas=np.array([a["area"] for a in found], dtype=np.float64),
        crowd=np.array([bool(a["iscrowd"]) for a in found], dtype=bool),
    )


def _observed(found: Detections, truth: Truth, labels: np.ndarray, num_classes: int, limit: int) -> States:
    """The state of one sample; `labels` are the classes of the true objects."""
    scores = found.scores.numpy().astype(np.float64)
    order = np.argsort(-scores, kind="stable")
    assert len(order) <= limit, "a head gives as many detections as it says"
    said = found.labels.numpy()[order]
    boxes = found.boxes.numpy().astype(np.float64)[order]
    boxes[:, 2:] -= boxes[:, :2]
    masks = [{"size": list(found.size), "counts": found.masks[i]} for i in order]
    regions = {
        "box": (boxes, truth.boxes, boxes[:, 2] * boxes[:, 3]),
        "mask": (masks, truth.masks, np.asarray(coco_masks.area(masks) if masks else [], dtype=np.float64)),
    }
    ignored = np.array([truth.crowd | ~_within(truth.areas, area) for area in AREAS.values()])
    state: dict[str, np.ndarray] = {
        "classes": np.full(limit, -1, dtype=np.int16),
        "scores": np.zeros(limit),
        "ranks": np.zeros(limit, dtype=np.int16),
        "objects": np.array([np.bincount(labels[~row], minlength=num_classes) for row in ignored], dtype=np.int32),
    }
    state["classes"][: len(said)], state["scores"][: len(said)] = said, scores[order]
    for kind in KINDS:
        state[f"{kind}_true"] = np.zeros((len(AREAS), limit), dtype=np.uint16)
        state[f"{kind}_ignored"] = np.zeros((len(AREAS), limit), dtype=np.uint16)
    for k in np.unique(said):
        mine, theirs = np.flatnonzero(said == k), np.flatnonzero(labels == k)
        state["ranks"][mine] = np.arange(len(mine))
        for kind, (detected, real, areas) in regions.items():
            of_class = [[what[i] for i in which] for what, which in ((detected, mine), (real, theirs))]
            crowd = truth.crowd[theirs]
            ious = np.zeros((len(mine), len(theirs)))
            if len(theirs):
                ious = np.asarray(coco_masks.iou(*_as_arrays(of_class, kind), crowd.astype(np.uint8).tolist()))
            true, void = match(ious, ignored[:, theirs], crowd)
            beyond = np.array([~_within(areas[mine], area) for area in AREAS.values()])
            # What is matched with nothing and of another size counts for nothing.
            void |= ~true & beyond[:, None]
            bits = (1 << np.arange(len(IOUS)))[None, :, None]
            state[f"{kind}_true"][:, mine] = ((true & ~void) * bits).sum(axis=1)
            state[f"{kind}_ignored"][:, mine] = (void * bits).sum(axis=1)
    return state


def _as_arrays(regions: Sequence[Sequence[Any]], kind: str) -> list[Any]:
    return [np.stack(r) if kind == "box" else list(r) for r in regions]


def _within(areas: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    return (areas >= limits[0]) & (areas <= limits[1])


def match(ious: np.ndarray, ignored: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which detections of a class find an object, and which of those an ignored one: two of bool [A, T, D].

    `ious` [D, G] of detections, best first, with objects; `ignored` [A, G] says for each of A areas which objects are not
    to be found; `crowd` [G] may be found many times. As pycocotools: a detection takes the object that it overlaps most
    of those not taken (of equal ones the last), an ignored one only if there is no other.
    """
    areas, (count, objects) = len(ignored), ious.shape
    thresholds = np.minimum(IOUS, 1 - 1e-10)
    found = np.zeros((areas, len(IOUS), count), dtype=bool)
    void = np.zeros_like(found)
    taken = np.zeros((areas, len(IOUS), objects), dtype=bool)
    if not objects:
        return found, void
    for d in np.flatnonzero(ious.max(axis=1) >= thresholds[0]):
        rank = np.empty(objects, dtype=np.int64)
        rank[np.argsort(ious[d], kind="stable")] = np.arange(objects)
        free = (~taken | crowd) & (ious[d] >= thresholds[:, None])
        value = np.where(free, rank + objects * ~ignored[:, None], -1)
        best = value.argmax(axis=-1)
        a, t = np.nonzero(np.take_along_axis(value, best[..., None], axis=-1)[..., 0] >= 0)
        found[a, t, d] = True
        void[a, t, d] = ignored[a, best[a, t]]
        taken[a, t, best[a, t]] = True
    return found, void


@dataclass(frozen=True)
class Curve:
    """The precision-recall curves of one class, one an IoU threshold, at the detections that are true at any of them.

    Detections that are true nowhere lie between these, and lower the precision of those that follow. `images` [n] of all
    detections, best first; `columns` [P] which are true somewhere, `true` [T, P] at which thresholds; `void_columns` [I],
    `void` [T, I] those that count for nothing somewhere, `before` [P] how many of these stand at or before each column;
    `objects` [N] to be found in each image.
    """

    images: np.ndarray
    columns: np.ndarray
    true: np.ndarray
    void_columns: np.ndarray
    void: np.ndarray
    before: np.ndarray
    objects: np.ndarray

    def precision(self, weights: np.ndarray) -> np.ndarray:
        """Precision at RECALLS, [T, R], of images that count `weights` times; NaN without an object to be found."""
        count = float(self.objects @ weights)
        if not count:
            return np.full((len(IOUS), len(RECALLS)), np.nan)
        precision = np.zeros((len(IOUS), len(RECALLS)))
        if not len(self.columns):
            return precision
        counted = weights[self.images].astype(np.float64)
        hits = np.cumsum(self.true * counted[self.columns], axis=1)
        void = np.zeros((len(IOUS), len(self.void_columns) + 1))
        np.cumsum(self.void * counted[self.void_columns], axis=1, out=void[:, 1:])
        seen = np.cumsum(counted)[self.columns] - void[:, self.before]
        best = np.maximum.accumulate((hits / (seen + np.spacing(1)))[:, ::-1], axis=1)[:, ::-1]
        for t, recall in enumerate(hits / count):
            places = np.searchsorted(recall, RECALLS, side="left")
            reached = places < len(recall)
            precision[t, reached] = best[t, places[reached]]
        return precision

    def recall(self, weights: np.ndarray) -> np.ndarray:
        """Share of the objects that are found at all, [T]; NaN without an object to be found."""
        count = float(self.objects @ weights)
        hits = self.true @ weights[self.images[self.columns]].astype(np.float64)
        return hits / count if count else np.full(len(IOUS), np.nan)


def _curves(states: States, kind: str, area: str, *, count: int = COUNTS[-1]) -> Iterator[Curve]:
    """The curves of all classes in order, of at most `count` detections of a class in an image."""
    number = list(AREAS).index(area)
    image, place = np.nonzero((states["classes"] >= 0) & (states["ranks"] < count))
    labels, scores = states["classes"][image, place], states["scores"][image, place]
    order = np.lexsort((-scores, labels))
    image, place, labels = image[order], place[order], labels[order]
    true, void = (states[f"{kind}_{what}"][image, number, place] for what in ("true", "ignored"))
    objects = states["objects"][:, number]
    ends = np.searchsorted(labels, np.arange(objects.shape[1] + 1))
    bits = np.arange(len(IOUS))[:, None]
    for k in range(objects.shape[1]):
        mine = slice(ends[k], ends[k + 1])
        columns, void_columns = np.flatnonzero(true[mine]), np.flatnonzero(void[mine])
        yield Curve(
            images=image[mine],
            columns=columns,
            true=(true[mine][columns] >> bits & 1).astype(bool),
            void_columns=void_columns,
            void=(void[mine][void_columns] >> bits & 1).astype(bool),
            before=np.searchsorted(void_columns, columns, side="right"),
            objects=objects[:, k],
        )


def _accumulated(
    states: States, kind: str, area: str, weights: np.ndarray, counts: Sequence[int]
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Precision [T, R, K] of an area, and by number of detections the recall [T, K]; NaN for absent classes."""
    curves = list(_curves(states, kind, area))
    precision = np.stack([c.precision(weights) for c in curves], axis=-1)
    wanted = counts if area == "all" else counts[-1:]
    recall = {
        n: np.stack([c.recall(weights) for c in (_curves(states, kind, area, count=n))], axis=-1) for n in wanted
    }
    return precision, recall


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


def _class_means(precision: np.ndarray) -> np.ndarray:
    """Precision [T, R, K] -> its mean for every class, NaN for those without objects."""
    # A class has no object at any threshold, or at all.
    return precision.mean(axis=(0, 1))
