"""Action recognition in clips: `linear`, `temporal` and `global` heads on one level. Labels `clip/label`.

"Could Giant Pretrained Image Models Extract Universal Representations?", Table 4.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcache.cache_spec import LevelSpec, SpecError, View
from fcache.heads.batches import Batch
from fcache.heads.head import Head, HeadInput, Options, ParameterGroup
from fcache.heads.metrics import Metric, clip_metric
from fcache.heads.parts import find_level
from fcache.heads.parts.clip_attention import OverAll, OverTime, OverWindows
from fcache.heads.parts.clip_heads import TIMES, BlocksHead, LinearHead
from fcache.heads.parts.logits import average_logits

LINEAR_OPTIONS: Options = {"level": "", "dropout": 0.5, "norm_inputs": False}
TEMPORAL_OPTIONS: Options = {
    "level": "",
    "blocks": 4,
    "width": 0,
    "attention_heads": 0,
    "mlp_ratio": 4.0,
    "dropout": 0.5,
    "drop_path": 0.2,
    "times": "zero",
    "norm_inputs": False,
}
GLOBAL_OPTIONS: Options = {**TEMPORAL_OPTIONS, "window": ()}


def _linear_level(available: Sequence[LevelSpec], options: Options) -> tuple[str, ...]:
    return (find_level(available, options["level"]),)


def _timed_level(available: Sequence[LevelSpec], options: Options) -> tuple[str, ...]:
    """The level that is named, else the last one with frames and positions, with frames, or of all."""
    by_axes = [[x for x in available if set(axes) <= set(x.dims.split())] for axes in ("THW", "T", "")]
    return (find_level(available if options["level"] else next(filter(None, by_axes)), options["level"]),)


def _check_linear(inputs: HeadInput, options: Options) -> None:
    _check_rates(options, "dropout")
    inputs.num_classes("clip")


def _check_blocks(inputs: HeadInput, options: Options) -> None:
    _check_rates(options, "dropout", "drop_path")
    inputs.num_classes("clip")
    level = inputs.levels[0]
    if "T" not in level.dims.split():
        raise SpecError(
            f"this head looks along time, level {level.name!r} has the axes {level.dims!r}; "
            "choose a level with frames, or the head 'linear'"
        )
    if options["blocks"] < 1 or options["mlp_ratio"] <= 0:
        raise SpecError(f"blocks and mlp_ratio are positive, got {options['blocks']} and {options['mlp_ratio']}")
    if options["width"] < 0 or options["attention_heads"] < 0:
        raise SpecError(
            f"width and attention_heads are not negative, got {options['width']} and {options['attention_heads']}"
        )
    if options["times"] not in TIMES:
        raise SpecError(f"times is one of {', '.join(TIMES)}, got {options['times']!r}")
    width = options["width"] or level.channels
    if options["attention_heads"] and width % options["attention_heads"]:
        raise SpecError(f"attention_heads divide the width, {width}; got {options['attention_heads']}")
    window = options.get("window", ())
    if window and (len(window) != 3 or any(n < 1 or n != int(n) for n in window)):
        raise SpecError(f"window is frames, rows and columns, for example 8,7,7, got {window}")


def _check_rates(options: Options, *names: str) -> None:
    for name in names:
        if not 0 <= options[name] < 1:
            raise SpecError(f"option {name} is in [0, 1), got {options[name]}")


def _build_linear(inputs: HeadInput, options: Options) -> nn.Module:
    return LinearHead(inputs.levels[0], inputs.num_classes("clip"), options)


def _build_temporal(inputs: HeadInput, options: Options) -> nn.Module:
    def look(width: int, heads: int, number: int) -> nn.Module:
        return OverTime(width, heads=heads)

    return BlocksHead(inputs.levels[0], inputs.num_classes("clip"), look, options)


def _build_global(inputs: HeadInput, options: Options) -> nn.Module:
    def look(width: int, heads: int, number: int) -> nn.Module:
        if not options["window"]:
            return OverAll(width, heads=heads)
        t, h, w = (int(n) for n in options["window"])
        return OverWindows(width, heads=heads, window=(t, h, w), shifted=number % 2 == 1)

    return BlocksHead(inputs.levels[0], inputs.num_classes("clip"), look, options)


def _groups(module: nn.Module, options: Options) -> tuple[ParameterGroup, ...]:
    """Weight decay leaves alone what says where something is, as in Video Swin, beside norms and biases."""
    named = dict(module.named_parameters())
    places = ("times", "biases")
    undecayed = [p for name, p in named.items() if p.ndim <= 1 or name.rpartition(".")[2] in places]
    return (ParameterGroup(tuple(named.values()), undecayed=tuple(undecayed)),)


def _loss(module: nn.Module, batch: Batch, options: Options) -> dict[str, Tensor]:
    labels = batch.targets["clip/label"]
    assert isinstance(labels, Tensor)
    return {"classes": F.cross_entropy(module(batch.features).float(), labels.long())}


def _outputs(module: nn.Module, batch: Batch, options: Options) -> list[Tensor]:
    return list(module(batch.features).float())


def _merge(outputs: Sequence[Tensor], views: Sequence[View], options: Options) -> Tensor:
    """Logits [1 + V, classes]: of the video, by the mean softmax of its V views, and of each of them."""
    return torch.stack([average_logits(outputs), *outputs]).cpu()


def _metrics(inputs: HeadInput, options: Options) -> Metric:
    return clip_metric(inputs.num_classes("clip"))


_video_head = partial(
    Head,
    needs=frozenset({"clip"}),
    loss=_loss,
    outputs=_outputs,
    merge=_merge,
    metrics=_metrics,
)
HEADS = {
    "linear": _video_head(build=_build_linear, levels=_linear_level, check=_check_linear, options=LINEAR_OPTIONS),
    "temporal": _video_head(
        build=_build_temporal, levels=_timed_level, check=_check_blocks, groups=_groups, options=TEMPORAL_OPTIONS
    ),
    "global": _video_head(
        build=_build_global, levels=_timed_level, check=_check_blocks, groups=_groups, options=GLOBAL_OPTIONS
    ),
}
