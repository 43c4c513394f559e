"""Attention of several heads."""

import math

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Attention of several heads, initialised as torch's own with one Xavier matrix for queries, keys and values."""

    def __init__(self, width: int, *, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.drop = heads, dropout
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        for linear in (self.query, self.key, self.value, self.out):
            # [3 width, width] has twice the fans' sum of [width, width].
            nn.init.xavier_uniform_(linear.weight, gain=1.0 if linear is self.out else math.sqrt(0.5))
            nn.init.zeros_(linear.bias)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, Q, width], keys and values [B, N, width] -> [B, Q, width].

        `mask` is [B, Q, N], or with an axis of attention heads [B, heads, Q, N], B and heads may be 1: bool says which
        keys a query looks at, numbers are added to its scores.
        """
        q, k, v = (
            linear(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for linear, x in ((self.query, queries), (self.key, keys), (self.value, values))
        )
        if mask is not None and mask.ndim == 3:
            mask = mask[:, None]
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.drop if self.training else 0.0)
        return self.out(found.transpose(1, 2).flatten(2))
