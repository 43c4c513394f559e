"""Tiny members of the windowed families, registered with timm so that they take the same way as the real ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models import register_model
from timm.models._builder import build_model_with_cfg
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fcache.extractor.backbones.architecture import find_architecture
from fcache.extractor.backbones.weights import load_weights

SWIN = {"img_size": 64, "embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}
VIT = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 2}

_CFG = {
    "input_size": (3, 64, 64),
    "fixed_input_size": True,
    "num_classes": 10,
    "classifier": "head.fc",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
    "interpolation": "bicubic",
}
default_cfgs: dict[str, Any] = {
    name: dict(_CFG)
    for name in ("tiny_swinv2_window4_64", "tiny_swin_window4_64", "tiny_swinv2_cr_64", "tiny_beit_64", "tiny_vit_64")
}
for _plain in ("tiny_beit_64", "tiny_vit_64"):
    default_cfgs[_plain]["classifier"] = "head"


@register_model
def tiny_swinv2_window4_64(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    # The last stage's map of 2x2 clamps its window, as in swinv2_*_window16_256 and window12_192.
    arguments = {**SWIN, "window_size": 4, **kwargs}
    return build_model_with_cfg(SwinTransformerV2, "tiny_swinv2_window4_64", pretrained, **arguments)


@register_model
def tiny_swin_window4_64(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(
        SwinTransformer, "tiny_swin_window4_64", pretrained, **{**SWIN, "window_size": 4, **kwargs}
    )


@register_model
def tiny_swinv2_cr_64(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(
        SwinTransformerV2Cr, "tiny_swinv2_cr_64", pretrained, **{**SWIN, "window_ratio": 4, **kwargs}
    )


@register_model
def tiny_beit_64(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    arguments = {**VIT, "use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.1, **kwargs}
    return build_model_with_cfg(Beit, "tiny_beit_64", pretrained, **arguments)


@register_model
def tiny_vit_64(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(VisionTransformer, "tiny_vit_64", pretrained, **{**VIT, **kwargs})


@register_model
def tiny_mute(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    # Any module may be registered with timm; this one has no intermediate features.
    return nn.Flatten()


@pytest.fixture
def state_of() -> Callable[[str], dict[str, Tensor]]:
    """Random weights of a model by name, under timm's keys."""
    return lambda name: dict(load_weights(find_architecture(name), "random:0").state)


@pytest.fixture
def public_model(tmp_path: Path) -> str:
    """The name of a model whose public weights lie in a local file: 10 classes, seed 3."""
    name = f"tiny_public_{tmp_path.name}".replace("-", "_")

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(VisionTransformer, name, pretrained, **{**VIT, **kwargs})

    torch.manual_seed(3)
    path = tmp_path / "public.pth"
    torch.save(entrypoint(num_classes=10, pretrained_cfg=dict(_CFG, architecture=name)).state_dict(), path)
    default_cfgs[name] = dict(_CFG, classifier="head", file=str(path))
    entrypoint.__name__ = name
    register_model(entrypoint)
    return name
