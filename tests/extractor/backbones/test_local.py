"""Plain ViTs with windows in all blocks but four: known answers of the ViT detection paper's form."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import window_partition, window_unpartition
from torch import Tensor, nn

from fcache.cache_spec import SpecError
from fcache.extractor.backbones import load_backbone
from fcache.extractor.backbones.architecture import choose_taps, find_architecture, level_specs, run_taps
from fcache.extractor.backbones.construction import skeleton
from fcache.extractor.backbones.local import _attend, attend_locally, quarter_blocks

# Blocks 1, 3, 5 and 7 see the whole map.
VIT = {
    "img_size": 64,
    "patch_size": 16,
    "embed_dim": 32,
    "depth": 8,
    "num_heads": 2,
    "num_classes": 0,
    "global_pool": "",
}


def vit(**changes) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(**{**VIT, "dynamic_img_size": True, "init_values": 0.5, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval().requires_grad_(False)


def maps(model: nn.Module, images: Tensor, indices: list[int]) -> list[Tensor]:
    return model.forward_intermediates(
        images, indices=indices, norm=False, stop_early=True, output_fmt="NCHW", intermediates_only=True
    )


@pytest.mark.parametrize("changes", [{}, {"reg_tokens": 3}, {"no_embed_class": True}, {"pre_norm": True}])
def test_windows_as_large_as_the_map_are_the_plain_model_without_its_class_token(changes: dict) -> None:
    model = vit(**changes)
    bare = vit(**{**changes, "class_token": False, "reg_tokens": 0, "no_embed_class": False})
    state = {k: v for k, v in model.state_dict().items() if k not in ("cls_token", "reg_token")}
    state["pos_embed"] = state["pos_embed"][:, -16:]
    bare.load_state_dict(state, strict=True)
    images = torch.randn(2, 3, 64, 64)
    expected = maps(bare, images, list(range(8)))
    attend_locally(model, 4)
    for a, b in zip(maps(model, images, list(range(8))), expected, strict=True):
        assert a.shape == (2, 32, 4, 4)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_vit_b_at_its_native_size_has_one_window_of_14() -> None:
    """At 224 the grid is 14 x 14: the blocks with windows and those without compute the same."""
    attention = VisionTransformer(img_size=224, embed_dim=48, depth=1, num_heads=2).eval().blocks[0].attn
    x = torch.randn(2, 196, 48)
    with torch.no_grad():
        assert torch.equal(_attend(attention, x, (14, 14), 14), _attend(attention, x, (14, 14), None))


@pytest.mark.parametrize("size", [(6, 6), (5, 7), (3, 3), (8, 2)])
def test_windows_are_cut_and_padded_as_in_sam(size: tuple[int, int]) -> None:
    attention = vit().blocks[0].attn
    x = torch.randn(2, size[0] * size[1], 32)
    windows, padded = window_partition(x.view(2, *size, 32), 3)
    expected = window_unpartition(attention(windows.flatten(1, 2)).view(-1, 3, 3, 32), 3, size, padded)
    torch.testing.assert_close(_attend(attention, x, size, 3), expected.flatten(1, 2), rtol=1e-6, atol=1e-6)


def test_a_change_stays_in_its_window_until_a_block_sees_everything() -> None:
    model = vit()
    attend_locally(model, 3)
    assert quarter_blocks(8) == (1, 3, 5, 7)
    images = torch.randn(1, 3, 128, 96)
    other = images.clone()
    # The patch in row 4, column 1: window rows 3 to 5, columns 0 to 2.
    other[:, :, 64:80, 16:32] += 1
    changed = [
        (a - b).abs().amax(1)[0] > 0 for a, b in zip(*(maps(model, x, [0, 1]) for x in (images, other)), strict=True)
    ]
    expected = torch.zeros(8, 6, dtype=torch.bool)
    expected[3:6, 0:3] = True
    assert torch.equal(changed[0], expected)
    assert changed[1].all()


@pytest.mark.parametrize(
    ("model", "blocks", "channels", "parameters"),
    [("vit-b-det", (2, 5, 8, 11), 768, 85.8), ("vit-l-det", (5, 11, 17, 23), 1024, 303.3)],
)
def test_the_papers_models_give_four_maps_of_stride_16(
    model: str, blocks: tuple[int, ...], channels: int, parameters: float
) -> None:
    architecture = find_architecture(model)
    assert architecture.local_window == 14
    assert architecture.family.endswith("patch16_224")
    network = skeleton(architecture, architecture.native_size)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(parameters, abs=0.05)
    taps = choose_taps(architecture, None)
    assert quarter_blocks(len(architecture.taps)) == blocks
    levels = level_specs(network, (1024, 1024), taps)
    assert [level.name for level in levels] == [f"block-{i}" for i in blocks]
    assert {(level.shape, level.stride) for level in levels} == {((channels, 64, 64), 16)}
    assert find_architecture(model, 7).local_window == 7


def test_any_plain_vit_takes_a_window_and_it_is_part_of_the_identity() -> None:
    common = {"weights": "random:0", "input_size": (64, 64), "precision": "fp32"}
    plain = load_backbone("tiny_vit_64", **common)
    local = load_backbone("tiny_vit_64", window=2, **common)
    assert plain.spec.weights_sha256 == local.spec.weights_sha256
    assert plain.spec.arguments != local.spec.arguments
    stated = {k: local.spec.arguments[k] for k in ("local_window", "global_blocks", "prefix_tokens", "pad_mode")}
    assert stated == {
        "local_window": 2,
        "global_blocks": [0, 1, 2, 3],
        "prefix_tokens": "dropped before the blocks",
        "pad_mode": "pad-after-norm",
    }
    assert "local_window" not in plain.spec.arguments
    images = torch.randn(2, 3, 96, 64)
    features = local.forward(images)
    assert {x.shape for x in features.values()} == {(2, 32, 6, 4)}
    alone = local.forward(images[1:])
    for name, x in features.items():
        torch.testing.assert_close(x[1:], alone[name], rtol=1e-5, atol=1e-5)
        assert not torch.equal(x, plain.forward(images)[name])


def test_windows_that_no_plain_vit_can_have_are_errors() -> None:
    with pytest.raises(SpecError, match="positive size"):
        find_architecture("tiny_vit_64", 0)
    with pytest.raises(SpecError, match="no windows to change"):
        find_architecture("tiny_vit_64", (7, 7))
    with pytest.raises(SpecError, match="no windows to change"):
        find_architecture("mobilenetv2_050", 7)


def test_taps_stop_at_the_last_that_is_asked_for() -> None:
    model = vit()
    attend_locally(model, 3)
    images = torch.randn(1, 3, 64, 64)
    whole = maps(model, images, list(range(8)))
    for i in range(3, 8):
        model.blocks[i] = nn.Identity()
    taps = choose_taps(find_architecture("tiny_vit_64"), ["block-0", "block-2"])
    found = run_taps(model, images, taps)
    assert list(found) == ["block-0", "block-2"]
    for i, x in zip((0, 2), found.values(), strict=True):
        assert torch.equal(x, whole[i])
