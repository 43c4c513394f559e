"""Sine positions: where a place of a map is, as waves of many lengths."""

import math

import torch
from torch import Tensor


def sine_positions(size: tuple[int, int], width: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Positions [H*W, width] of a map of `size` (height, width), row by row, as DETR and Mask2Former have them.

    The first half of the channels is of the row, the second of the column, each counted from 1 and scaled to 2 pi;
    sine and cosine alternate, and the wave length grows from 2 pi to 10000 times as much. `width` is a multiple of 4.
    """
    channels = width // 2
    index = torch.arange(channels, device=device, dtype=torch.int64).to(dtype)
    lengths = 10000 ** (2 * torch.div(index, 2, rounding_mode="floor") / channels)
    rows, columns = (_waves(extent, lengths) for extent in size)
    both = torch.cat([rows[:, None].expand(*size, channels), columns[None].expand(*size, channels)], dim=-1)
    return both.flatten(0, 1)


def _waves(extent: int, lengths: Tensor) -> Tensor:
    """[extent, C]: sine in even channels, cosine in odd ones."""
    place = torch.arange(1, extent + 1, device=lengths.device, dtype=lengths.dtype)
    angles = (place / (extent + 1e-6) * (2 * math.pi))[:, None] / lengths
    return torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=-1).flatten(1)
