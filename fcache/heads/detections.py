"""Detections: what is found in an image, at its original size; and masks as COCO stores them."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as coco_masks
from torch import Tensor


@dataclass(frozen=True)
class Detections:
    """What a detector finds in one image, best first, on the CPU.

    `boxes` float32 [n, 4] as x0, y0, x1, y1 in pixels of the image, continuous coordinates (pixel centres at half
    integers); `scores` float [n]; `labels` int64 [n], class numbers from 0 on; `masks` compressed COCO RLE strings of
    masks of the image's `size` (height, width).
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: tuple[bytes, ...]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.scores)


def decode_masks(encoded: Sequence[bytes], size: tuple[int, int]) -> np.ndarray:
    """Masks uint8 [n, H, W] of 0 and 1, of compressed COCO RLE strings of masks of `size` (height, width)."""
    if not encoded:
        return np.zeros((0, *size), dtype=np.uint8)
    with warnings.catch_warnings():
        # pycocotools asks numpy for an array in a way that numpy has given up.
        warnings.simplefilter("ignore", DeprecationWarning)
        masks = coco_masks.decode([{"size": list(size), "counts": counts} for counts in encoded])  # type: ignore[arg-type]
    return np.ascontiguousarray(masks.transpose(2, 0, 1))
