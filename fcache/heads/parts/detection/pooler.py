"""Pooling of regions of interest from the maps of a pyramid."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

# A box of this many cells a side of a level is pooled from it, and from the next coarser one if it is twice as large:
# boxes of 224 pixels from stride 16, as the FPN paper has it.
CELLS = 14


class AlignedPooler(nn.Module):
    """RoIAlign from the level that fits a box, pixel centres at half-integers, as many samples a cell as it has places.

    This is Detectron2's and mmdetection's; torchvision's pooler is half a cell off (it takes centres at integers) and
    samples two points a direction. `strides` are those of the maps, from fine to coarse.
    """

    def __init__(self, strides: Sequence[float]) -> None:
        super().__init__()
        self.strides = tuple(strides)

    def forward(self, maps: Sequence[Tensor], boxes: Sequence[Tensor], size: int) -> Tensor:
        """Maps [B, C, H_i, W_i], of B images the boxes [n_b, 4] (input pixels) -> [sum n_b, C, size, size], float32."""
        rois = with_image(boxes)
        places = self.levels_of(rois[:, 1:])
        pooled = maps[0].new_zeros((len(rois), maps[0].shape[1], size, size), dtype=torch.float32)
        with torch.autocast(maps[0].device.type, enabled=False):
            for i, (x, stride) in enumerate(zip(maps, self.strides, strict=True)):
                chosen = torch.where(places == i)[0]
                found = roi_align(x.float(), rois[chosen], size, 1 / stride, 0, aligned=True)
                pooled = pooled.index_put((chosen,), found)
        return pooled

    def levels_of(self, boxes: Tensor) -> Tensor:
        """The level, int64 [n], that each box [n, 4] is pooled from."""
        sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0).sqrt()
        # A side of exactly 14 cells must not fall below them by rounding.
        fitting = sides / CELLS * (1 + 1e-6)
        strides = torch.tensor(self.strides, dtype=fitting.dtype, device=fitting.device)
        return (torch.bucketize(fitting, strides, right=True) - 1).clamp(min=0)


def with_image(boxes: Sequence[Tensor]) -> Tensor:
    """Boxes of several images, [n_b, 4] each, as rows (number of the image, x0, y0, x1, y1)."""
    numbers = [torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)]
    return torch.cat([torch.cat(numbers), torch.cat(list(boxes))], dim=1)
