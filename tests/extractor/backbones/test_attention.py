"""Attention with frozen weights: timm's bits in strict float32, else its numbers, and nothing kept that is large."""

from collections.abc import Callable

import pytest
import timm
import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn

from fcache.extractor.backbones import attention, construction, load_backbone
from fcache.extractor.backbones.architecture import find_architecture
from fcache.extractor.backbones.attention import pair_bias, prepare_attention
from fcache.extractor.backbones.windows import correct_windows

StateOf = Callable[[str], dict[str, Tensor]]
TINY = "tiny_swinv2_window4_64"


def _blocks(size: tuple[int, int], window: int, precision: str, *, shifted: bool, dim: int = 32) -> list[nn.Module]:
    """The same block twice, with random norms and position network: timm's, padded rightly, and ours."""
    shift = window // 2 if shifted else 0
    blocks: list[nn.Module] = []
    for _ in range(2):
        torch.manual_seed(1)
        block = SwinTransformerV2Block(dim, size, num_heads=dim // 8, window_size=window, shift_size=shift)
        with torch.no_grad():
            for name, parameter in block.named_parameters():
                if name.startswith("norm") and name.endswith("weight"):
                    parameter.uniform_(0.5, 1.5)
                elif name.endswith("bias"):
                    parameter.normal_(0, 0.05)
                elif "cpb_mlp" in name:
                    parameter.normal_(0, 0.3)
        blocks.append(block.eval().requires_grad_(False))
        correct_windows(nn.Sequential(block))
    prepare_attention(nn.Sequential(blocks[1]), precision)
    return blocks


def _relative(x: Tensor, y: Tensor) -> float:
    return float((x.float() - y.float()).norm() / y.float().norm())


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    ("size", "window"),
    [
        ((14, 21), 7),
        ((16, 16), 7),
        ((16, 24), 8),
        ((15, 20), 8),
        ((24, 24), 12),
        ((32, 44), 12),
        ((32, 32), 16),
        ((25, 40), 16),
    ],
    ids=str,
)
def test_strict_float32_has_timms_bits_up_to_windows_of_16(size: tuple[int, int], window: int, shifted: bool) -> None:
    timms, ours = _blocks(size, window, "fp32", shifted=shifted)
    x = torch.randn(2, *size, 32)
    with torch.inference_mode():
        found, expected = ours(x), timms(x)
    assert torch.equal(found, expected)
    assert _relative(found, x) > 0.1, "the block does something"


@pytest.mark.parametrize(
    ("size", "window", "shifted"),
    [((64, 32), 32, True), ((40, 50), 32, True), ((48, 32), 32, False), ((80, 40), 40, True)],
    ids=str,
)
def test_large_windows_are_within_rounding_of_timms(size: tuple[int, int], window: int, shifted: bool) -> None:
    timms, ours = _blocks(size, window, "fp32", shifted=shifted, dim=16)
    x = torch.randn(1, *size, 16)
    with torch.inference_mode():
        found, expected = ours(x), timms(x)
    assert _relative(found, expected) < 2e-6
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_a_bias_that_is_made_for_some_heads_at_a_time_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    _, kept = _blocks((40, 40), 20, "fp32", shifted=True)
    x = torch.randn(2, 40, 40, 32)
    with torch.inference_mode():
        expected = kept(x)
    monkeypatch.setattr(attention, "_KEPT_BYTES", 0)
    monkeypatch.setattr(attention, "_BIAS_BYTES", {"cpu": 3 * 4 * 400**2})
    _, made = _blocks((40, 40), 20, "fp32", shifted=True)
    with torch.inference_mode():
        assert torch.equal(made(x), expected)


@pytest.mark.parametrize("window", [(3, 5), (8, 8), (7, 12)], ids=str)
def test_the_bias_of_all_pairs_is_timms_gather(window: tuple[int, int]) -> None:
    layer = SwinTransformerV2Block(16, window, 2, window_size=window).attn
    assert layer.window_size == window
    table = torch.randn(2, 2 * window[0] - 1, 2 * window[1] - 1)
    gathered = table.flatten(1)[:, layer.relative_position_index]
    assert torch.equal(pair_bias(table.flip((1, 2)), window), gathered)


@pytest.mark.parametrize(
    ("window", "size"), [(4, (64, 64)), (7, (224, 224)), (8, (160, 96)), (16, (128, 192))], ids=str
)
def test_all_four_stages_have_timms_bits_in_float32(window: int, size: tuple[int, int], state_of: StateOf) -> None:
    backbone = load_backbone(TINY, weights="random:0", input_size=size, precision="fp32", window=window)
    creation = find_architecture(TINY, window).creation
    plain = timm.create_model(TINY, pretrained=False, num_classes=0, img_size=size, **creation).eval()
    plain.load_state_dict({**plain.state_dict(), **state_of(TINY)})
    correct_windows(plain)
    images = torch.randn(2, 3, *size)
    with torch.inference_mode():
        expected = plain.forward_intermediates(images, norm=False, intermediates_only=True)
    assert len(expected) == 4
    assert all(torch.equal(x, y) for x, y in zip(backbone.forward(images).values(), expected, strict=True))


@pytest.mark.parametrize("products", [True, False], ids=["bf16 products", "float32 products"])
def test_bf16_is_no_further_from_float32_than_timms(
    products: bool, state_of: StateOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (attention, construction):
        monkeypatch.setattr(module, "has_bf16_products", lambda device: products)
    images = torch.randn(2, 3, 96, 64)
    exact = load_backbone(TINY, weights="random:0", input_size=(96, 64), precision="fp32").forward(images)
    ours = load_backbone(TINY, weights="random:0", input_size=(96, 64), precision="bf16").forward(images)
    creation = find_architecture(TINY).creation
    plain = timm.create_model(TINY, pretrained=False, num_classes=0, img_size=(96, 64), **creation).eval()
    plain.load_state_dict({**plain.state_dict(), **state_of(TINY)})
    correct_windows(plain)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        timms = plain.forward_intermediates(images, norm=False, intermediates_only=True)
    for name, other in zip(exact, timms, strict=True):
        assert 1e-4 < _relative(ours[name], exact[name]) < 1.1 * _relative(other, exact[name])


def test_rounded_products_in_float32_are_bf16_products_in_another_order() -> None:
    from fcache.extractor.backbones.products import rounded_linear

    x, weight, bias = torch.randn(37, 64), torch.randn(48, 64).bfloat16(), torch.randn(48)
    found = rounded_linear(x.view(37, 1, 64), weight, bias, torch.bfloat16)
    exact = x.bfloat16().double() @ weight.double().T + bias.bfloat16().double()
    assert found.shape == (37, 1, 48)
    # One rounding: half a unit in the last of the eight places.
    assert float(((found[:, 0].double() - exact).abs() / exact.abs().clamp_min(1e-3)).max()) < 2**-8


def test_nothing_of_the_size_of_a_window_squared_is_kept_for_large_windows() -> None:
    block = _blocks((64, 64), 32, "fp32", shifted=True, dim=16)[1]
    assert dict(block.named_buffers()) == {}
    frozen = block._attn.args[0]
    assert frozen.bias is None
    assert frozen.table.shape == (2, 63, 63)


def test_what_bf16_changes_is_in_the_identity_and_float32_stays_as_it_was() -> None:
    bf16, fp32 = (
        load_backbone(TINY, weights="random:0", input_size=(64, 64), precision=p).spec for p in ("bf16", "fp32")
    )
    assert bf16.arguments["position_bias"] == "float32"
    assert "position_bias" not in fp32.arguments
    assert bf16.weights_sha256 == fp32.weights_sha256
    other = load_backbone("tiny_swin_window4_64", weights="random:0", input_size=(64, 64)).spec
    assert "position_bias" not in other.arguments
