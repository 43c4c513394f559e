"""Adaptors: a pyramid of four strides from maps of one, as plain ViTs give them."""

from collections.abc import Sequence

from torch import Tensor, nn

from fcache.cache_spec import LevelSpec, SpecError, unknown_name

CHOICES = ("auto", "none", "simple")
# Patch sizes of plain ViTs for which maps of a quarter of the stride are as fine as those of other backbones.
AUTO_STRIDES = frozenset({14, 16})
# The strides of the four maps, in those of the taps.
STRIDE_FACTORS = (0.25, 0.5, 1.0, 2.0)


class SimpleAdaptors(nn.Module):
    """Maps of one stride s, from the first block to the last -> four maps of strides s/4, s/2, s and 2s.

    As in "Benchmarking Detection Transfer Learning with Vision Transformers": a 2x2 deconvolution of stride 2,
    GroupNorm of one group, GELU and another deconvolution; one deconvolution; the map as it is; 2x2 max pooling. The
    number of channels stays. The four are made of the maps that `quarters` names: of one map alone, all are made of it.
    Initial weights are torch's own. An odd side is pooled to half of it, rounded up.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.taken = quarters(len(channels))
        self.channels = tuple(channels[i] for i in self.taken)
        first, second = self.channels[:2]
        self.times_4 = nn.Sequential(_double(first), nn.GroupNorm(1, first), nn.GELU(), _double(first))
        self.times_2 = _double(second)
        self.halve = nn.MaxPool2d(2, ceil_mode=True)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps [B, C_i, H, W] of equal size -> maps of 4, 2, 1 and 1/2 times their sides."""
        a, b, c, d = (maps[i] for i in self.taken)
        return [self.times_4(a), self.times_2(b), c, self.halve(d)]


def quarters(count: int) -> tuple[int, int, int, int]:
    """Of `count` maps in order of depth, those at the end of each quarter: of 12 the third, sixth, ninth and last.

    Of four they are all; of fewer some stand in twice or more.
    """
    first, second, third, last = (-(-(k * count) // 4) - 1 for k in range(1, 5))
    return first, second, third, last


def adapts(levels: Sequence[LevelSpec], adaptors: str) -> bool:
    """Whether levels pass adaptors: `adaptors` is an option of `CHOICES`.

    "auto" says yes to levels that share a stride of 14 or 16, as those of a plain ViT do, be they one or several.
    Raises SpecError for another option, and for "simple" if the levels differ in stride.
    """
    if adaptors not in CHOICES:
        raise unknown_name("choice of adaptors:", adaptors, CHOICES)
    strides = sorted({level.stride for level in levels})
    if adaptors == "simple" and len(strides) > 1:
        raise SpecError(
            "adaptors=simple makes a pyramid of levels of one stride, as a plain ViT has them; these have strides "
            f"{', '.join(map(str, strides))}: take adaptors=none"
        )
    return adaptors == "simple" or (adaptors == "auto" and len(strides) == 1 and strides[0] in AUTO_STRIDES)


def adapted_levels(levels: Sequence[LevelSpec], adaptors: str) -> tuple[str, ...]:
    """The names of the levels that a head with this option reads: those its adaptors take, or all."""
    if not adapts(levels, adaptors):
        return tuple(level.name for level in levels)
    return tuple(dict.fromkeys(levels[i].name for i in quarters(len(levels))))


def adaptors_for(levels: Sequence[LevelSpec], adaptors: str) -> tuple[SimpleAdaptors | None, list[int], list[float]]:
    """What levels, fine to coarse, pass by this option (None: nothing), and the channels and strides of the result."""
    channels = [level.channels for level in levels]
    if not adapts(levels, adaptors):
        return None, channels, [float(level.stride) for level in levels]
    module = SimpleAdaptors(channels)
    return module, list(module.channels), [factor * levels[0].stride for factor in STRIDE_FACTORS]


def _double(channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(channels, channels, 2, stride=2)
