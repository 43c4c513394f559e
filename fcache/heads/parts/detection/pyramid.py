"""From the levels of a backbone to the maps that a detector looks at: norms, adaptors, and one of three necks."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from fcache.cache_spec import LevelSpec, SpecError, unknown_name
from fcache.heads.head import Options
from fcache.heads.parts.adaptors import STRIDE_FACTORS, SimpleAdaptors, adapts
from fcache.heads.parts.bifpn import BIFPN_OPTIONS, BiFPN
from fcache.heads.parts.detection.fpn import FPN
from fcache.heads.parts.norm import ChannelNorm

NECKS = ("fpn", "fpn-residual", "bifpn")
PYRAMID_OPTIONS: Options = {
    "neck": "fpn",
    **BIFPN_OPTIONS,
    "width": 256,
    "extra_levels": 1,
    "batch_norm": False,
    "adaptors": "auto",
    "norm_inputs": False,
}


class DetectionPyramid(nn.Module):
    """Levels by name -> maps of `width` channels from fine to coarse.

    `strides` are those of the maps in input pixels. The first `num_levels` of them are of the backbone's levels, or of
    what adaptors make of these (see `SimpleAdaptors`); the others, `extra_levels` of them, are each half as large as
    the one before. Raises SpecError for an option that the neck does not have.
    """

    def __init__(self, levels: Sequence[LevelSpec], options: Options) -> None:
        super().__init__()
        channels = [level.channels for level in levels]
        strides = [float(level.stride) for level in levels]
        self.names = tuple(level.name for level in levels)
        self.norms = nn.ModuleList(ChannelNorm(c) if options["norm_inputs"] else nn.Identity() for c in channels)
        self.adaptors = None
        if adapts(levels, options["adaptors"]):
            self.adaptors = SimpleAdaptors(channels)
            channels = list(self.adaptors.channels)
            strides = [strides[0] * factor for factor in STRIDE_FACTORS]
        self.num_levels = len(strides)
        extra = [strides[-1] * 2**i for i in range(1, options["extra_levels"] + 1)]
        self.strides = (*strides, *extra)
        self.neck = _neck(channels, options)

    def forward(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """Features [B, C_i, H_i, W_i] by level name -> maps [B, width, H_i, W_i]."""
        levels = [norm(features[name]) for name, norm in zip(self.names, self.norms, strict=True)]
        if self.adaptors is not None:
            levels = self.adaptors(levels)
        return self.neck(levels)


def check_pyramid(options: Options) -> None:
    """Raises SpecError for an option out of its range, or one that the neck does not have."""
    neck, layers = options["neck"], options["layers"]
    if neck not in NECKS:
        raise unknown_name("neck of a detector:", neck, NECKS)
    if options["width"] < 1 or options["extra_levels"] < 0:
        raise SpecError(
            f"a detector needs width >= 1 and extra_levels >= 0, got {options['width']} and {options['extra_levels']}"
        )
    if neck == "bifpn" and layers < 1:
        raise SpecError(f"neck=bifpn needs its number of layers, 1 to 9 in the papers, got layers={layers}")
    if neck == "fpn-residual" and layers < 1:
        raise SpecError(f"neck=fpn-residual needs its number of blocks a level, 4 in the paper, got layers={layers}")
    for name, unset in BIFPN_OPTIONS.items():
        if neck == "fpn" and options[name] != unset:
            raise SpecError(f"an FPN has no {name}: give another neck, or leave {name}={options[name]} out")
        if neck == "fpn-residual" and name != "layers" and options[name] != unset:
            raise SpecError(f"an FPN has no {name}: give neck=bifpn, or leave {name}={options[name]} out")


def _neck(channels: Sequence[int], options: Options) -> nn.Module:
    width, extra = options["width"], options["extra_levels"]
    if options["neck"] == "bifpn":
        return BiFPN(channels, width, extra_levels=extra, **{name: options[name] for name in BIFPN_OPTIONS})
    blocks = options["layers"] if options["neck"] == "fpn-residual" else 0
    return FPN(channels, width, extra_levels=extra, normalised=options["batch_norm"], residual_blocks=blocks)
