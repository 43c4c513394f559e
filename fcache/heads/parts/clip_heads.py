"""Heads on clips: a linear classifier of the mean, and transformer blocks before it."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from fcache.cache_spec import LevelSpec
from fcache.heads.head import Options
from fcache.heads.parts.clip_attention import clip_maps

# Channels of an attention head: 32 heads at the paper's 1024.
HEAD_CHANNELS = 32
# What makes the attention of a block, of its width, attention heads and number.
Look = Callable[[int, int, int], nn.Module]


class ClipClassifier(nn.Module):
    """Mean over all frames and positions, dropout, and a linear layer."""

    def __init__(self, channels: int, num_classes: int, *, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(channels, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H, W, C] -> logits [B, classes]."""
        return self.linear(self.dropout(x.mean(dim=(1, 2, 3))))


class LinearHead(nn.Module):
    """A linear classifier of the mean of one level, which may lack any axis but its channels."""

    def __init__(self, level: LevelSpec, num_classes: int, options: Options) -> None:
        super().__init__()
        self.level = level
        self.norm_inputs = nn.LayerNorm(level.channels) if options["norm_inputs"] else nn.Identity()
        self.classify = ClipClassifier(level.channels, num_classes, dropout=options["dropout"])

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Features by level name -> logits [B, classes]."""
        return self.classify(self.norm_inputs(clip_maps(features, self.level)))


class ClipBlock(nn.Module):
    """Attention and a perceptron, both normalised before and added to their input, or dropped for a whole clip."""

    def __init__(self, width: int, look: nn.Module, *, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.look_norm, self.look = nn.LayerNorm(width), look
        self.norm = nn.LayerNorm(width)
        self.expand, self.contract = nn.Linear(width, hidden), nn.Linear(hidden, width)
        for linear in (self.expand, self.contract):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.drop = StochasticDepth(drop_path, mode="row")

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H, W, C] -> the same."""
        x = x + self.drop(self.look(self.look_norm(x)))
        return x + self.drop(self.contract(F.gelu(self.expand(self.norm(x)))))


class BlocksHead(nn.Module):
    """Transformer blocks over one level with a learned vector for every frame, LayerNorm, and a `ClipClassifier`.

    The vectors begin at zero or, with `times` "sine", as waves of many lengths; blocks are dropped with a rate that
    rises from 0 to `drop_path` from the first to the last. With `width` a linear layer comes first.
    """

    def __init__(self, level: LevelSpec, num_classes: int, look: Look, options: Options) -> None:
        super().__init__()
        self.level = level
        width = options["width"] or level.channels
        heads = options["attention_heads"] or default_heads(width)
        count, hidden = options["blocks"], max(1, round(width * options["mlp_ratio"]))
        self.norm_inputs = nn.LayerNorm(level.channels) if options["norm_inputs"] else nn.Identity()
        self.project = nn.Linear(level.channels, width) if options["width"] else nn.Identity()
        self.times = nn.Parameter(TIMES[options["times"]](_frames(level), width))
        self.blocks = nn.ModuleList(
            ClipBlock(
                width, look(width, heads, i), hidden=hidden, drop_path=options["drop_path"] * i / max(1, count - 1)
            )
            for i in range(count)
        )
        self.norm = nn.LayerNorm(width)
        self.classify = ClipClassifier(width, num_classes, dropout=options["dropout"])

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Features by level name -> logits [B, classes]."""
        x = clip_maps(features, self.level)
        assert x.shape[1] == len(self.times), "clips of one source are equally long"
        x = self.project(self.norm_inputs(x)) + self.times[:, None, None]
        for block in self.blocks:
            x = block(x)
        return self.classify(self.norm(x))


def sine_times(frames: int, width: int) -> Tensor:
    """Sines and cosines of the number of a frame, [frames, width]; the wave length grows from 2 pi frames to 100 times
    as much.
    """
    lengths = 100 ** (torch.arange(0, width, 2) / width)
    angles = torch.arange(frames)[:, None] / lengths
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]


# How the vectors of frames begin.
TIMES: Mapping[str, Callable[[int, int], Tensor]] = {"zero": torch.zeros, "sine": sine_times}


def default_heads(width: int) -> int:
    """How many attention heads a width has: as many as divide it with 32 channels each, or more where 32 do not."""
    return next(n for n in range(max(1, width // HEAD_CHANNELS), 0, -1) if width % n == 0)


def _frames(level: LevelSpec) -> int:
    return level.shape[level.dims.split().index("T")]
