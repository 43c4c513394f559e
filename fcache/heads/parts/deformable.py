"""Multi-scale deformable attention: every place looks at a few learned places of every level (Deformable DETR)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = tuple[int, int]


def deformable_attention(values: Sequence[Tensor], places: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of values at places: [B, N, M*C] for M attention heads.

    `values` holds a map [B, M, C, H, W] for each of L levels; `places`, [B, N, M, L, P, 2], are (x, y) with (0, 0) the
    upper left corner of every map and (1, 1) the lower right one; `weights` is [B, N, M, L, P]. Values are bilinear
    between pixel centres, and zero outside.
    """
    batch, count, heads = weights.shape[:3]
    grids = (2 * places - 1).transpose(1, 2).flatten(0, 1)
    shares = weights.transpose(1, 2).flatten(0, 1)[:, None]
    # Level by level: the samples of all levels at once would be needed twice, apart and together.
    total: Tensor | None = None
    for level, value in enumerate(values):
        found = F.grid_sample(
            value.flatten(0, 1), grids[:, :, level], mode="bilinear", padding_mode="zeros", align_corners=False
        )
        part = (found * shares[:, :, :, level]).sum(-1)
        total = part if total is None else total + part
    assert total is not None
    return total.view(batch, heads * values[0].shape[2], count).transpose(1, 2)


@dataclass(frozen=True)
class Places:
    """The pixels of L levels of `sizes` (height, width), one level after another, row by row.

    `centres` [N, 2] are their (x, y) in fractions of the extent, `extents` [L, 2] the levels' (width, height).
    """

    sizes: tuple[Size, ...]
    centres: Tensor
    extents: Tensor


def places_of(sizes: Sequence[Size], *, device: torch.device, dtype: torch.dtype) -> Places:
    """The places of levels of `sizes`. Filled on the device: a copy from the host would wait for all it has to do."""
    found = []
    for height, width in sizes:
        y = (torch.arange(height, device=device, dtype=dtype) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=dtype) + 0.5) / width
        found.append(torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).flatten(0, 1))
    sides = [torch.full((), n, device=device, dtype=dtype) for size in sizes for n in reversed(size)]
    return Places(tuple(sizes), torch.cat(found), torch.stack(sides).view(-1, 2))


class DeformableAttention(nn.Module):
    """Deformable self-attention over the places of several levels, P samples a head and level.

    It begins as the original does: samples of head m lie 1, 2, … P pixels away in direction m of a ring, equally
    weighted.
    """

    def __init__(self, width: int, *, heads: int, levels: int, points: int = 4) -> None:
        super().__init__()
        self.shape = (heads, levels, points)
        self.offsets = nn.Linear(width, heads * levels * points * 2)
        self.weights = nn.Linear(width, heads * levels * points)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        angle = torch.arange(heads) * (2 * math.pi / heads)
        ring = torch.stack([angle.cos(), angle.sin()], dim=-1)
        ring = ring / ring.abs().max(dim=-1, keepdim=True).values
        steps = torch.arange(1, points + 1, dtype=ring.dtype)
        with torch.no_grad():
            self.offsets.bias.copy_((ring[:, None, None] * steps[:, None]).expand(*self.shape, 2).flatten())
        for zero in (self.offsets.weight, self.weights.weight, self.weights.bias, self.value.bias, self.out.bias):
            nn.init.zeros_(zero)
        for linear in (self.value, self.out):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor, positions: Tensor, places: Places) -> Tensor:
        """[B, N, width] at N places -> [B, N, width]; `positions` [N, width] say where and of which level one is."""
        heads, levels, points = self.shape
        batch, count, width = x.shape
        queries = x + positions
        offsets = self.offsets(queries).view(batch, count, heads, levels, points, 2)
        sampled = places.centres[:, None, None, None] + offsets / places.extents[:, None]
        weights = self.weights(queries).view(batch, count, heads, levels * points).softmax(dim=-1)
        values = [
            v.transpose(1, 2).reshape(batch, heads, width // heads, *size)
            for v, size in zip(self.value(x).split([h * w for h, w in places.sizes], dim=1), places.sizes, strict=True)
        ]
        return self.out(deformable_attention(values, sampled, weights.view(batch, count, *self.shape)))


class DeformableBlock(nn.Module):
    """Deformable attention and a perceptron of one hidden layer, each added to its input and then normalised."""

    def __init__(self, width: int, *, heads: int, levels: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = DeformableAttention(width, heads=heads, levels=levels)
        self.attention_norm = nn.LayerNorm(width)
        self.expand, self.contract = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.expand, self.contract):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor, positions: Tensor, places: Places) -> Tensor:
        """As `DeformableAttention`."""
        x = self.attention_norm(x + self.dropout(self.attention(x, positions, places)))
        return self.norm(x + self.dropout(self.contract(self.dropout(F.relu(self.expand(x))))))
