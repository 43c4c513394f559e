"""Objects in a view: boxes and masks under the view's own map."""

import json
from collections.abc import Sequence

import numpy as np

from fcache.cache_spec.errors import SpecError
from fcache.cache_spec.targets import pack_masks
from fcache.cache_spec.view import transform_points
from fcache.extractor.coco import Bounds, decode_mask, encode_part, mask_box, most_bytes
from fcache.extractor.datasets import Instances
from fcache.extractor.views.drawn import Drawn
from fcache.extractor.views.frames import largest_scale
from fcache.extractor.views.looks import RandAugment
from fcache.extractor.views.nearest import indices
from fcache.extractor.views.recipes import AnyCut

Size = tuple[int, int]
# An object is cut where its box lies outside the view by more pixels than arithmetic explains.
_ROUNDING = 1e-3
# JSON of an annotation without its mask: names, a box and an area of full precision, ids, sizes.
_RECORD_BYTES = 512
_NOT_STRAIGHT = "boxes and masks are cut from views that are scaled, cropped and flipped, not rotated or sheared"


def view_instances(found: Instances, drawn: Drawn, canvas: Size, role: str) -> dict[str, np.ndarray]:
    """The arrays of "instances" for the view that `drawn` describes, see `cache_spec.targets`.

    The view's mask is the image's, at the pixel nearest to each of the view's. A box is the annotated one, moved; of an
    object that the view cuts it is drawn anew round what is left of the mask. Objects of which less than one pixel of
    mask, or one pixel of the box's width or height, is in the view are left out.
    Raises SpecError for a view that is more than scaled, cropped and flipped.
    """
    if any(step.name == "warp" for step in drawn.steps):
        raise SpecError(_NOT_STRAIGHT)
    corners = transform_points(drawn.matrix, found.boxes.reshape(-1, 2, 2))
    limits = np.array(drawn.frame.valid[::-1], dtype=np.float64)
    whole = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    boxes = np.clip(whole, 0, np.tile(limits, 2))
    cut = np.any(np.abs(whole - boxes) > _ROUNDING, axis=1)
    kept = np.flatnonzero(((boxes[:, 2:] - boxes[:, :2]) >= 1).all(axis=1))
    rows, columns = indices(drawn.frame, 0), indices(drawn.frame, 1)
    parts = [_part(found, i, rows, columns, drawn.frame.flipped) for i in kept.tolist()]
    seen = [k for k, (part, _, _) in enumerate(parts) if part.any()]
    kept, parts = kept[seen], [parts[k] for k in seen]
    for i, part in zip(kept.tolist(), parts, strict=True):
        if cut[i]:
            boxes[i] = _box_around(*part)
    arrays = {
        "instances/boxes": boxes[kept].astype(np.float32),
        "instances/labels": found.labels[kept],
        "instances/crowd": found.crowd[kept],
        "instances/area": np.array([np.count_nonzero(part) for part, _, _ in parts], dtype=np.float32),
        "instances/ids": found.ids[kept],
        **pack_masks([encode_part(*part, canvas) for part in parts]),
    }
    if role == "evaluation":
        text = json.dumps(found.record, separators=(",", ":"))
        arrays["instances/truth"] = np.frombuffer(text.encode(), dtype=np.uint8)
    return arrays


def _part(
    found: Instances, number: int, rows: np.ndarray, columns: np.ndarray, flipped: bool
) -> tuple[np.ndarray, int, int]:
    """One mask in the view, [h, w] of 0 and 1: the part where it lies, its top and its left."""
    counts = found.masks[number]
    top, left, height, width = mask_box(counts, found.size)
    first, last = np.searchsorted(rows, [top, top + height]).tolist()
    start, stop = np.searchsorted(columns, [left, left + width]).tolist()
    if first == last or start == stop:
        return np.zeros((0, 0), dtype=np.uint8), 0, 0
    part = decode_mask(counts, found.size)[np.ix_(rows[first:last], columns[start:stop])]
    if flipped:
        part, start = part[:, ::-1], len(columns) - stop
    return part, first, start


def _box_around(part: np.ndarray, top: int, left: int) -> tuple[int, int, int, int]:
    """(x0, y0, x1, y1) round the pixels of a mask that has some."""
    rows, columns = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
    return left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1


def instance_limits(bounds: Sequence[Bounds], cut: AnyCut, canvas: Size, role: str) -> dict[str, int]:
    """Maxima of the arrays of "instances" for images of these bounds, in every view that `cut` can draw.

    Raises SpecError for a cut that rotates and shears.
    """
    if any(isinstance(look, RandAugment) for look in cut.looks):
        raise SpecError(_NOT_STRAIGHT + "; take a view recipe without RandAugment, such as coco-lsj")
    objects = max(b.objects for b in bounds)
    # A column of pixels of the image is at most so many columns of the view, and each has no more borders.
    runs = [(int(largest_scale(cut.place, b.size)) + 1) * b.crossings for b in bounds]
    limits = {
        "instances": max(1, objects),
        "instances_rle_bytes": max(most_bytes(n, b.objects, canvas) for n, b in zip(runs, bounds, strict=True)),
    }
    if role == "evaluation":
        # A character of run lengths may be a backslash, which is two in JSON.
        limits["instances_truth_bytes"] = max(
            _RECORD_BYTES * (1 + b.objects) + 2 * most_bytes(b.crossings, b.objects, b.size) for b in bounds
        )
    return limits
