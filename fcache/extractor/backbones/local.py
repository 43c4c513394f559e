"""Plain ViTs for detection: attention within windows in all blocks but four.

The ViT detection paper runs a ViT at 1024 x 1024 with attention in windows of 14 x 14 tokens that do not overlap, and
over the whole map in the blocks at a quarter, half, three quarters and the end. Weights are those of the plain model.
"""

from collections.abc import Sequence
from types import MethodType
from typing import Any

from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

PAD_MODE = "pad-after-norm"


def takes_local_windows(model: nn.Module) -> bool:
    """Whether `attend_locally` can change a model: timm's plain ViT of plain blocks, with free input sizes."""
    network: Any = model
    return type(model) is VisionTransformer and all(type(block) is Block for block in network.blocks)


def quarter_blocks(depth: int) -> tuple[int, ...]:
    """The blocks (from 0) at a quarter, half, three quarters and the end of `depth` blocks."""
    return tuple(sorted({max(0, round(depth * quarter / 4) - 1) for quarter in (1, 2, 3, 4)}))


def attend_locally(model: nn.Module, window: int) -> None:
    """Make the intermediates of a plain ViT those of attention within windows of `window` tokens a side.

    Class and register tokens are dropped before the first block: there is no window that they belong to.
    """
    network: Any = model
    network.local_window = window
    network.forward_intermediates = MethodType(_intermediates, network)


def _intermediates(model: Any, images: Tensor, *, indices: Sequence[int], **options: Any) -> list[Tensor]:
    """The raw outputs of the blocks `indices` (increasing), [B, C, h, w] each."""
    assert options["output_fmt"] == "NCHW", "maps are channels first"
    assert not options["norm"], "maps are raw"
    x = model.patch_embed(images)
    height, width = x.shape[1:3]
    x = model.norm_pre(model._pos_embed(x)[:, model.num_prefix_tokens :])
    everywhere = quarter_blocks(len(model.blocks))
    maps: list[Tensor] = []
    for number, block in enumerate(model.blocks[: indices[-1] + 1]):
        window = None if number in everywhere else model.local_window
        attended = _attend(block.attn, block.norm1(x), (height, width), window)
        x = x + block.ls1(attended)
        x = x + block.ls2(block.mlp(block.norm2(x)))
        if number in indices:
            maps.append(x.transpose(1, 2).unflatten(2, (height, width)).contiguous())
    return maps


def _attend(attention: nn.Module, x: Tensor, size: tuple[int, int], window: int | None) -> Tensor:
    """Attention over tokens [B, H W, C], within windows if there is a window.

    Maps are padded at the bottom and right with zeros, after the norm, as in SAM's code and in Detectron2's.
    """
    height, width = size
    if window is None:
        return attention(x)
    x = F.pad(x.unflatten(1, size), (0, 0, 0, -width % window, 0, -height % window))
    batch, padded_h, padded_w, channels = x.shape
    grid = (batch, padded_h // window, padded_w // window)
    tokens = x.view(*grid[:2], window, grid[2], window, channels).transpose(2, 3)
    tokens = attention(tokens.reshape(-1, window * window, channels))
    x = tokens.view(*grid, window, window, channels).transpose(2, 3).reshape(batch, padded_h, padded_w, channels)
    return x[:, :height, :width].flatten(1, 2)
