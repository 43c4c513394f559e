"""SwinV2-G, the giant of "Swin Transformer V2: Scaling Up Capacity and Resolution": 3.0 G parameters, none public.

timm has no model of this shape. Its `swinv2_cr_giant` is another network: other position networks, other patch merging
and two blocks fewer. This one is timm's own Swin V2 with the paper's width and depths, and with a further LayerNorm
after every sixth block of a stage. Heads of 32 channels are stated in no paper; every public implementation has them.
"""

from collections.abc import Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import register_model
from timm.models._builder import build_model_with_cfg
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from fcache.cache_spec import SpecError, unknown_name

SHORT_NAME = "swinv2-g"
NAME = "swinv2_giant_window12_192"

# The last pre-training of the paper: images of 192 x 192, windows of 12 x 12 tokens.
_SHAPE: Mapping[str, Any] = {
    "img_size": 192,
    "window_size": 12,
    "embed_dim": 512,
    "depths": (2, 2, 42, 4),
    "num_heads": (16, 32, 64, 128),
    "norm_period": 6,
}
_OPTIONS = ("depths", "norm_period", "pretrained_windows")

# What timm's registry looks for in the module of a model.
default_cfgs: dict[str, dict[str, Any]] = {
    NAME: {
        "input_size": (3, 192, 192),
        "pool_size": (6, 6),
        "fixed_input_size": True,
        "num_classes": 21841,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
    }
}


@register_model
def swinv2_giant_window12_192(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """SwinV2-G as a model of timm's registry; `arguments` replace those of the paper's."""
    return build_model_with_cfg(build_giant, NAME, pretrained, **{**_SHAPE, **arguments})


def build_giant(*, norm_period: int, **arguments: Any) -> nn.Module:
    """timm's Swin V2 with a LayerNorm `norm3` on the output of every `norm_period`-th block of a stage (0: of none)."""
    model: Any = SwinTransformerV2(**arguments)
    for stage in model.layers:
        for number, block in enumerate(stage.blocks, start=1):
            if norm_period and number % norm_period == 0:
                block.norm3 = nn.LayerNorm(block.dim)
                block.register_forward_hook(_normed)
    return model


def parse_giant(model: str) -> tuple[str, dict[str, Any]]:
    """A model's name and its construction arguments: "swinv2-g:depths=2-2-42-2,norm_period=6" names both.

    `depths` are the blocks of the four stages, `norm_period` the blocks of a stage from one further norm to the next
    (0: none), `pretrained_windows` the windows that the stages had when the weights were trained. Of other models than
    SwinV2-G the name is all. Raises SpecError for options that are unknown or make no sense.
    """
    name, colon, text = model.partition(":")
    if name not in (SHORT_NAME, NAME):
        return model, {}
    arguments = {key: _SHAPE[key] for key in ("depths", "norm_period")}
    for option in text.split(",") if colon else ():
        key, _, value = option.partition("=")
        if key not in _OPTIONS:
            raise unknown_name(f"option of {name}", key, _OPTIONS)
        wanted = 1 if key == "norm_period" else 4
        numbers = value.split("-")
        smallest = 0 if key == "norm_period" else 1
        if len(numbers) != wanted or not all(n.isdecimal() and int(n) >= smallest for n in numbers):
            example = "6" if wanted == 1 else "2-2-42-4" if key == "depths" else "12-12-12-6"
            raise SpecError(f"{key} of {name} is written as {key}={example}, got {option!r}")
        values = tuple(int(n) for n in numbers)
        arguments["pretrained_window_sizes" if key == "pretrained_windows" else key] = (
            values[0] if wanted == 1 else values
        )
    return name, arguments


def _normed(block: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return block.norm3(output)
