"""UPerNet's body: pyramid pooling on the coarsest level, a neck, fusion at the finest stride."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fcache.cache_spec import LevelSpec, SpecError, unknown_name
from fcache.heads.head import Options
from fcache.heads.parts.adaptors import adaptors_for, adapts
from fcache.heads.parts.bifpn import BIFPN_OPTIONS, BiFPN
from fcache.heads.parts.conv import ConvNormAct, classifier, resize
from fcache.heads.parts.fcn import FCN
from fcache.heads.parts.fpn import TopDown
from fcache.heads.parts.norm import ChannelNorm
from fcache.heads.parts.ppm import PyramidPooling

NECKS = ("fpn", "bifpn")
UPERNET_OPTIONS: Options = {
    "width": 512,
    "neck": "fpn",
    **BIFPN_OPTIONS,
    "adaptors": "auto",
    "dropout": 0.1,
    "norm_inputs": False,
    "aux": False,
    "aux_weight": 0.4,
}


class UPerNet(nn.Module):
    """UPerNet as Swin and mmsegmentation have it: pyramid pooling on the top level, a neck, fusion.

    The neck is the top-down path of an FPN, or a BiFPN over all levels, whose coarsest input is the pooled map. All
    maps are resized to the finest level, concatenated, fused by a 3x3 block, and classified by a 1x1 convolution after
    channel dropout. With an auxiliary head (one 3x3 block of `AUXILIARY` channels on the level of stride 16, and a
    classifier) logits come as a pair. With one level it is pyramid pooling and fusion.
    Where the option `adaptors` says so, levels of one stride first become four, see `SimpleAdaptors`.
    """

    AUXILIARY = 256

    def __init__(self, levels: Sequence[LevelSpec], num_classes: int, options: Options) -> None:
        super().__init__()
        width = options["width"]
        self.names = tuple(level.name for level in levels)
        self.norms = nn.ModuleList(
            ChannelNorm(level.channels) if options["norm_inputs"] else nn.Identity() for level in levels
        )
        self.adaptors, channels, strides = adaptors_for(levels, options["adaptors"])
        self.pyramid = PyramidPooling(channels[-1], width)
        self.neck = _neck(channels[:-1], options)
        self.fuse = ConvNormAct(len(channels) * width, width, kernel=3)
        self.dropout = nn.Dropout2d(options["dropout"])
        self.classify = classifier(width, num_classes)
        self.auxiliary_level = _auxiliary_level(strides)
        self.auxiliary = None
        if options["aux"]:
            self.auxiliary = FCN(
                channels[self.auxiliary_level],
                num_classes,
                width=self.AUXILIARY,
                num_convs=1,
                concat_input=False,
                dropout=options["dropout"],
            )

    def forward(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """Features by level name -> logits [B, K, H, W] at the finest level, then the auxiliary ones in training."""
        levels = [norm(features[name]) for name, norm in zip(self.names, self.norms, strict=True)]
        if self.adaptors is not None:
            levels = self.adaptors(levels)
        maps = self.neck([*levels[:-1], self.pyramid(levels[-1])])
        size = (maps[0].shape[2], maps[0].shape[3])
        fused = self.fuse(torch.cat([maps[0], *(resize(m, size) for m in maps[1:])], dim=1))
        logits = [self.classify(self.dropout(fused))]
        if self.auxiliary is not None and self.training:
            logits.append(self.auxiliary(levels[self.auxiliary_level]))
        return logits


def check_upernet(levels: Sequence[LevelSpec], options: Options) -> None:
    """Raises SpecError for an option out of its range, or one that the neck or these levels give no meaning."""
    if options["width"] < 1 or not 0 <= options["dropout"] < 1:
        raise SpecError(
            f"upernet needs width >= 1 and dropout in [0, 1), got {options['width']} and {options['dropout']}"
        )
    if options["aux_weight"] < 0:
        raise SpecError(f"upernet needs aux_weight >= 0, got {options['aux_weight']}")
    if not options["aux"] and options["aux_weight"] != UPERNET_OPTIONS["aux_weight"]:
        raise SpecError(f"there is no auxiliary head: give aux=true, or leave aux_weight={options['aux_weight']} out")
    if options["neck"] not in NECKS:
        raise unknown_name("neck of upernet:", options["neck"], NECKS)
    if options["neck"] == "bifpn":
        if options["layers"] < 1:
            raise SpecError(
                f"neck=bifpn needs its number of layers, 1 to 9 in the papers, got layers={options['layers']}"
            )
        if not 0 < options["bn_momentum"] <= 1:
            raise SpecError(f"neck=bifpn needs bn_momentum in (0, 1], got {options['bn_momentum']}")
        if len(levels) == 1 and not adapts(levels, options["adaptors"]):
            raise SpecError("neck=bifpn fuses levels, and there is only one here: take neck=fpn, or more levels")
    for name, unset in BIFPN_OPTIONS.items():
        if options["neck"] == "fpn" and options[name] != unset:
            raise SpecError(f"an FPN has no {name}: give neck=bifpn, or leave {name}={options[name]} out")


def _neck(channels: Sequence[int], options: Options) -> nn.Module:
    """A neck over levels of `channels` and the pooled top, fine to coarse."""
    width = options["width"]
    if options["neck"] == "fpn":
        return TopDown(channels, width)
    return BiFPN([*channels, width], width, **{name: options[name] for name in BIFPN_OPTIONS})


def _auxiliary_level(strides: Sequence[float]) -> int:
    """The index of the level of stride 16; the last but one where that is not one level, as in a plain ViT."""
    at_16 = [i for i, stride in enumerate(strides) if stride == 16]
    return at_16[0] if len(at_16) == 1 else max(0, len(strides) - 2)
