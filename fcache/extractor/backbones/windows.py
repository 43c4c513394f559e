"""Shifted-window attention with the padding where it belongs: before the roll.

timm 1.0 rolls a map and pads it afterwards. Where the window does not divide the map, its shift mask then lies over
the wrong rows: true neighbours are cut apart and the two ends of the map see each other. Padding first, as the
detection forms of Swin do, agrees with the mask. Where the window divides the map both orders give equal bits.
"""

from types import MethodType
from typing import Any

from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock
from torch import Tensor, nn
from torch.nn import functional as F

PAD_MODE = "pad-then-roll"

# The method of each block class that rolls, partitions and attends.
_ATTENTION = {
    SwinTransformerBlock: "_attn",
    SwinTransformerV2Block: "_attn",
    SwinTransformerV2CrBlock: "_shifted_window_attn",
}


def correct_windows(model: nn.Module) -> bool:
    """Make every Swin V1, V2 and V2-CR block of `model` pad before it rolls; True if there is such a block."""
    blocks = _blocks(model)
    for block in blocks:
        setattr(block, _ATTENTION[type(block)], MethodType(_attend, block))
    return bool(blocks)


def windows_in_use(model: nn.Module) -> tuple[dict[str, list[int]], ...]:
    """Per stage the window and the shift (height, width) of its shifted blocks, in tokens, as its blocks hold them."""
    stages: dict[str, dict[str, list[int]]] = {}
    for name, module in model.named_modules():
        if type(module) in _ATTENTION:
            block: Any = module
            stage = stages.setdefault(name.split(".blocks.")[0], {"window": [], "shift": [0, 0]})
            stage["window"] = [int(n) for n in block.window_size]
            stage["shift"] = [max(a, int(b)) for a, b in zip(stage["shift"], block.shift_size, strict=True)]
    return tuple(stages.values())


def pretrained_windows(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Per stage of a Swin V2 the window of its pre-training (height, width), read from the model at its native size.

    It is what the architecture states, else the window that the stage really has at the native size, clamped to the
    map: timm normalises relative positions by the current window otherwise, so that a stage whose map was smaller
    than the window in pre-training would change its scale as the input grows.
    """
    stages: dict[str, tuple[int, int]] = {}
    for name, block in model.named_modules():
        if isinstance(block, SwinTransformerV2Block):
            attention: Any = block.attn
            stated = tuple(int(n) for n in attention.pretrained_window_size)
            height, width = stated if all(stated) else attention.window_size
            stages[name.split(".blocks.")[0]] = (int(height), int(width))
    return tuple(stages.values())


def _blocks(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if type(m) in _ATTENTION]


def _attend(block: Any, x: Tensor) -> Tensor:
    """Window attention of one block over tokens [B, H, W, C]."""
    _, height, width, channels = x.shape
    window_h, window_w = block.window_size
    shift_h, shift_w = block.shift_size
    # Right and bottom only: timm's mask is built for a grid that starts at the first token.
    x = F.pad(x, (0, 0, 0, -width % window_w, 0, -height % window_h))
    batch, padded_h, padded_w, _ = x.shape
    if shift_h or shift_w:
        x = x.roll((-shift_h, -shift_w), (1, 2))
    grid = (batch, padded_h // window_h, padded_w // window_w)
    tokens = x.view(batch, grid[1], window_h, grid[2], window_w, channels).transpose(2, 3)
    tokens = block.attn(tokens.reshape(-1, window_h * window_w, channels), mask=block.attn_mask)
    x = tokens.view(*grid, window_h, window_w, channels).transpose(2, 3).reshape(batch, padded_h, padded_w, channels)
    if shift_h or shift_w:
        x = x.roll((shift_h, shift_w), (1, 2))
    return x[:, :height, :width].contiguous()
