"""Detections: what is found in an image, at its original size."""

from dataclasses import dataclass

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
