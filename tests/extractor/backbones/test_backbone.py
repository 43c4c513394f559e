"""A loaded backbone: equal to plain timm where timm is right, one set of weights for every canvas, levels, identity."""

import functools
import json
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
from torch import Tensor, nn

from fcache.cache_spec import BackboneSpec, LevelSpec, SpecError, canonical_json, from_json
from fcache.extractor.backbones import SHORT_NAMES, Backbone, load_backbone
from fcache.extractor.backbones.architecture import find_architecture

StateOf = Callable[[str], dict[str, Tensor]]
TINY = ("tiny_swinv2_window4_64", "tiny_swin_window4_64", "tiny_swinv2_cr_64")


@functools.cache
def _load(model: str, size: tuple[int, int] = (64, 64), **options: object) -> Backbone:
    return load_backbone(model, **{"weights": "random:0", "input_size": size, "precision": "fp32", **options})


def _plain(model: str, state: dict[str, Tensor], **arguments: object) -> nn.Module:
    """timm's own model with the weights in `state`; its final norms and head stay random, no map depends on them."""
    plain = timm.create_model(model, pretrained=False, num_classes=0, **arguments).eval()
    assert not plain.load_state_dict(state, strict=False).unexpected_keys
    return plain


def _maps(model: nn.Module, images: Tensor, indices: list[int]) -> list[Tensor]:
    with torch.inference_mode():
        return model.forward_intermediates(images, indices=indices, norm=False, intermediates_only=True)


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    ("model", "indices", "size"),
    [
        *((name, [0, 1, 2, 3], (64, 64)) for name in TINY),
        ("tiny_vit_64", [0, 1, 2, 3], (64, 64)),
        ("tiny_beit_64", [0, 1, 2, 3], (64, 64)),
        ("test_vit", [0, 1, 2, 3, 4, 5], (160, 160)),
        ("test_convnext", [0, 1, 2, 3], (96, 64)),
        ("test_resnet", [1, 2, 3, 4], (96, 64)),
        ("test_efficientnet", [1, 2, 3, 4], (64, 96)),
    ],
)
def test_features_are_timms_bit_for_bit_at_the_native_size(
    model: str, indices: list[int], size: tuple[int, int], state_of: StateOf
) -> None:
    levels = tuple(f"block-{i}" for i in indices) if "vit" in model or "beit" in model else None
    backbone = _load(model, size, levels=levels)
    images = torch.randn(2, 3, *size)
    found = backbone.forward(images)
    expected = _maps(_plain(model, state_of(model)), images, indices)
    assert [tuple(x.shape[1:]) for x in expected] == [level.shape for level in backbone.levels_at(size)]
    assert list(found) == [level.name for level in backbone.levels_at(size)]
    for x, y in zip(found.values(), expected, strict=True):
        assert torch.equal(x, y)
        assert x.dtype == torch.float32
        assert x.is_contiguous()


@pytest.mark.filterwarnings("ignore::UserWarning")  # timm's resampling of tables
@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("size", [(128, 128), (64, 192)], ids=str)
def test_one_set_of_weights_gives_what_timm_built_at_each_size_gives(
    model: str, size: tuple[int, int], state_of: StateOf
) -> None:
    # Windows of 4 divide every map at these sizes, so that plain timm is right.
    backbone = _load(model)
    images = torch.randn(2, 3, *size)
    found = backbone.forward(images)
    state = state_of(model)
    arguments = find_architecture(model).creation
    plain = timm.create_model(model, pretrained=False, num_classes=0, img_size=size, **arguments).eval()
    if model == "tiny_swin_window4_64":
        state = timm.models.swin_transformer.checkpoint_filter_fn(state, plain)
    plain.load_state_dict({**plain.state_dict(), **state})
    for x, y in zip(found.values(), _maps(plain, images, [0, 1, 2, 3]), strict=True):
        assert torch.equal(x, y)


@pytest.mark.filterwarnings("ignore::UserWarning")  # timm's resampling of tables
def test_beit_serves_other_sizes_with_its_tables_resampled(state_of: StateOf) -> None:
    backbone = _load("tiny_beit_64", levels=("block-1", "block-3"))
    images = torch.randn(1, 3, 96, 128)
    plain = timm.create_model("tiny_beit_64", pretrained=False, num_classes=0, img_size=(96, 128)).eval()
    plain.load_state_dict(
        {**plain.state_dict(), **timm.models.beit.checkpoint_filter_fn(state_of("tiny_beit_64"), plain)}
    )
    for x, y in zip(backbone.forward(images).values(), _maps(plain, images, [1, 3]), strict=True):
        assert torch.equal(x, y)
        assert x.shape[-2:] == (6, 8)


def test_a_model_that_only_takes_a_larger_input_keeps_the_wrong_window_in_its_last_stage(state_of: StateOf) -> None:
    """Why every canvas has its own construction: timm's dynamic_img_size fixes windows and shifts at the first size."""
    model = "tiny_swinv2_window4_64"
    images = torch.randn(1, 3, 128, 128)
    found = list(_load(model).forward(images).values())
    creation = find_architecture(model).creation
    dynamic = _maps(_plain(model, state_of(model), dynamic_img_size=True, **creation), images, [0, 1, 2, 3])
    assert all(torch.equal(x, y) for x, y in zip(found[:2], dynamic[:2], strict=True))
    assert _relative(found[3], dynamic[3]) > 0.01


def test_going_back_to_a_canvas_gives_the_same_bits_after_many_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcache.extractor.backbones.construction._KEPT_SIZES", 2)
    backbone = load_backbone("tiny_swinv2_window4_64", weights="random:0", input_size=(64, 64), precision="fp32")
    images = torch.randn(1, 3, 96, 64)
    first = backbone.forward(images)
    for width in (32, 64, 96):
        backbone.forward(torch.randn(1, 3, 32, width))
    again = backbone.forward(images)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("model", [*TINY, "tiny_vit_64", "test_convnext", "test_resnet"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_batch_of_four_gives_the_features_of_each_image_alone(model: str, precision: str) -> None:
    backbone = _load(model, precision=precision)
    images = torch.randn(4, 3, 64, 64)
    together = backbone.forward(images)
    alone = [backbone.forward(images[i : i + 1]) for i in range(4)]
    for name, x in together.items():
        expected = torch.cat([one[name] for one in alone])
        # Convolutions may choose another kernel for another batch size; attention and linear layers do not here.
        assert _relative(x, expected) <= (0.01 if precision == "bf16" else 1e-5)
        if model in TINY and precision == "fp32":
            assert torch.equal(x, expected)


@pytest.mark.parametrize("model", ["tiny_swinv2_window4_64", "tiny_vit_64", "test_convnext"])
def test_bf16_is_near_fp32_and_is_not_fp32(model: str) -> None:
    images = torch.randn(2, 3, 64, 64)
    exact = _load(model).forward(images)
    near = _load(model, precision="bf16").forward(images)
    for name, x in near.items():
        assert x.dtype == torch.float32
        assert 1e-4 < _relative(x, exact[name]) < 0.03


@pytest.fixture
def reduced_products() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


def test_fp32_is_strict_whatever_the_process_allows(reduced_products: None, state_of: StateOf) -> None:
    images = torch.randn(2, 3, 64, 64)
    backbone = _load("tiny_swinv2_window4_64")
    with torch.autocast("cpu", torch.bfloat16):
        found = backbone.forward(images)
    assert torch.get_float32_matmul_precision() == "medium"
    torch.set_float32_matmul_precision("highest")
    expected = _maps(_plain("tiny_swinv2_window4_64", state_of("tiny_swinv2_window4_64")), images, [0, 1, 2, 3])
    assert all(torch.equal(x, y) for x, y in zip(found.values(), expected, strict=True))


def test_a_head_can_be_trained_on_live_features() -> None:
    features = _load("test_resnet").forward(torch.randn(1, 3, 64, 64))
    head = nn.Conv2d(features["level-32"].shape[1], 3, 1)
    head(features["level-32"]).sum().backward()
    assert head.weight.grad is not None
    assert not features["level-32"].requires_grad


def test_the_levels_of_swinv2_have_the_papers_shapes() -> None:
    backbone = _load("swinv2-t", (128, 128))
    for size in (512, 1024):
        assert backbone.levels_at((size, size)) == tuple(
            LevelSpec(f"level-{s}", "C H W", (96 * s // 4, size // s, size // s), s) for s in (4, 8, 16, 32)
        )
    assert backbone.levels_at((480, 640))[3].shape == (768, 15, 20)
    assert [level.shape for level in backbone.spec.levels] == [(96, 0, 0), (192, 0, 0), (384, 0, 0), (768, 0, 0)]
    assert backbone.size_multiple == 32


@pytest.mark.parametrize(
    ("model", "multiple", "taps"),
    [
        ("resnet18", 32, ["level-2", "level-4", "level-8", "level-16", "level-32"]),
        ("mobilenetv2_100", 32, ["level-2", "level-4", "level-8", "level-16", "level-32"]),
        ("tresnet_m", 32, ["level-4", "level-8", "level-16", "level-32"]),
        ("efficientvit_m0", 64, ["level-16", "level-32", "level-64"]),
        ("vit_small_patch14_dinov2", 28, [f"block-{i}" for i in range(12)]),
        ("vit_small_patch16_224", 32, [f"block-{i}" for i in range(12)]),
    ],
)
def test_levels_are_named_by_stride_or_block(model: str, multiple: int, taps: list[str]) -> None:
    architecture = find_architecture(model)
    assert [tap.name for tap in architecture.taps] == taps
    assert architecture.size_multiple == multiple


def test_the_usual_levels_are_strides_4_to_32_and_four_blocks_of_a_plain_vit() -> None:
    assert [x.name for x in _load("test_resnet").spec.levels] == ["level-4", "level-8", "level-16", "level-32"]
    assert [x.name for x in _load("vit_tiny_patch16_224").spec.levels] == [f"block-{i}" for i in (2, 5, 8, 11)]


def test_levels_can_be_chosen_in_any_order_and_form() -> None:
    assert [x.name for x in _load("test_resnet", levels=("32", "level-2")).spec.levels] == ["level-2", "level-32"]
    blocks = _load("test_vit", levels=("block-5", "block-0"))
    assert [(x.name, x.stride) for x in blocks.spec.levels] == [("block-0", 16), ("block-5", 16)]
    with pytest.raises(SpecError, match=r"no level '64'; it has level-2, level-4"):
        _load("test_resnet", levels=("64",))
    with pytest.raises(SpecError, match=r"no level 'block-6'; it has block-0"):
        _load("test_vit", levels=("block-6",))
    with pytest.raises(SpecError, match="at least one"):
        _load("test_vit", levels=())


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(SpecError, match="did you mean swinv2-"):
        _load("swinv2-x")
    with pytest.raises(SpecError, match="resnet50"):
        _load("resnet-50")
    with pytest.raises(SpecError, match=r"vit_tiny_patch16_224\.augreg_in21k"):
        _load("vit_tiny_patch16_224.augreg_in22k")


def test_a_model_without_intermediate_features_is_refused() -> None:
    with pytest.raises(SpecError, match="tiny_mute gives no intermediate features"):
        _load("tiny_mute")


def test_sizes_and_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SpecError, match="multiples of 32, got 100x64; the nearest is 96x64"):
        _load("test_resnet", (100, 64))
    with pytest.raises(SpecError, match="multiples of 32"):
        _load("test_resnet").forward(torch.randn(1, 3, 40, 64))
    with pytest.raises(SpecError, match="precision is one of fp32, bf16"):
        _load("test_resnet", precision="fp16")
    with pytest.raises(SpecError, match="no windows"):
        _load("test_resnet", window=8)
    with pytest.raises(SpecError, match="4 stages"):
        _load("tiny_swinv2_window4_64", window=(4, 4, 4))


def test_a_model_whose_weights_depend_on_the_input_size_says_so() -> None:
    with pytest.raises(SpecError, match=r"pos_embed of hiera_tiny_224 .* use 224x224"):
        _load("hiera_tiny_224", (64, 64))


def test_a_native_size_is_served_even_where_its_stride_does_not_divide_it() -> None:
    assert find_architecture("efficientvit_m0").size_multiple == 64
    backbone = _load("efficientvit_m0", (224, 224))
    assert [level.shape[1:] for level in backbone.levels_at((224, 224))] == [(14, 14), (7, 7)]
    assert {x.shape[-1] for x in backbone.forward(torch.randn(1, 3, 224, 224)).values()} == {14, 7}


def test_mvit_does_not_read_past_its_position_tables() -> None:
    backbone = _load("mvitv2_tiny", (224, 224))
    found = backbone.forward(torch.randn(1, 3, 256, 256))
    assert found["level-32"].shape[-2:] == (8, 8)
    assert bool(torch.isfinite(found["level-32"]).all())
    with pytest.raises(SpecError, match="mvitv2_tiny cannot be built for 256x288"):
        backbone.levels_at((256, 288))


def test_a_window_can_be_replaced_and_keeps_the_scale_of_pre_training() -> None:
    backbone = _load("tiny_swinv2_window4_64", (128, 128), window=8)
    arguments = backbone.spec.arguments
    assert [stage["window"] for stage in arguments["windows"]] == [[8, 8], [8, 8], [8, 8], [4, 4]]
    assert [stage["shift"] for stage in arguments["windows"]] == [[4, 4], [4, 4], [0, 0], [0, 0]]
    assert arguments["creation"]["pretrained_window_sizes"] == [[4, 4], [4, 4], [4, 4], [2, 2]]
    images = torch.randn(1, 3, 128, 128)
    other = _load("tiny_swinv2_window4_64", (128, 128))
    assert _relative(backbone.forward(images)["level-8"], other.forward(images)["level-8"]) > 0.01
    per_stage = _load("tiny_swinv2_window4_64", (128, 128), window=(8, 8, 8, 8))
    assert canonical_json(per_stage.spec) == canonical_json(backbone.spec)


def test_the_identity_says_what_changes_numbers_and_nothing_else() -> None:
    spec = _load("tiny_swinv2_window4_64").spec
    assert spec.arguments == {
        "creation": {
            "window_size": [[4, 4]] * 4,
            "pretrained_window_sizes": [[4, 4], [4, 4], [4, 4], [2, 2]],
        },
        "interpolation": "bicubic",
        "norm": "none",
        "windows": [
            {"window": [4, 4], "shift": [2, 2]},
            {"window": [4, 4], "shift": [2, 2]},
            {"window": [4, 4], "shift": [0, 0]},
            {"window": [2, 2], "shift": [0, 0]},
        ],
        "pad_mode": "pad-then-roll",
    }
    assert (spec.mean, spec.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert from_json(BackboneSpec, json.loads(canonical_json(spec))) == spec
    same = _load("tiny_swinv2_window4_64", window=4).spec
    assert same == spec
    larger = _load("tiny_swinv2_window4_64", (128, 128)).spec
    assert larger.weights_sha256 == spec.weights_sha256
    assert larger.arguments["windows"][3] == {"window": [4, 4], "shift": [0, 0]}
    vit = _load("tiny_vit_64").spec.arguments
    assert vit["prefix_tokens"] == "dropped"
    assert vit["creation"] == {"dynamic_img_size": True}


def test_a_short_name_is_its_timm_name() -> None:
    name = SHORT_NAMES["swinv2-t"]
    assert find_architecture("swinv2-t") == find_architecture(name)
    assert find_architecture("swinv2-t").family == "swinv2_tiny_window8_256"
    assert {k: v.partition(".")[2] for k, v in SHORT_NAMES.items()} == {
        "swinv2-t": "ms_in1k",
        "swinv2-s": "ms_in1k",
        "swinv2-b": "ms_in22k",
        "swinv2-l": "ms_in22k",
        "swinv2-g": "",
        "vit-b-det": "mae",
        "vit-l-det": "mae",
    }
