"""Attention over clips: maps [B, T, H, W, C], channels last, along time, over everything or within windows."""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcache.cache_spec import LevelSpec
from fcache.heads.parts.attention import Attention

Extents = tuple[int, int, int]


def clip_maps(features: Mapping[str, Tensor], level: LevelSpec) -> Tensor:
    """A level of a batch as [B, T, H, W, C]; axes that it lacks have one place."""
    x, dims = features[level.name], level.dims.split()
    x = x.permute(0, *(1 + dims.index(d) for d in "THWC" if d in dims))
    for axis, d in enumerate("THW", start=1):
        if d not in dims:
            x = x.unsqueeze(axis)
    return x


class OverTime(nn.Module):
    """Attention over the frames of a clip, at every position apart."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads=heads, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H, W, C] -> the same."""
        by_position = x.permute(0, 2, 3, 1, 4)
        frames = by_position.flatten(0, 2)
        return self.attention(frames, frames, frames).view(by_position.shape).permute(0, 3, 1, 2, 4)


class OverAll(nn.Module):
    """Attention over all positions of all frames of a clip."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads=heads, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H, W, C] -> the same."""
        places = x.flatten(1, 3)
        return self.attention(places, places, places).view(x.shape)


class OverWindows(nn.Module):
    """Attention within windows of (frames, rows, columns), with a learned bias for every offset (Video Swin).

    With `shifted` windows begin half a window later along every axis that has more than one, and what the shift wraps
    round an end is not seen from the other one. An axis shorter than its window is one window; maps are padded at
    their ends to whole windows, and padding is not seen.
    """

    def __init__(self, width: int, *, heads: int, window: Extents, shifted: bool) -> None:
        super().__init__()
        self.attention = Attention(width, heads=heads, dropout=0.0)
        self.window, self.shifted = window, shifted
        self.biases = nn.Parameter(torch.empty(heads, math.prod(2 * n - 1 for n in window)))
        nn.init.trunc_normal_(self.biases, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H, W, C] -> the same."""
        _, t, h, w, _ = x.shape
        size = _each(min, (t, h, w), self.window)
        shift = _each(lambda n, s: s // 2 if self.shifted and s < n else 0, (t, h, w), size)
        padded = _each(lambda n, s: -(-n // s) * s, (t, h, w), size)
        x = F.pad(x, (0, 0, 0, padded[2] - w, 0, padded[1] - h, 0, padded[0] - t))
        x = x.roll([-n for n in shift], (1, 2, 3))
        # [B, windows, places, windows, places, windows, places, C], then windows in front.
        x = x.unflatten(3, (-1, size[2])).unflatten(2, (-1, size[1])).unflatten(1, (-1, size[0]))
        x = x.permute(1, 3, 5, 0, 2, 4, 6, 7)
        windows = x.flatten(4, 6).flatten(0, 2)
        x = self._attended(windows, size, _regions((t, h, w), padded, size, shift)).view(x.shape)
        x = x.permute(3, 0, 4, 1, 5, 2, 6, 7).flatten(5, 6).flatten(3, 4).flatten(1, 2)
        return x.roll(shift, (1, 2, 3))[:, :t, :h, :w]

    def _attended(self, windows: Tensor, size: Extents, regions: Tensor) -> Tensor:
        """Windows [K, B, N, C] -> the same; places see those of their region, int [K, N] on the CPU."""
        bias = self._bias(size).to(windows.dtype)
        if bool((regions == regions[:, :1]).all()):
            x = windows.flatten(0, 1)
            return self.attention(x, x, x, bias).view(windows.shape)
        # One by one: a mask for all would be of the size of all scores.
        hidden = (regions[:, :, None] != regions[:, None]).to(windows.device)
        masks = (bias.masked_fill(apart, float("-inf")) for apart in hidden)
        return torch.stack([self.attention(x, x, x, mask) for x, mask in zip(windows, masks, strict=True)])

    def _bias(self, size: Extents) -> Tensor:
        """The biases of the pairs of places of a window, [1, heads, N, N]."""
        axes = [torch.arange(n, device=self.biases.device) for n in size]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
        offsets = places[:, None] - places
        index = torch.zeros_like(offsets[:, :, 0])
        for axis, n in enumerate(self.window):
            index = index * (2 * n - 1) + offsets[:, :, axis] + n - 1
        return self.biases[:, index][None]


def _each(make: Callable[[int, int], int], ns: Extents, sizes: Extents) -> Extents:
    first, second, third = (make(n, s) for n, s in zip(ns, sizes, strict=True))
    return first, second, third


def _regions(extents: Extents, padded: Extents, size: Extents, shift: Extents) -> Tensor:
    """For every window its places' regions, int [K, N]: along each axis as it is, wrapped round, or padding."""
    ids = torch.zeros(padded, dtype=torch.int64)
    for axis, (n, p, s) in enumerate(zip(extents, padded, shift, strict=True)):
        source = (torch.arange(p) + s) % p
        of_axis = torch.where(source >= n, 2, (torch.arange(p) >= p - s).long())
        ids = 3 * ids + of_axis.view([-1 if i == axis else 1 for i in range(3)])
    ids = ids.unflatten(2, (-1, size[2])).unflatten(1, (-1, size[1])).unflatten(0, (-1, size[0]))
    return ids.permute(0, 2, 4, 1, 3, 5).flatten(3, 5).flatten(0, 2)
