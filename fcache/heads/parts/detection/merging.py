"""From what a detector says about views of an image to its detections there: boxes moved back, masks pasted."""

from collections.abc import Sequence

import numpy as np
import torch
from pycocotools import mask as coco_masks
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image

from fcache.cache_spec import View
from fcache.heads.detections import Detections
from fcache.heads.head import Options
from fcache.heads.parts.detection.boxes import Found


def merge_detections(outputs: Sequence[Found], views: Sequence[View], options: Options) -> Detections:
    """`Head.merge` of detectors: the detections of one image, on the CPU.

    Those of several views are put together, and of a class those that overlap a better one by more than
    `nms_threshold` are left out; each keeps the mask that its own view gave it.
    """
    size = views[0].image_size
    moved = [_in_image(output, view) for output, view in zip(outputs, views, strict=True)]
    boxes, scores, labels, masks = (torch.cat(parts) for parts in zip(*moved, strict=True))
    if len(views) > 1:
        best = batched_nms(boxes, scores, labels, options["nms_threshold"])[: options["detections"]]
        boxes, scores, labels, masks = boxes[best], scores[best], labels[best], masks[best]
    encoded = encode_masks([pasted(m, b, size) for m, b in zip(masks.numpy(), boxes.numpy(), strict=True)], size)
    return Detections(boxes=boxes, scores=scores, labels=labels, masks=encoded, size=size)


def _in_image(found: Found, view: View) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes, scores, labels and masks of a view, the boxes in pixels of the image and clipped to it, on the CPU."""
    (scale_x, skew_x, shift_x), (skew_y, scale_y, shift_y) = view.to_image.tolist()
    assert skew_x == skew_y == 0, "views turn nothing"
    scales = torch.tensor([scale_x, scale_y, scale_x, scale_y])
    corners = found.boxes.detach().float().cpu() * scales + torch.tensor([shift_x, shift_y, shift_x, shift_y])
    first, second = corners[:, :2], corners[:, 2:]
    boxes = torch.cat([torch.minimum(first, second), torch.maximum(first, second)], dim=1)
    mirrored = [axis for axis, scale in ((2, scale_x), (1, scale_y)) if scale < 0]
    masks = found.masks.detach().float().cpu().flip(mirrored)
    return clip_boxes_to_image(boxes, view.image_size), found.scores.detach().float().cpu(), found.labels.cpu(), masks


def pasted(mask: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, int, int]:
    """The pixels of an image of `size` that a mask [M, M] of a box (x0, y0, x1, y1) covers: bool [h, w], top and left.

    A pixel is covered where the mask, sampled bilinearly at its centre, is 0.5 or more; beyond the outermost cells it
    falls to 0, as in Detectron2 and mmdetection.
    """
    left, top = (max(0, int(np.floor(v))) for v in box[:2])
    right, bottom = (min(limit, int(np.ceil(v))) for v, limit in zip(box[2:], (size[1], size[0]), strict=True))
    across = _weights(left, right, float(box[0]), float(box[2]), mask.shape[1])
    down = _weights(top, bottom, float(box[1]), float(box[3]), mask.shape[0])
    return down @ mask.astype(np.float32) @ across.T >= 0.5, top, left


def _weights(first: int, last: int, start: float, end: float, cells: int) -> np.ndarray:
    """How much each of `cells` cells between `start` and `end` counts at the pixels' centres: [last - first, cells]."""
    places = (np.arange(first, max(first, last)) + 0.5 - start) * (cells / max(end - start, 1e-6)) - 0.5
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(cells))).astype(np.float32)


def encode_masks(parts: Sequence[tuple[np.ndarray, int, int]], size: tuple[int, int]) -> tuple[bytes, ...]:
    """Masks in an image of `size` (height, width), each as its part bool [h, w] and where its top left lies, as
    compressed COCO RLE. Only the parts are looked at, which is much faster than encoding whole images.
    """
    height, width = size
    runs = [{"size": [height, width], "counts": _counts(*part, size)} for part in parts]
    if not runs:
        return ()
    return tuple(r["counts"] for r in coco_masks.frPyObjects(runs, height, width))  # type: ignore[arg-type,call-overload]


def _counts(part: np.ndarray, top: int, left: int, size: tuple[int, int]) -> list[int]:
    """Lengths of the runs of 0 and 1 in turn, column by column."""
    edges = np.diff(np.pad(part.astype(np.int8), ((1, 1), (0, 0))), axis=0).T
    column, row = np.nonzero(edges)
    # In every column starts and ends alternate; those of a run that reaches the bottom and of one that goes on at the
    # top of the next column meet, and are no ends.
    places = (column + left) * size[0] + row + top
    meets = places[:-1] == places[1:]
    kept = np.ones(len(places), dtype=bool)
    kept[:-1] &= ~meets
    kept[1:] &= ~meets
    counts = np.diff(places[kept], prepend=0, append=size[0] * size[1]).tolist()
    return counts if counts[-1] else counts[:-1]
