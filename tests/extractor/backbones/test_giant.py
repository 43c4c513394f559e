"""SwinV2-G: its shape, its options, and weights that take no more memory than they have bytes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor

from fcache.cache_spec import SpecError
from fcache.extractor.backbones import giant, load_backbone
from fcache.extractor.backbones.architecture import build, find_architecture
from fcache.extractor.backbones.weights import load_weights

TINY = {"embed_dim": 16, "depths": (2, 2, 6, 2), "num_heads": (1, 2, 4, 8), "norm_period": 3}


@pytest.fixture
def tiny() -> Iterator[None]:
    """SwinV2-G with 16 channels and 6 blocks in its third stage, a norm after every third."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(giant, "_SHAPE", {**giant._SHAPE, **TINY})
        find_architecture.cache_clear()
        yield
    find_architecture.cache_clear()


def test_the_giant_has_the_paper_s_2998_million_parameters_and_seven_further_norms() -> None:
    with torch.device("meta"):
        model = build(find_architecture("swinv2-g"), None)
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    # And its last norm, which no feature needs.
    assert sum(counts.values()) + 2 * 4096 == 2_997_843_680
    further = sorted({name.rsplit(".", 1)[0] for name in counts if "norm3" in name}, key=lambda n: int(n.split(".")[3]))
    assert further == [f"layers.2.blocks.{number}.norm3" for number in (5, 11, 17, 23, 29, 35, 41)]


def test_the_giant_s_windows_are_those_of_the_papers_at_their_sizes() -> None:
    architecture = find_architecture("swinv2-g")
    assert architecture.native_size == (192, 192)
    assert architecture.creation["pretrained_window_sizes"] == ((12, 12), (12, 12), (12, 12), (6, 6))
    assert (architecture.creation["depths"], architecture.creation["norm_period"]) == ((2, 2, 42, 4), 6)
    assert find_architecture("swinv2-g", 40).creation["window_size"] == ((40, 40),) * 4


def test_options_say_depths_norms_and_windows() -> None:
    name, arguments = giant.parse_giant("swinv2-g:depths=2-2-42-2,pretrained_windows=8-8-8-4")
    assert name == "swinv2-g"
    assert arguments == {"depths": (2, 2, 42, 2), "norm_period": 6, "pretrained_window_sizes": (8, 8, 8, 4)}
    assert giant.parse_giant("swinv2-g:norm_period=0")[1]["norm_period"] == 0
    assert giant.parse_giant("resnet50") == ("resnet50", {})
    for wrong, message in (
        ("swinv2-g:depth=2-2-42-2", "option of swinv2-g 'depth'; did you mean depths"),
        ("swinv2-g:depths=2-2-42", "depths=2-2-42-4, got 'depths=2-2-42'"),
        ("swinv2-g:depths=2-2-0-2", "depths=2-2-42-4"),
        ("swinv2-g:norm_period=x", "norm_period=6"),
        ("swinv2-g:", "option of swinv2-g ''"),
    ):
        with pytest.raises(SpecError, match=message):
            giant.parse_giant(wrong)


def test_further_norms_follow_their_blocks_within_a_stage(tiny: None) -> None:
    backbone = load_backbone("swinv2-g", weights="random:0", input_size=(96, 96), precision="fp32")
    state = load_weights(find_architecture("swinv2-g"), "random:0").state
    plain = SwinTransformerV2(
        img_size=96, window_size=12, embed_dim=16, depths=TINY["depths"], num_heads=TINY["num_heads"], num_classes=0,
        pretrained_window_sizes=(12, 12, 12, 6),
    ).eval()  # fmt: skip
    plain.load_state_dict({**plain.state_dict(), **{k: v for k, v in state.items() if "norm3" not in k}})
    images = torch.randn(1, 3, 96, 96)
    found = backbone.forward(images)
    with torch.inference_mode():
        x = plain.patch_embed(images)
        for i, stage in enumerate(plain.layers):
            x = stage.downsample(x)
            for j, block in enumerate(stage.blocks):
                x = block(x)
                if f"layers.{i}.blocks.{j}.norm3.weight" in state:
                    weight, bias = (state[f"layers.{i}.blocks.{j}.norm3.{kind}"] for kind in ("weight", "bias"))
                    x = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias)
            # Windows of 12 divide the maps of 24 and 12 and shrink to those of 6 and 3: plain timm is right.
            assert torch.allclose(found[f"level-{4 * 2**i}"], x.permute(0, 3, 1, 2), rtol=1e-5, atol=1e-5)
    assert sum("norm3.weight" in name for name in state) == 2


def test_its_random_weights_are_bfloat16_numbers_and_stay_so_for_bf16(tiny: None) -> None:
    architecture = find_architecture("swinv2-g")
    full, halves = load_weights(architecture, "random:3"), load_weights(architecture, "random:3", halves=True)
    assert full.sha256 == halves.sha256 != load_weights(architecture, "random:4").sha256
    assert {x.dtype for x in full.state.values()} == {torch.float32}
    assert {k for k, x in halves.state.items() if x.dtype == torch.bfloat16} == architecture.products
    assert all(torch.equal(full.state[k], x.float()) for k, x in halves.state.items())
    scales = torch.cat([v for k, v in full.state.items() if "norm" in k and k.endswith("weight")])
    assert 0.5 <= float(scales.min()) < 0.6 < 1.4 < float(scales.max()) <= 1.5


def test_a_file_in_bfloat16_gives_the_features_of_the_same_numbers_in_float32(tiny: None, tmp_path: Path) -> None:
    state = load_weights(find_architecture("swinv2-g"), "random:0").state
    files = {}
    for name, dtype in (("half", torch.bfloat16), ("full", torch.float32)):
        files[name] = tmp_path / f"{name}.safetensors"
        safetensors.torch.save_file({k: v.to(dtype) for k, v in state.items()}, files[name])
    images = torch.randn(1, 3, 64, 96)
    half, full = (load_backbone("swinv2-g", weights=str(f), input_size=(64, 96)) for f in files.values())
    assert half.spec == full.spec
    found, expected = half.forward(images), full.forward(images)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def _satvision(state: dict[str, Tensor]) -> dict[str, object]:
    """The one public file of this shape: DeepSpeed around SimMIM around the layout of the original release."""
    encoder: dict[str, Tensor] = {}
    for key, value in state.items():
        parts = key.split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) - 1)
        encoder["encoder." + ".".join(parts)] = value.bfloat16()
    encoder |= {
        "encoder.mask_token": torch.zeros(1, 1, 16),
        "encoder.layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.int64),
        "encoder.layers.0.blocks.0.attn.relative_coords_table": torch.zeros(1, 7, 7, 2),
        "encoder.norm.weight": torch.ones(128),
        "encoder.norm.bias": torch.zeros(128),
        "decoder.0.weight": torch.zeros(48, 128, 1, 1),
    }
    return {"module": encoder, "buffer_names": [], "optimizer": None, "global_steps": 7, "mp_world_size": 1}


def test_a_deepspeed_checkpoint_with_other_depths_loads_strictly(tiny: None, tmp_path: Path) -> None:
    model = "swinv2-g:depths=2-2-6-4"
    state = load_weights(find_architecture(model), "random:0").state
    torch.save(_satvision(state), tmp_path / "mp_rank_00_model_states.pt")
    loaded = load_weights(find_architecture(model), str(tmp_path / "mp_rank_00_model_states.pt"), halves=True)
    assert loaded.state.keys() == state.keys()
    assert all(torch.equal(loaded.state[k].float(), v) for k, v in state.items())


def test_without_weights_of_its_own_the_giant_says_what_to_do(tiny: None) -> None:
    with pytest.raises(SpecError, match=r"no weights of swinv2-g are public; .*--weights FILE.*random:0.*swinv2-l"):
        load_weights(find_architecture("swinv2-g"), "pretrained")
