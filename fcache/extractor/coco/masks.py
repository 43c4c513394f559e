"""Masks as COCO's run lengths: pixels column by column, runs of zeros and ones in turn, as numbers or as a text."""

import math
from typing import Any

import numpy as np
from pycocotools import mask as coco_masks

from fcache.cache_spec.errors import DataError

Size = tuple[int, int]
# No picture has a point this far outside; the rasteriser would walk there pixel by pixel.
_FAR = 2.0


def segmentation_rle(segmentation: Any, size: Size) -> bytes:
    """The compressed run lengths of an annotation's `segmentation` in an image of (height, width).

    Polygons, run lengths as a list of numbers, and compressed ones are taken. Raises DataError, saying what is wrong,
    for a polygon with fewer than three points or with points outside the image, and for run lengths of another size.
    """
    if isinstance(segmentation, dict):
        return _from_runs(segmentation, size)
    if not isinstance(segmentation, list) or not segmentation:
        raise DataError("has no segmentation, expected polygons or run lengths (masks are what heads learn from)")
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            numbers = len(polygon) if isinstance(polygon, list) else repr(polygon)
            raise DataError(f"has a polygon of {numbers} numbers, expected x and y of three points or more")
        try:
            points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
        except (TypeError, ValueError):
            raise DataError("has a polygon with something in it that is no number") from None
        if not np.isfinite(points).all():
            raise DataError("has a polygon with a coordinate that is not finite")
        if (points < -_FAR).any() or (points > np.array(size[::-1]) + _FAR).any():
            x, y = points[np.argmax(((points < -_FAR) | (points > np.array(size[::-1]) + _FAR)).any(1))]
            raise DataError(f"has a polygon point ({x:g}, {y:g}) outside the image of {size[1]}x{size[0]} pixels")
    return _text(coco_masks.merge(coco_masks.frPyObjects(segmentation, *size)))


def _from_runs(segmentation: dict[str, Any], size: Size) -> bytes:
    counts = segmentation.get("counts")
    if segmentation.get("size") != list(size):
        raise DataError(f"has run lengths for the size {segmentation.get('size')}, its image has {list(size)}")
    if isinstance(counts, str):
        counts = counts.encode(errors="replace")
    if isinstance(counts, bytes):
        runs = run_lengths(counts)
    elif isinstance(counts, list) and all(type(n) is int for n in counts):
        runs = np.array(counts, dtype=np.int64)
    else:
        raise DataError("has run lengths that are neither a text nor a list of whole numbers")
    if (runs < 0).any() or runs.sum() != size[0] * size[1]:
        raise DataError(f"has run lengths of {runs.sum()} pixels, its image has {size[0] * size[1]}")
    return compress(runs, size)


def run_lengths(counts: bytes) -> np.ndarray:
    """The numbers in compressed run lengths, int64. Raises DataError for a text that is none.

    Each character holds five bits, lowest first, and whether the number goes on; from the fourth number on the
    difference to the one before the last is written.
    """
    codes = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes & 32 == 0)
    if not len(codes):
        return codes
    if codes.min() < 0 or codes.max() > 63 or not len(ends) or ends[-1] != len(codes) - 1:
        raise DataError("has run lengths that are no text of COCO's form")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 8:
        raise DataError("has run lengths that are no text of COCO's form")
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << (5 * place), starts)
    runs -= np.where(codes[ends] & 16, np.int64(1) << (5 * lengths), 0)
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    return runs


def compress(runs: np.ndarray, size: Size) -> bytes:
    """Run lengths as a compressed text."""
    return _text(coco_masks.frPyObjects({"counts": runs.tolist(), "size": list(size)}, *size))


def _text(rle: Any) -> bytes:
    return rle["counts"]


def decode_mask(counts: bytes, size: Size) -> np.ndarray:
    """The mask uint8 [H, W], 0 or 1, of compressed run lengths."""
    runs = run_lengths(counts)
    return np.repeat(np.arange(len(runs), dtype=np.uint8) & 1, runs).reshape(size, order="F")


def mask_area(counts: bytes, size: Size) -> int:
    """The pixels of a mask."""
    return int(coco_masks.area({"counts": counts, "size": list(size)}))


def mask_box(counts: bytes, size: Size) -> tuple[int, int, int, int]:
    """The tight box (top, left, height, width) of a mask; it has no area if the mask is empty."""
    left, top, width, height = (int(n) for n in coco_masks.toBbox({"counts": counts, "size": list(size)}))
    return top, left, height, width


def encode_part(part: np.ndarray, top: int, left: int, size: Size) -> bytes:
    """The compressed run lengths of a mask of `size` that is zero but for `part`, bool [h, w], at (top, left).

    Equal to those of the whole mask; only the part is looked at.
    """
    height, width = part.shape
    edges = np.zeros((width, height + 2), dtype=np.int8)
    edges[:, 1:-1] = part.T
    columns, rows = np.nonzero(np.diff(edges, axis=1))
    # Starts and ends of runs in turn; a run that fills a column to its end touches the next column's.
    places = (columns + left) * size[0] + rows + top
    same = np.flatnonzero(places[1:-1:2] == places[2::2]) * 2 + 1
    places = np.delete(places, np.concatenate([same, same + 1]))
    runs = np.diff(places, prepend=0, append=size[0] * size[1])
    return compress(runs[:-1] if len(places) and runs[-1] == 0 else runs, size)


def most_bytes(crossings: int, objects: int, size: Size) -> int:
    """The most bytes that the compressed run lengths of `objects` masks of `size` take whose columns cross their
    borders `crossings` times: one run more than crossings each, of differences below the number of pixels.
    """
    digits = math.ceil((math.log2(size[0] * size[1]) + 2) / 5)
    return (crossings + 2 * objects) * digits
