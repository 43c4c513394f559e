"""Precision and recall over many images, as COCO's evaluation accumulates them, with images counted many times."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fcache.heads.coco.matching import AREAS, IOUS
from fcache.heads.metrics import States

RECALLS = np.linspace(0.0, 1.0, 101)
# How many detections of a class in an image count, at most; the last is that of all scores but the recalls named by it.
COUNTS = (1, 10, 100)


@dataclass(frozen=True)
class Curve:
    """The precision-recall curves of one class, one an IoU threshold, at the detections that are true at any of them.

    Detections that are true nowhere lie between these, and lower the precision of those that follow. `images` [n] of
    all detections, best first; `columns` [P] which are true somewhere, `true` [T, P] at which thresholds;
    `void_columns` [I], `void` [T, I] those that count for nothing somewhere, `before` [P] how many of these stand at or
    before each column; `objects` [N] to be found in each image.
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


def curves_of(states: States, kind: str, area: str, *, count: int = COUNTS[-1]) -> Iterator[Curve]:
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


def accumulated(
    states: States, kind: str, area: str, weights: np.ndarray, counts: Sequence[int]
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Precision [T, R, K] of an area, and by number of detections the recall [T, K]; NaN for absent classes."""
    curves = list(curves_of(states, kind, area))
    precision = np.stack([c.precision(weights) for c in curves], axis=-1)
    wanted = counts if area == "all" else counts[-1:]
    recall = {
        n: np.stack([c.recall(weights) for c in (curves_of(states, kind, area, count=n))], axis=-1) for n in wanted
    }
    return precision, recall
