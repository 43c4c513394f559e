"""Semantic segmentation: `linear`, `fcn` and `upernet`. Labels `semantic/map`, scores at original size."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from fcache.cache_spec import IGNORE, LevelSpec, SpecError
from fcache.heads.batches import Batch
from fcache.heads.head import Head, HeadInput, Options
from fcache.heads.parts import FCN, UPERNET_OPTIONS, ChannelNorm, UPerNet, adapted_levels, find_level, resize
from fcache.heads.parts.classmaps import ClassMaps, logit_maps, merge_labels
from fcache.heads.parts.levels import fine_to_coarse
from fcache.heads.parts.segmentation import check_segmentation, pixel_loss, segmentation_metrics
from fcache.heads.parts.upernet import check_upernet


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


class FCNSegmenter(nn.Module):
    """mmsegmentation's FCNHead on one level."""

    def __init__(self, level: LevelSpec, num_classes: int, options: Options) -> None:
        super().__init__()
        self.name = level.name
        self.norm = ChannelNorm(level.channels) if options["norm_inputs"] else nn.Identity()
        self.fcn = FCN(
            level.channels,
            num_classes,
            width=options["width"],
            num_convs=options["num_convs"],
            concat_input=options["concat_input"],
            dropout=options["dropout"],
        )

    def forward(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """Features by level name -> [logits [B, K, H, W]] at the level's size."""
        return [self.fcn(self.norm(features[self.name]))]


def _fcn_levels(available: Sequence[LevelSpec], options: Options) -> tuple[str, ...]:
    return (find_level(available, options["level"]),)


def _upernet_levels(available: Sequence[LevelSpec], options: Options) -> tuple[str, ...]:
    return adapted_levels(available, options["adaptors"])


def _build_linear(inputs: HeadInput, options: Options) -> nn.Module:
    return LinearSegmenter(fine_to_coarse(inputs), inputs.num_classes("semantic"))


def _check_fcn(inputs: HeadInput, options: Options) -> None:
    check_segmentation(inputs, options)
    if options["width"] < 1 or options["num_convs"] < 1 or not 0 <= options["dropout"] < 1:
        raise SpecError(
            f"fcn needs width >= 1, num_convs >= 1 and dropout in [0, 1), got {options['width']}, "
            f"{options['num_convs']} and {options['dropout']}"
        )


def _check_upernet(inputs: HeadInput, options: Options) -> None:
    check_segmentation(inputs, options)
    check_upernet(inputs.levels, options)


def _build_fcn(inputs: HeadInput, options: Options) -> nn.Module:
    (level,) = fine_to_coarse(inputs)
    return FCNSegmenter(level, inputs.num_classes("semantic"), options)


def _build_upernet(inputs: HeadInput, options: Options) -> nn.Module:
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
        check=check_segmentation,
        options={"avg_non_ignore": True},
    ),
    "fcn": Head(
        needs=frozenset({"semantic"}),
        build=_build_fcn,
        loss=_loss,
        outputs=_outputs,
        merge=merge_labels,
        metrics=segmentation_metrics,
        options={
            "level": "",
            "width": 512,
            "num_convs": 2,
            "concat_input": True,
            "dropout": 0.1,
            "norm_inputs": False,
            "avg_non_ignore": True,
        },
        levels=_fcn_levels,
        check=_check_fcn,
    ),
    "upernet": Head(
        needs=frozenset({"semantic"}),
        build=_build_upernet,
        loss=_loss,
        outputs=_outputs,
        merge=merge_labels,
        metrics=segmentation_metrics,
        options={**UPERNET_OPTIONS, "avg_non_ignore": True},
        levels=_upernet_levels,
        check=_check_upernet,
    ),
}
