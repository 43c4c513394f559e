"""Which detections of an image are right, as COCO's evaluation matches them: the state of one sample."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from pycocotools import mask as coco_masks
from torch import Tensor

from fcache.heads.detections import Detections
from fcache.heads.metrics import States

IOUS = np.linspace(0.5, 0.95, 10)
# Areas in pixels of the image, both ends included.
AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
KINDS = ("box", "mask")


@dataclass(frozen=True)
class Truth:
    """What is to be found in one image: `boxes` [n, 4] as x, y, width, height; masks as COCO RLE; `crowd` bool [n]."""

    size: tuple[int, int]
    categories: tuple[int, ...]
    boxes: np.ndarray
    masks: tuple[Mapping[str, Any], ...]
    areas: np.ndarray
    crowd: np.ndarray


def decode_objects(stored: Tensor) -> Truth:
    """What `instances/truth` holds (uint8 [n])."""
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


def observe_image(found: Detections, truth: Truth, labels: np.ndarray, num_classes: int, limit: int) -> States:
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
        "mask": (masks, truth.masks, _mask_areas(masks)),
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


def _mask_areas(masks: list[Any]) -> np.ndarray:
    return np.asarray(coco_masks.area(masks) if masks else [], dtype=np.float64)  # type: ignore[arg-type]


def _as_arrays(regions: Sequence[Sequence[Any]], kind: str) -> list[Any]:
    return [np.stack(r) if kind == "box" else list(r) for r in regions]


def _within(areas: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    return (areas >= limits[0]) & (areas <= limits[1])


def match(ious: np.ndarray, ignored: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which detections of a class find an object, and which of those an ignored one: two of bool [A, T, D].

    `ious` [D, G] of detections, best first, with objects; `ignored` [A, G] says for each of A areas which objects are
    not to be found; `crowd` [G] may be found many times. As pycocotools: a detection takes the object that it overlaps
    most of those not taken (of equal ones the last), an ignored one only if there is no other.
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
