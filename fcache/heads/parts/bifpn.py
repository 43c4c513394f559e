"""BiFPN (EfficientDet): levels fused top-down and bottom-up, n times over, with learned weights of their sums."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcache.cache_spec import SpecError
from fcache.heads.head import Options
from fcache.heads.parts.conv import batch_norm

EPS = 1e-3
# The options of heads with necks that only a BiFPN reads, at the values that say they are not given.
BIFPN_OPTIONS: Options = {"layers": 0, "separable": True, "bn_momentum": 0.1, "edge_convs": False}


class BiFPN(nn.Module):
    """Levels from fine to coarse -> as many maps of `width` channels, and `extra_levels` coarser ones.

    Every level first passes a 1x1 convolution and BatchNorm to `width` channels. The first extra level is made of the
    coarsest one in the same way and then pooled to half its size, every further one is the one before, pooled. Each of
    `layers` layers then fuses all levels: from coarse to fine, and back. `separable` takes depthwise separable 3x3
    convolutions in the nodes, else full ones. `edge_convs` gives each edge from a given level into the first layer a
    1x1 block of its own, as EfficientDet's first cell has them, where otherwise the edges of one level share theirs.

    Initial weights are Glorot uniform, weights of sums 1. BatchNorm has eps 1e-3 as EfficientDet, but momentum 0.1:
    its 0.01 leaves running statistics far behind the weights in any but long trainings.
    Raises SpecError for less than two levels in all, less than one layer, or a momentum outside (0, 1].
    """

    def __init__(
        self,
        channels: Sequence[int],
        width: int,
        *,
        layers: int,
        extra_levels: int = 0,
        separable: bool = True,
        bn_momentum: float = 0.1,
        edge_convs: bool = False,
    ) -> None:
        super().__init__()
        count = len(channels) + extra_levels
        if count < 2:
            raise SpecError(f"a BiFPN fuses two levels or more, got {count}")
        if layers < 1 or not 0 < bn_momentum <= 1:
            raise SpecError(
                f"a BiFPN needs layers >= 1 and bn_momentum in (0, 1], got layers={layers}, bn_momentum={bn_momentum}"
            )
        self.extra_levels = extra_levels
        self.project = nn.ModuleList(_ConvNorm(c, width, momentum=bn_momentum) for c in channels)
        # The way back starts at the finest level's result, so that this level has one edge only.
        back = channels[1:] if edge_convs else ()
        self.project_back = nn.ModuleList(_ConvNorm(c, width, momentum=bn_momentum) for c in back)
        self.project_extra = _ConvNorm(channels[-1], width, momentum=bn_momentum) if extra_levels else nn.Identity()
        self.layers = nn.ModuleList(
            _Layer(width, count, separable=separable, momentum=bn_momentum) for _ in range(layers)
        )

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Levels [B, C_i, H_i, W_i] -> maps [B, width, H_i, W_i], and the extra levels of half the size each."""
        maps = [project(x) for project, x in zip(self.project, levels, strict=True)]
        back = maps
        if self.project_back:
            back = maps[:1] + [project(x) for project, x in zip(self.project_back, levels[1:], strict=True)]
        extra: list[Tensor] = []
        x = self.project_extra(levels[-1])
        for _ in range(self.extra_levels):
            x = max_pool_to(x, (-(-x.shape[2] // 2), -(-x.shape[3] // 2)))
            extra.append(x)
        maps, back = [*maps, *extra], [*back, *extra]
        for layer in self.layers:
            maps = back = layer(maps, back)
        return maps


class _ConvNorm(nn.Module):
    """1x1 convolution without bias, BatchNorm."""

    def __init__(self, channels: int, out: int, *, momentum: float) -> None:
        super().__init__()
        self.conv = _convolution(channels, out, kernel=1)
        self.norm = nn.BatchNorm2d(out, eps=EPS, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        return batch_norm(self.norm, self.conv(x))


class _Layer(nn.Module):
    """One pass from coarse to fine and one back; all maps keep their sizes."""

    def __init__(self, width: int, count: int, *, separable: bool, momentum: float) -> None:
        super().__init__()

        def node(edges: int) -> _Fuse:
            return _Fuse(width, edges, separable=separable, momentum=momentum)

        self.top_down = nn.ModuleList(node(2) for _ in range(count - 1))
        # The coarsest level has no result of the way down beside its input.
        self.bottom_up = nn.ModuleList(node(2 if i == count - 1 else 3) for i in range(1, count))

    def forward(self, maps: Sequence[Tensor], back: Sequence[Tensor]) -> list[Tensor]:
        """`maps` are what the way down reads, `back` what the way back reads beside its results."""
        last = len(maps) - 1
        down = list(maps)
        for i in range(last - 1, -1, -1):
            above = F.interpolate(down[i + 1], size=_size(maps[i]), mode="nearest")
            down[i] = self.top_down[i](maps[i], above)
        out = down[:1]
        for i, fuse in enumerate(self.bottom_up, start=1):
            below = max_pool_to(out[-1], _size(maps[i]))
            out.append(fuse(back[i], below) if i == last else fuse(back[i], down[i], below))
        return out


class _Fuse(nn.Module):
    """The weighted sum of maps of one size; SiLU, a 3x3 convolution without bias, BatchNorm."""

    def __init__(self, width: int, edges: int, *, separable: bool, momentum: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(edges))
        if separable:
            depthwise = _convolution(width, width, kernel=3, groups=width)
            self.conv: nn.Module = nn.Sequential(depthwise, _convolution(width, width, kernel=1))
        else:
            self.conv = _convolution(width, width, kernel=3)
        self.norm = nn.BatchNorm2d(width, eps=EPS, momentum=momentum)

    def forward(self, *maps: Tensor) -> Tensor:
        positive = F.relu(self.weights)
        shares = positive / (positive.sum() + 1e-4)
        total = sum((s * x for s, x in zip(shares[1:], maps[1:], strict=True)), start=shares[0] * maps[0])
        return batch_norm(self.norm, self.conv(F.silu(total)))


def _convolution(channels: int, out: int, *, kernel: int, groups: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, groups=groups, bias=False)
    # Glorot by what one output sees and one input reaches: torch's own counts all channels of a depthwise kernel.
    bound = math.sqrt(6 * groups / (kernel * kernel * (channels + out)))
    nn.init.uniform_(conv.weight, -bound, bound)
    return conv


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[2], x.shape[3]


def max_pool_to(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [B, C, H, W] max-pooled to any `size` (height, width); neighbouring windows share a row or column.

    To half the size, rounded up, it is the 3x3 pooling of stride 2 with TensorFlow's "same" padding, whose smaller
    half comes first; to half the size, rounded down, the same without padding.
    """
    strides = [max(1, math.ceil((n - 1) / m)) for n, m in zip(_size(x), size, strict=True)]
    kernels = [1 if n == m else s + 1 for n, m, s in zip(_size(x), size, strides, strict=True)]
    padding = [(m - 1) * s + k - n for n, m, s, k in zip(_size(x), size, strides, kernels, strict=True)]
    if any(p >= k for p, k in zip(padding, kernels, strict=True)):
        # Sizes such as 18 and 16, of levels whose strides are no multiples: windows of one stride do not meet them.
        return F.adaptive_max_pool2d(x, size)
    top, left = padding[0] // 2, padding[1] // 2
    around = (left, padding[1] - left, top, padding[0] - top)
    if any(padding):
        x = F.pad(x, around, value=float("-inf"))
    return F.max_pool2d(x, tuple(kernels), tuple(strides))
