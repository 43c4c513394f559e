"""Attention of Swin V2 with frozen weights: timm's numbers, without what timm computes again in every forward.

- The position network runs once, in float32, over the differences of positions that a window has. Windows of few tokens
  keep the bias of every pair of tokens; that of larger ones (half a gigabyte a block for 40 x 40 tokens and 64 heads)
  is read off the table for some heads at a time.
- Tokens go to their windows and back by one gather each. Windows are ordered by the part of the shift mask that they
  meet, of which there are four: no mask is kept for single windows.
- In strict float32 windows of up to 16 x 16 tokens are computed step by step as timm does, to the bit. All others go
  through torch's fused attention, within 1e-6 of timm's in float32.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn
from torch.nn import functional as F

from fcache.extractor.backbones.products import has_bf16_products, rounded_linear

# Part of the fingerprint: grows when equal inputs give other numbers.
REVISION = 1
# In strict float32, windows of up to so many tokens are computed as timm does.
STEPWISE_TOKENS = 256
# Bytes of a block's bias that are kept, of the bias of some heads that is made for one product, and of the scores of
# some windows that are in work at once: those of a CPU stay in its cache.
_KEPT_BYTES = 4 << 20
_BIAS_BYTES = {"cpu": 32 << 20}
_SCORE_BYTES = {"cpu": 2 << 20}
_OTHER_BYTES = 1 << 30
_MASKED = -100.0

Size = tuple[int, int]


def prepare_attention(model: nn.Module, precision: str) -> None:
    """Compute what the Swin V2 blocks of `model`, whose weights are there, attend with; no other model changes.

    It takes the place of timm's buffers, which need not be filled: position indices and masks of large windows take
    gigabytes. `precision` is "bf16" or "fp32".
    """
    coordinates: dict[Any, Tensor] = {}
    for block in model.modules():
        if type(block) is SwinTransformerV2Block:
            swin: Any = block
            layer = swin.attn
            key = (layer.window_size, layer.pretrained_window_size)
            if key not in coordinates:
                device = layer.qkv.weight.device
                coordinates[key] = layer._make_pair_wise_relative_positions(device, torch.float32)[0]
            swin._attn = functools.partial(_attend, _frozen(swin, coordinates[key], precision))
            for owner, name in ((layer, "relative_coords_table"), (layer, "relative_position_index")):
                setattr(owner, name, None)
            layer.k_bias = swin.attn_mask = None
            layer.init_non_persistent_buffers = swin.init_non_persistent_buffers = None


def product_weights(model: nn.Module) -> frozenset[str]:
    """The parameters that only matrix products of a Swin V2 read, apart from its position networks; none of others."""
    if not any(type(block) is SwinTransformerV2Block for block in model.modules()):
        return frozenset()
    linear = (name for name, layer in model.named_modules() if type(layer) is nn.Linear)
    return frozenset(f"{name}.weight" for name in linear if "cpb_mlp" not in name)


@dataclass(frozen=True)
class _Frozen:
    """What one block attends with.

    `table` is the bias for every difference of positions, [heads, 2h-1, 2w-1] with both axes turned round; `bias`
    [heads, N, N] is that of all pairs of a window's N tokens, if it is kept. `products` is the type of the products of
    queries, keys and values.
    """

    layer: Any
    window: Size
    shift: Size
    heads: int
    scale: Tensor
    qkv_bias: Tensor
    table: Tensor
    bias: Tensor | None
    products: torch.dtype
    rounded: bool
    stepwise: bool

    @property
    def tokens(self) -> int:
        return self.window[0] * self.window[1]


def _frozen(block: Any, coordinates: Tensor, precision: str) -> _Frozen:
    layer, heads = block.attn, block.attn.num_heads
    window = (int(block.window_size[0]), int(block.window_size[1]))
    raw = layer.cpb_mlp(coordinates).view(2 * window[0] - 1, 2 * window[1] - 1, heads)
    raw = raw.permute(2, 0, 1).flip((1, 2)).contiguous()
    table = 16 * torch.sigmoid(raw)
    fused = precision == "bf16" and has_bf16_products(table.device)
    products = torch.bfloat16 if fused else torch.float32
    if fused:
        # A softmax does not see what is added to all of its scores; around zero bfloat16 is finest.
        table = (table - 8).to(products)
    tokens = window[0] * window[1]
    stepwise = precision == "fp32" and tokens <= STEPWISE_TOKENS
    bias = None
    if stepwise:
        # In timm's order: the last bit of a sigmoid may depend on where in memory its number lies.
        bias = 16 * torch.sigmoid(pair_bias(raw, window))
    elif heads * tokens * tokens * table.element_size() <= _KEPT_BYTES:
        bias = pair_bias(table, window)
    q_bias, v_bias = layer.q_bias.float(), layer.v_bias.float()
    return _Frozen(
        layer=layer,
        window=window,
        shift=(int(block.shift_size[0]), int(block.shift_size[1])),
        heads=heads,
        scale=torch.clamp(layer.logit_scale.float(), max=math.log(1 / 0.01)).exp(),
        qkv_bias=torch.cat((q_bias, torch.zeros_like(q_bias), v_bias)),
        table=table,
        bias=bias,
        products=products,
        rounded=precision == "bf16" and not fused,
        stepwise=stepwise,
    )


def pair_bias(table: Tensor, window: Size) -> Tensor:
    """The bias [heads, N, N] of all pairs of tokens, from that of all differences: [heads, 2h-1, 2w-1], turned round.

    The row of a token is a piece of the table that slides with it, so that whole runs are copied, not single numbers.
    """
    tokens = window[0] * window[1]
    pieces = table.unfold(1, window[0], 1).unfold(2, window[1], 1)
    return pieces.flip((1, 2)).reshape(len(table), tokens, tokens)


def _attend(frozen: _Frozen, x: Tensor) -> Tensor:
    """Attention of one block over tokens [B, H, W, C], within windows, projected."""
    layer, (batch, height, width, channels) = frozen.layer, x.shape
    order = _order(batch, (height, width), frozen.window, frozen.shift, x.device)
    # Right and bottom only, and before the roll: the shift mask is that of a grid that starts at the first token.
    x = F.pad(x, (0, 0, 0, -width % frozen.window[1], 0, -height % frozen.window[0]))
    tokens = x.reshape(-1, channels).index_select(0, order.there)
    if frozen.rounded:
        qkv = rounded_linear(tokens, layer.qkv.weight, frozen.qkv_bias, frozen.products)
    else:
        qkv = F.linear(tokens, layer.qkv.weight, frozen.qkv_bias)
    with torch.autocast(x.device.type, enabled=False):
        qkv = qkv.view(-1, frozen.tokens, 3, frozen.heads, channels // frozen.heads)
        attended = _stepwise(frozen, qkv, order) if frozen.stepwise else _fused(frozen, qkv, order)
    attended = attended.view(-1, channels).index_select(0, order.back)
    return layer.proj(attended).view(batch, height, width, channels)


def _stepwise(frozen: _Frozen, qkv: Tensor, order: "_Order") -> Tensor:
    """Attention of windows [windows, N, 3, heads, d] in timm's own steps: the same bits."""
    _normalise(qkv[:, :, :2])
    result = torch.empty_like(qkv[:, :, 0])
    bias = frozen.bias
    assert bias is not None, "windows of few tokens keep their bias"
    limit = _SCORE_BYTES.get(qkv.device.type, _OTHER_BYTES)
    step = max(1, limit // (bias.numel() * bias.element_size()))
    for first, last, mask in order.parts:
        for start in range(first, last, step):
            part = slice(start, min(start + step, last))
            q, k, v = qkv[part].permute(2, 0, 3, 1, 4).unbind(0)
            scores = (q @ k.transpose(-2, -1)).mul_(frozen.scale).add_(bias)
            if mask is not None:
                scores.add_(mask)
            result[part] = (scores.softmax(-1) @ v).transpose(1, 2)
    return result


def _fused(frozen: _Frozen, qkv: Tensor, order: "_Order") -> Tensor:
    """Attention of windows [windows, N, 3, heads, d] through torch's fused attention."""
    q, k = _normalise(qkv[:, :, :2].float()).unbind(2)
    q = (q * frozen.scale.view(-1, 1)).to(frozen.products).transpose(1, 2)
    k, v = k.to(frozen.products).transpose(1, 2), qkv[:, :, 2].to(frozen.products).transpose(1, 2)
    result = torch.empty_like(qkv[:, :, 2], dtype=frozen.products)
    for heads, bias in _biases(frozen):
        for first, last, mask in order.parts:
            added = bias if mask is None else bias + mask.to(bias.dtype)
            each = [x[first:last, heads] for x in (q, k, v)]
            part = F.scaled_dot_product_attention(*each, attn_mask=added[None], scale=1.0)
            result[first:last, :, heads] = part.transpose(1, 2)
    return result


def _normalise(x: Tensor) -> Tensor:
    """x, with its vectors along the last axis brought to length 1."""
    return x.div_(torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(1e-12))


def _biases(frozen: _Frozen) -> Iterator[tuple[slice, Tensor]]:
    """The bias of all pairs for some heads at a time."""
    if frozen.bias is not None:
        yield slice(0, frozen.heads), frozen.bias
        return
    each = frozen.tokens**2 * frozen.table.element_size()
    step = max(1, _BIAS_BYTES.get(frozen.table.device.type, _OTHER_BYTES) // each)
    for first in range(0, frozen.heads, step):
        heads = slice(first, min(first + step, frozen.heads))
        yield heads, pair_bias(frozen.table[heads], frozen.window)


@dataclass(frozen=True)
class _Order:
    """How the tokens of padded maps go to windows and back.

    `there` [windows * N] are the places of tokens in a batch of padded maps, window by window; `back` [B * H * W] are
    the places that they have there. `parts` are runs of windows (first, after the last) with their mask [N, N], None
    where all tokens of a window see each other.
    """

    there: Tensor
    back: Tensor
    parts: tuple[tuple[int, int, Tensor | None], ...]


# Two orders a stage, of a canvas and of the last one.
@functools.lru_cache(maxsize=16)
def _order(batch: int, size: Size, window: Size, shift: Size, device: torch.device) -> _Order:
    grid = tuple(-(-n // w) for n, w in zip(size, window, strict=True))
    padded = (grid[0] * window[0], grid[1] * window[1])
    places = torch.arange(batch * padded[0] * padded[1]).view(batch, *padded).roll((-shift[0], -shift[1]), (1, 2))
    # [rows of windows, columns of windows, batch, N]
    windows = places.view(batch, grid[0], window[0], grid[1], window[1]).permute(1, 3, 0, 2, 4).flatten(3)
    # Rolled, the last row and the last column of windows hold what lay at both ends of the map.
    ends = (grid[0] - 1 if shift[0] else grid[0], grid[1] - 1 if shift[1] else grid[1])
    order, parts, first = [], [], 0
    for rows, below in ((slice(0, ends[0]), False), (slice(ends[0], None), True)):
        for columns, right in ((slice(0, ends[1]), False), (slice(ends[1], None), True)):
            chosen = windows[rows, columns].reshape(-1, window[0] * window[1])
            if len(chosen):
                mask = _mask(window, (shift[0] * below, shift[1] * right))
                parts.append((first, first + len(chosen), None if mask is None else mask.to(device)))
                order.append(chosen)
                first += len(chosen)
    there = torch.cat(order).flatten()
    back = torch.empty_like(there)
    back[there] = torch.arange(len(there))
    back = back.view(batch, *padded)[:, : size[0], : size[1]].reshape(-1)
    return _Order(there.to(device), back.to(device), tuple(parts))


def _mask(window: Size, shift: Size) -> Tensor | None:
    """What is added to the scores [N, N] of a window whose last `shift` rows and columns came from the other end."""
    if not any(shift):
        return None
    rows, columns = (torch.arange(w) >= w - s for w, s in zip(window, shift, strict=True))
    regions = (rows[:, None] * 2 + columns[None, :].int()).flatten()
    return torch.where(regions[:, None] == regions[None, :], 0.0, _MASKED)
