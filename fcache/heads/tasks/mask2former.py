"""Mask2Former for semantic segmentation. Labels `semantic/map`, scores at original size."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial

import torch
from torch import Tensor, nn

from fcache.cache_spec import LevelSpec, SpecError
from fcache.heads.batches import Batch
from fcache.heads.head import Head, HeadInput, Options, ParameterGroup
from fcache.heads.parts import ChannelNorm, adapted_levels
from fcache.heads.parts.adaptors import adaptors_for
from fcache.heads.parts.classmaps import ClassMaps, as_they_are, merge_labels
from fcache.heads.parts.levels import fine_to_coarse
from fcache.heads.parts.mask_decoder import MaskDecoder
from fcache.heads.parts.mask_loss import MaskLoss, mask_loss
from fcache.heads.parts.pixel_decoder import PixelDecoder
from fcache.heads.parts.segmentation import check_segmentation, segmentation_metrics

TASK = "semantic"

# At stride 4 there are four times as many places as at stride 8; the paper has three levels of attention above it.
FINE_STRIDE, ENCODED = 4, 3


class Mask2Former(nn.Module):
    """Pixel decoder and transformer decoder of Mask2Former over levels, fine to coarse.

    The three coarsest levels of a stride above 4 are encoded, or the coarsest if there is none; the finer ones join in
    the top-down path. Masks have the size of the finest level. Where the option `adaptors` says so, levels of one
    stride first become four, see `SimpleAdaptors`.
    """

    def __init__(self, levels: Sequence[LevelSpec], num_classes: int, options: Options) -> None:
        super().__init__()
        width = options["width"]
        shared = {"heads": options["attention_heads"], "dropout": options["dropout"]}
        self.names = tuple(level.name for level in levels)
        self.norms = nn.ModuleList(
            ChannelNorm(level.channels) if options["norm_inputs"] else nn.Identity() for level in levels
        )
        self.adaptors, channels, strides = adaptors_for(levels, options["adaptors"])
        encoded = max(1, min(ENCODED, sum(stride > FINE_STRIDE for stride in strides)))
        self.pixels = PixelDecoder(
            channels,
            encoded=encoded,
            width=width,
            blocks=options["pixel_blocks"],
            hidden=round(width * options["pixel_mlp_ratio"]),
            **shared,
        )
        self.decoder = MaskDecoder(
            width,
            num_classes,
            levels=encoded,
            queries=options["queries"],
            blocks=options["decoder_blocks"],
            hidden=round(width * options["decoder_mlp_ratio"]),
            **shared,
        )

    def forward(self, features: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Features by level name -> class logits [B, Q, K + 1] and mask embeddings [B, Q, width] of every output, the
        last of which is the prediction, and mask features [B, width, h, w].
        """
        levels = [norm(features[name]) for name, norm in zip(self.names, self.norms, strict=True)]
        if self.adaptors is not None:
            levels = self.adaptors(levels)
        with torch.autocast(levels[0].device.type, enabled=False):
            # As the original: places to sample need more than the 8 bits of bfloat16.
            encoded, mask_features = self.pixels([x.to(torch.promote_types(x.dtype, torch.float32)) for x in levels])
        return (*self.decoder(encoded, mask_features), mask_features)


def _levels(available: Sequence[LevelSpec], options: Options) -> tuple[str, ...]:
    """All levels of stride `mask_stride` or more, or of the coarsest there is. Of those what the adaptors take."""
    finest = min(options["mask_stride"], max(level.stride for level in available))
    return adapted_levels([level for level in available if level.stride >= finest], options["adaptors"])


def _check(inputs: HeadInput, options: Options) -> None:
    at_least_one = ("pixel_blocks", "decoder_blocks", "queries", "points", "width", "attention_heads", "mask_stride")
    for name in at_least_one:
        if options[name] < 1:
            raise SpecError(f"mask2former needs {name} of at least 1, got {options[name]}")
    width, heads = options["width"], options["attention_heads"]
    if width % 4 or width % heads:
        raise SpecError(f"mask2former needs a width that 4 and attention_heads divide, got {width} and {heads} heads")
    for name in ("class_weight", "mask_weight", "dice_weight"):
        if options[name] < 0:
            raise SpecError(f"mask2former needs {name} of at least 0, got {options[name]}")
    if options["no_object_weight"] <= 0:
        # Of a batch without any label there would be nothing to average.
        raise SpecError(f"mask2former needs a no_object_weight above 0, got {options['no_object_weight']}")
    if not 0 <= options["dropout"] < 1 or not 0 <= options["importance"] <= 1 or options["oversampling"] < 1:
        raise SpecError(
            "mask2former needs dropout in [0, 1), importance in [0, 1] and oversampling of at least 1, got "
            f"{options['dropout']}, {options['importance']} and {options['oversampling']}"
        )
    for name in ("pixel_mlp_ratio", "decoder_mlp_ratio"):
        if round(width * options[name]) < 1:
            raise SpecError(f"mask2former needs {name} of at least one unit, got {options[name]}")
    check_segmentation(inputs, options)


def _build(inputs: HeadInput, options: Options) -> nn.Module:
    return Mask2Former(fine_to_coarse(inputs), inputs.num_classes("semantic"), options)


def _loss(module: nn.Module, batch: Batch, options: Options) -> dict[str, Tensor]:
    labels = batch.targets["semantic/map"]
    assert isinstance(labels, Tensor)
    config = MaskLoss(**{field.name: options[field.name] for field in fields(MaskLoss)})
    classes, embeddings, features = module(batch.features)
    return mask_loss(classes, embeddings, features, labels, config)


def _outputs(module: nn.Module, batch: Batch, options: Options) -> list[ClassMaps]:
    """Mask logits, and class scores as the sum over queries of class probability times mask probability.

    As in the reference, masks are resized to the canvas before the sigmoid, and these sums to the original size; over
    views they are averaged as they are.
    """
    classes, embeddings, features = module(batch.features)
    named = classes[-1].float().softmax(-1)[..., :-1]
    masks = torch.einsum("bqc,bchw->bqhw", embeddings[-1].float(), features.float())
    return [ClassMaps(m, partial(_class_scores, n), as_they_are) for m, n in zip(masks, named, strict=True)]


def _class_scores(named: Tensor, masks: Tensor) -> Tensor:
    """Class probabilities [Q, K] and mask logits [Q, rows, columns] -> [K, rows, columns]."""
    return torch.einsum("qk,qhw->khw", named, masks.sigmoid())


def _groups(module: nn.Module, options: Options) -> tuple[ParameterGroup, ...]:
    """One group; as in the original, norms and embeddings are not decayed, and biases are."""
    kept = (nn.LayerNorm, nn.GroupNorm, nn.Embedding)
    undecayed = tuple(p for m in module.modules() if isinstance(m, kept) for p in m.parameters(recurse=False))
    return (ParameterGroup(tuple(module.parameters()), undecayed=undecayed),)


HEADS = {
    "mask2former": Head(
        needs=frozenset({"semantic"}),
        build=_build,
        loss=_loss,
        outputs=_outputs,
        merge=merge_labels,
        metrics=segmentation_metrics,
        levels=_levels,
        groups=_groups,
        check=_check,
        options={
            # 6 and (9+1) blocks, as the paper's frozen setting; the output before the first block is not counted.
            "pixel_blocks": 6,
            "decoder_blocks": 9,
            "width": 256,
            "queries": 100,
            "attention_heads": 8,
            "pixel_mlp_ratio": 4.0,
            "decoder_mlp_ratio": 8.0,
            "dropout": 0.0,
            "norm_inputs": False,
            "mask_stride": 4,
            "adaptors": "auto",
            "points": 112 * 112,
            "oversampling": 3.0,
            "importance": 0.75,
            "class_weight": 2.0,
            "mask_weight": 5.0,
            "dice_weight": 5.0,
            "no_object_weight": 0.1,
        },
    )
}
