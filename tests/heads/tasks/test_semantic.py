from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

from fcache.cache_spec import LevelSpec, SpecError, TargetSpec
from fcache.heads import TrainConfig, choose_head, find_head, train
from fcache.heads.head import HeadInput


def _inputs(channels: tuple[int, ...], num_classes: int, strides: tuple[int, ...] = (4, 8, 16, 32)) -> HeadInput:
    names = tuple(str(k) for k in range(num_classes))
    levels = tuple(
        LevelSpec(f"l{i}", "C H W", (c, 0, 0), s) for i, (c, s) in enumerate(zip(channels, strides, strict=True))
    )
    return HeadInput(levels, (TargetSpec("semantic", "test", names, ignore=255),))


def _upernet(inputs: HeadInput, **options):
    head = find_head("semantic/upernet")
    return head.build(inputs, {**head.options, **options})


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _randomise(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            low, high = (0.5, 1.5) if name.endswith("running_var") else (-0.5, 0.5)
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)


# Where the other implementation keeps what ours calls so.
RENAMED = (
    ("pyramid.reduce.", "psp_modules."),
    ("pyramid.fuse.", "bottleneck."),
    ("top_down.lateral.", "lateral_convs."),
    ("top_down.smooth.", "fpn_convs."),
    ("fuse.", "fpn_bottleneck."),
    ("classify.", "classifier."),
)


def _theirs(name: str) -> str:
    for ours, other in RENAMED:
        if name.startswith(ours):
            name = other + name.removeprefix(ours)
            break
    if name.startswith("psp_modules."):
        _, index, rest = name.split(".", 2)
        name = f"psp_modules.{index}.1.{rest}"
    return name.replace(".norm.", ".batch_norm.")


def test_upernet_equals_the_one_of_transformers_bit_for_bit():
    channels = (6, 10, 14, 18)
    ours = _upernet(_inputs(channels, 7), width=12).eval()
    _randomise(ours)
    other = UperNetHead(SimpleNamespace(pool_scales=[1, 2, 3, 6], hidden_size=12, num_labels=7), list(channels)).eval()
    other.load_state_dict({_theirs(name): t for name, t in ours.state_dict().items()}, strict=True)
    maps = [torch.randn(2, c, 40 // 2**i, 56 // 2**i) for i, c in enumerate(channels)]
    with torch.no_grad():
        found = ours({f"l{i}": x for i, x in enumerate(maps)})[0]
        assert torch.equal(found, other(maps))


def test_the_auxiliary_head_equals_the_one_of_transformers_bit_for_bit():
    channels = (6, 10, 14, 18)
    ours = _upernet(_inputs(channels, 7), width=12, aux=True, dropout=0.0)
    _randomise(ours)
    config = SimpleNamespace(
        num_labels=7,
        auxiliary_in_channels=None,
        auxiliary_channels=256,
        auxiliary_num_convs=1,
        auxiliary_concat_input=False,
    )
    other = UperNetFCNHead(config, list(channels))
    convolution, _, classify = ours.auxiliary
    other.convs[0].load_state_dict({k.replace("norm.", "batch_norm."): v for k, v in convolution.state_dict().items()})
    other.classifier.load_state_dict(classify.state_dict())
    maps = [torch.randn(2, c, 24 // 2**i, 24 // 2**i) for i, c in enumerate(channels)]
    with torch.no_grad():
        assert torch.equal(ours({f"l{i}": x for i, x in enumerate(maps)})[1], other(maps))


def test_parameter_counts_are_those_of_mmsegmentation_for_swin_b():
    inputs = _inputs((128, 256, 512, 1024), 150)
    with torch.device("meta"):
        paper, aux, narrow = _upernet(inputs), _upernet(inputs, aux=True), _upernet(inputs, width=256)
    assert round(_count(paper) / 1e6, 2) == 33.32
    assert round((_count(aux) - _count(paper)) / 1e6, 2) == 1.22
    assert round(_count(narrow) / 1e6, 2) == 10.17


def test_norms_of_the_inputs_add_two_parameters_a_channel():
    inputs = _inputs((128, 256, 512, 1024), 150)
    with torch.device("meta"):
        assert _count(_upernet(inputs, norm_inputs=True)) - _count(_upernet(inputs)) == 2 * 1920


@pytest.mark.parametrize("name", ["semantic/linear", "semantic/upernet"])
@pytest.mark.parametrize("strides", [(16, 16, 16, 16), (8,), (4, 16)])
def test_plain_vit_taps_and_any_number_of_levels_will_do(name: str, strides: tuple[int, ...]):
    inputs = _inputs(tuple(6 for _ in strides), 5, strides)
    head = find_head(name)
    options = {**head.options, **({"width": 8, "aux": True} if "width" in head.options else {})}
    module = head.build(inputs, options)
    features = {f"l{i}": torch.randn(2, 6, 64 // s, 96 // s) for i, s in enumerate(strides)}
    for logits, size in zip(module(features), ((64 // min(strides), 96 // min(strides)), None), strict=False):
        assert logits.shape[:2] == (2, 5)
        assert size is None or logits.shape[2:] == size


def test_levels_are_read_from_fine_to_coarse_in_whatever_order_they_come():
    one, other = _inputs((4, 6, 8), 5, (4, 8, 16)), _inputs((4, 6, 8), 5, (4, 8, 16))
    other = HeadInput(other.levels[::-1], other.targets)
    torch.manual_seed(0)
    first = _upernet(one, width=8).eval()
    torch.manual_seed(0)
    second = _upernet(other, width=8).eval()
    features = {f"l{i}": torch.randn(1, c, 16 // 2**i, 16 // 2**i) for i, c in enumerate((4, 6, 8))}
    with torch.no_grad():
        assert torch.equal(first(features)[0], second(features)[0])


def test_a_level_that_is_no_map_is_refused():
    inputs = HeadInput((LevelSpec("pooled", "C", (8,), 32),), _inputs((4,), 5, (4,)).targets)
    with pytest.raises(SpecError, match=r"maps \(C H W\), level 'pooled'"):
        _upernet(inputs)


def test_pyramid_pooling_of_a_single_sample_says_what_to_do():
    module = _upernet(_inputs((4,), 5, (4,)), width=8)
    with pytest.raises(SpecError, match="batch_size 2 or more"):
        module({"l0": torch.randn(1, 4, 16, 16)})


@pytest.mark.parametrize(("text", "steps", "lr"), [("upernet:width=32", 60, 3e-3), ("linear", 150, 3e-2)])
def test_heads_overfit_four_samples_whose_features_carry_the_label(scenes, tmp_path, text: str, steps: int, lr: float):
    source = scenes(4, size=128, strides=(4, 8, 16, 32))
    held = scenes(4, size=128, strides=(4, 8, 16, 32), role="evaluation")
    config = TrainConfig(iterations=steps, batch_size=4, lr=lr, weight_decay=0.0)
    run = train(source, [choose_head(text, source.info, config)], config, out=tmp_path, validation=held)[0]
    assert run.metrics["miou"] > 0.97


def test_golden_losses_of_upernet(scenes, tmp_path):
    source = scenes(8)
    config = TrainConfig(iterations=4, batch_size=4, lr=1e-3, checkpoint_every=0)
    run = train(source, [choose_head("upernet:width=8,aux=true", source.info, config)], config, out=tmp_path)[0]
    golden = [2.262360453605652, 2.246908664703369, 2.218136489391327, 2.2126933932304382]
    np.testing.assert_allclose([x for _, x in run.losses], golden, rtol=1e-5)


def test_golden_losses_of_the_linear_head(scenes, tmp_path):
    source = scenes(8)
    config = TrainConfig(iterations=4, batch_size=4, lr=1e-2, checkpoint_every=0)
    run = train(source, [choose_head("linear", source.info, config)], config, out=tmp_path)[0]
    golden = [1.7781141996383667, 1.7955397367477417, 1.4985047578811646, 1.3593412637710571]
    np.testing.assert_allclose([x for _, x in run.losses], golden, rtol=1e-5)
