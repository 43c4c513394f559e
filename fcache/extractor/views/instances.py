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
# JSON of an annotation without its mask: names, a box and an area of full precision, ids, sizes.
_RECORD_BYTES = 512
_NOT_STRAIGHT = "boxes and masks are cut from views that are scaled, cropped and flipped, not rotated or sheared"


def view_instances(found: Instances, drawn: Drawn, canvas: Size, role: str) -> dict[str, np.ndarray]:
    """The arrays of "instances" for the view that `drawn` describes, see `cache_spec.targets`.

    The view's mask is the image's, at the pixel nearest to each of the view's. Objects of which less than one pixel of
    mask, or one pixel of the box's width or height, is in the view are left out.
    Raises SpecError for a view that is more than scaled, cropped and flipped.
    """
    if any(step.name == "warp" for step in drawn.steps):
        raise SpecError(_NOT_STRAIGHT)
    corners = transform_points(drawn.matrix, found.boxes.reshape(-1, 2, 2))
    limits = np.array(drawn.frame.valid[::-1], dtype=np.float64)
    low, high = (np.clip(corner, 0, limits) for corner in (corners.min(axis=1), corners.max(axis=1)))
    boxes = np.concatenate([low, high], axis=1).astype(np.float32)
    kept = np.flatnonzero(((boxes[:, 2:] - boxes[:, :2]) >= 1).all(axis=1))
    rows, columns = indices(drawn.frame, 0), indices(drawn.frame, 1)
    masks = [_mask(found, i, rows, columns, drawn.frame.flipped, canvas) for i in kept.tolist()]
    seen = [k for k, (area, _) in enumerate(masks) if area]
    kept = kept[seen]
    arrays = {
        "instances/boxes": boxes[kept],
        "instances/labels": found.labels[kept],
        "instances/crowd": found.crowd[kept],
        "instances/area": np.array([masks[k][0] for k in seen], dtype=np.float32),
        "instances/ids": found.ids[kept],
        **pack_masks([masks[k][1] for k in seen]),
    }
    if role == "evaluation":
        text = json.dumps(found.record, separators=(",", ":"))
        arrays["instances/truth"] = np.frombuffer(text.encode(), dtype=np.uint8)
    return arrays


def _mask(
    found: Instances, number: int, rows: np.ndarray, columns: np.ndarray, flipped: bool, canvas: Size
) -> tuple[int, bytes]:
    """Pixels and run lengths of one mask in the view; only the part where it lies is looked at."""
    counts = found.masks[number]
    top, left, height, width = mask_box(counts, found.size)
    first, last = np.searchsorted(rows, [top, top + height]).tolist()
    start, stop = np.searchsorted(columns, [left, left + width]).tolist()
    if first == last or start == stop:
        return 0, b""
    part = decode_mask(counts, found.size)[np.ix_(rows[first:last], columns[start:stop])]
    if flipped:
        part, start = part[:, ::-1], len(columns) - stop
    return int(np.count_nonzero(part)), encode_part(part, first, start, canvas)


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
