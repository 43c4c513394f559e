"""Semantic segmentation: `linear` and `upernet`. Labels `semantic/map`, scores at original size."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fcache.cache_spec import IGNORE, LevelSpec, SpecError
from fcache.heads.batches import Batch
from fcache.heads.head import Head, HeadInput, Options
from fcache.heads.parts import ChannelNorm, ConvNormAct, PyramidPooling, TopDown, resize
from fcache.heads.parts.classmaps import ClassMaps, logit_maps, merge_labels
from fcache.heads.parts.segmentation import fine_to_coarse, pixel_loss, segmentation_metrics


class LinearSegmenter(nn.Module):
    """Per level BatchNorm and a 1x1 convolution to the classes; resized to the finest level and summed."""

    def __init__(self, levels: Sequence[LevelSpec], num_classes: int) -> None:
        super().__init__()
        self.names = tuple(level.name for level in levels)
        self.norms = nn.ModuleList(nn.BatchNorm2d(level.channels) for level in levels)
        self.classify = nn.ModuleList(nn.Conv2d(level.channels, num_classes, 1) for level in levels)

    def forward(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """Features by level name -> [logits [B, K, H, W]] at the finest level."""
        maps = [f(n(features[name])) for name, n, f in zip(self.names, self.norms, self.classify, strict=True)]
        size = (maps[0].shape[2], maps[0].shape[3])
        return [sum((resize(m, size) for m in maps[1:]), start=maps[0])]


class UPerNet(nn.Module):
    """UPerNet as Swin and mmsegmentation have it: pyramid pooling on the top level, a top-down path, fusion.

    All maps are resized to the finest level, concatenated, fused by a 3x3 block, and classified by a 1x1 convolution
    after channel dropout. With an auxiliary head (one 3x3 block of `AUXILIARY` channels on the level of stride 16, and
    a classifier) logits come as a pair. With one level it is pyramid pooling and fusion.
    """

    AUXILIARY = 256

    def __init__(self, levels: Sequence[LevelSpec], num_classes: int, options: Options) -> None:
        super().__init__()
        width = options["width"]
        channels = [level.channels for level in levels]
        self.names = tuple(level.name for level in levels)
        self.norms = nn.ModuleList(ChannelNorm(c) if options["norm_inputs"] else nn.Identity() for c in channels)
        self.pyramid = PyramidPooling(channels[-1], width)
        self.top_down = TopDown(channels[:-1], width)
        self.fuse = ConvNormAct(len(levels) * width, width, kernel=3)
        self.dropout = nn.Dropout2d(options["dropout"])
        self.classify = _classifier(width, num_classes)
        self.auxiliary = nn.ModuleList()
        self.auxiliary_level = _auxiliary_level(levels)
        if options["aux"]:
            c = channels[self.auxiliary_level]
            self.auxiliary.append(ConvNormAct(c, self.AUXILIARY, kernel=3))
            self.auxiliary.append(nn.Dropout2d(options["dropout"]))
            self.auxiliary.append(_classifier(self.AUXILIARY, num_classes))

    def forward(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """Features by level name -> logits [B, K, H, W] at the finest level, then the auxiliary ones in training."""
        levels = [norm(features[name]) for name, norm in zip(self.names, self.norms, strict=True)]
        maps = self.top_down(levels[:-1], self.pyramid(levels[-1]))
        size = (maps[0].shape[2], maps[0].shape[3])
        fused = self.fuse(torch.cat([maps[0], *(resize(m, size) for m in maps[1:])], dim=1))
        logits = [self.classify(self.dropout(fused))]
        if self.auxiliary and self.training:
            x = levels[self.auxiliary_level]
            for layer in self.auxiliary:
                x = layer(x)
            logits.append(x)
        return logits


def _classifier(channels: int, num_classes: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


def _auxiliary_level(levels: Sequence[LevelSpec]) -> int:
    """The index of the level of stride 16; the last but one where that is not one level, as in a plain ViT."""
    at_16 = [i for i, level in enumerate(levels) if level.stride == 16]
    return at_16[0] if len(at_16) == 1 else max(0, len(levels) - 2)


def _build_linear(inputs: HeadInput, options: Options) -> nn.Module:
    return LinearSegmenter(fine_to_coarse(inputs), inputs.num_classes("semantic"))


def _build_upernet(inputs: HeadInput, options: Options) -> nn.Module:
    if options["width"] < 1 or not 0 <= options["dropout"] < 1:
        raise SpecError(
            f"upernet needs width >= 1 and dropout in [0, 1), got {options['width']} and {options['dropout']}"
        )
    return UPerNet(fine_to_coarse(inputs), inputs.num_classes("semantic"), options)


def _loss(module: nn.Module, batch: Batch, options: Options) -> dict[str, Tensor]:
    labels = batch.targets["semantic/map"]
    assert isinstance(labels, Tensor)
    logits = module(batch.features)
    weights = {"pixels": 1.0, "auxiliary": options.get("aux_weight", 0.0)}
    return {
        name: weight * pixel_loss(x, labels, ignore=IGNORE, over_valid=options["avg_non_ignore"])
        for (name, weight), x in zip(weights.items(), logits, strict=False)
    }


def _outputs(module: nn.Module, batch: Batch, options: Options) -> list[ClassMaps]:
    return logit_maps(module(batch.features)[0])


HEADS = {
    "linear": Head(
        needs=frozenset({"semantic"}),
        build=_build_linear,
        loss=_loss,
        outputs=_outputs,
        merge=merge_labels,
        metrics=segmentation_metrics,
        options={"avg_non_ignore": True},
    ),
    "upernet": Head(
        needs=frozenset({"semantic"}),
        build=_build_upernet,
        loss=_loss,
        outputs=_outputs,
        merge=merge_labels,
        metrics=segmentation_metrics,
        options={
            "width": 512,
            "dropout": 0.1,
            "norm_inputs": False,
            "aux": False,
            "aux_weight": 0.4,
            "avg_non_ignore": True,
        },
    ),
}
