import re
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


def _built(name: str, inputs: HeadInput, options: dict) -> torch.nn.Module:
    """A head on those levels of the input that its options name."""
    head = find_head(name)
    options = {**head.options, **options}
    names = head.levels(inputs.levels, options)
    inputs = HeadInput(tuple(x for x in inputs.levels if x.name in names), inputs.targets)
    head.check(inputs, options)
    return head.build(inputs, options)


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
    ("neck.lateral.", "lateral_convs."),
    ("neck.smooth.", "fpn_convs."),
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


def _fcn_of_transformers(channels: tuple[int, ...], ours: torch.nn.Module, *, num_convs: int, concat_input: bool):
    config = SimpleNamespace(
        num_labels=7,
        auxiliary_in_channels=None,
        auxiliary_channels=ours.classify.in_channels,
        auxiliary_num_convs=num_convs,
        auxiliary_concat_input=concat_input,
    )
    other = UperNetFCNHead(config, list(channels))
    names = {"fuse.0.": "conv_cat.", "classify.": "classifier."}
    state = {}
    for name, tensor in ours.state_dict().items():
        for own, theirs in names.items():
            name = theirs + name.removeprefix(own) if name.startswith(own) else name
        state[name.replace(".norm.", ".batch_norm.")] = tensor
    other.load_state_dict(state, strict=True)
    return other


def test_the_auxiliary_head_equals_the_one_of_transformers_bit_for_bit():
    channels = (6, 10, 14, 18)
    ours = _upernet(_inputs(channels, 7), width=12, aux=True, dropout=0.0)
    _randomise(ours)
    other = _fcn_of_transformers(channels, ours.auxiliary, num_convs=1, concat_input=False)
    maps = [torch.randn(2, c, 24 // 2**i, 24 // 2**i) for i, c in enumerate(channels)]
    with torch.no_grad():
        assert torch.equal(ours({f"l{i}": x for i, x in enumerate(maps)})[1], other(maps))


@pytest.mark.parametrize(("num_convs", "concat_input"), [(1, False), (2, True), (3, True)])
def test_fcn_equals_the_one_of_transformers_bit_for_bit(num_convs: int, concat_input: bool):
    channels = (6, 10, 14, 18)
    inputs = _inputs(channels, 7)
    options = {"width": 12, "num_convs": num_convs, "concat_input": concat_input, "level": "l2"}
    ours = _built("semantic/fcn", inputs, options).eval()
    _randomise(ours)
    other = _fcn_of_transformers(channels, ours.fcn, num_convs=num_convs, concat_input=concat_input).eval()
    maps = [torch.randn(2, c, 40 // 2**i, 56 // 2**i) for i, c in enumerate(channels)]
    with torch.no_grad():
        assert torch.equal(ours({"l2": maps[2]})[0], other(maps))


@pytest.mark.parametrize(
    ("options", "millions"),
    [
        # mmsegmentation's UPerHead, and its auxiliary head on top.
        ({}, 33.32),
        ({"aux": True}, 34.53),
        ({"width": 256}, 10.17),
        ({"neck": "bifpn", "layers": 1}, 28.1),
        ({"neck": "bifpn", "layers": 2}, 29.7),
        ({"neck": "bifpn", "layers": 3}, 31.3),
        ({"neck": "bifpn", "layers": 4}, 32.9),
        ({"neck": "bifpn", "layers": 5}, 34.5),
        ({"neck": "bifpn", "layers": 5, "separable": False}, 97.3),
    ],
)
def test_parameter_counts_of_upernet_on_swin_b(options: dict, millions: float):
    with torch.device("meta"):
        count = _count(_upernet(_inputs((128, 256, 512, 1024), 150), **options)) / 1e6
    digits = 2 if "neck" not in options else 1
    assert round(count, digits) == pytest.approx(millions)


@pytest.mark.parametrize(("channels", "millions"), [(768, 7.1), (1024, 12.6)])
def test_adaptors_add_the_parameters_of_the_vit_detection_paper(channels: int, millions: float):
    inputs = _inputs((channels,) * 4, 150, (16,) * 4)
    with torch.device("meta"):
        plain, adapted = (_upernet(inputs, adaptors=choice) for choice in ("none", "simple"))
    assert round((_count(adapted) - _count(plain)) / 1e6, 1) == millions


def test_norms_of_the_inputs_add_two_parameters_a_channel():
    inputs = _inputs((128, 256, 512, 1024), 150)
    with torch.device("meta"):
        assert _count(_upernet(inputs, norm_inputs=True)) - _count(_upernet(inputs)) == 2 * 1920


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("semantic/linear", {}),
        ("semantic/upernet", {"width": 8, "aux": True, "adaptors": "none"}),
        ("semantic/upernet", {"width": 8, "aux": True, "neck": "bifpn", "layers": 1, "adaptors": "none"}),
    ],
)
@pytest.mark.parametrize("strides", [(16, 16, 16, 16), (8,), (4, 16), (4, 8, 16, 32, 64)])
def test_plain_vit_taps_and_any_number_of_levels_will_do(name: str, options: dict, strides: tuple[int, ...]):
    inputs = _inputs(tuple(6 for _ in strides), 5, strides)
    head = find_head(name)
    if len(strides) == 1 and "neck" in options:
        with pytest.raises(SpecError, match="only one here: take neck=fpn, or more levels"):
            head.check(inputs, {**head.options, **options})
        return
    module = head.build(inputs, {**head.options, **options})
    features = {f"l{i}": torch.randn(2, 6, 64 // s, 96 // s) for i, s in enumerate(strides)}
    for logits, size in zip(module(features), ((64 // min(strides), 96 // min(strides)), None), strict=False):
        assert logits.shape[:2] == (2, 5)
        assert size is None or logits.shape[2:] == size


@pytest.mark.parametrize("neck", [{}, {"neck": "bifpn", "layers": 2}])
@pytest.mark.parametrize(("taps", "size"), [(1, (5, 7)), (2, (3, 3)), (3, (4, 4)), (4, (1, 1)), (12, (2, 3))])
def test_upernet_on_a_plain_vit_predicts_at_a_quarter_of_the_stride(taps: int, size: tuple[int, int], neck: dict):
    inputs = _inputs((8,) * taps, 5, (16,) * taps)
    head = find_head("semantic/upernet")
    options = {**head.options, "width": 8, "aux": True, **neck}
    names = head.levels(inputs.levels, options)
    assert len(names) == min(taps, 4)
    module = head.build(HeadInput(tuple(x for x in inputs.levels if x.name in names), inputs.targets), options)
    logits, auxiliary = module({name: torch.randn(2, 8, *size) for name in names})
    assert logits.shape == (2, 5, 4 * size[0], 4 * size[1])
    assert auxiliary.shape == (2, 5, *size)


def test_fcn_reads_the_coarsest_level_or_the_one_it_is_told(scenes):
    source = scenes(4)
    for text, level in (("fcn", "level-16"), ("fcn:level=8", "level-8"), ("fcn:level=level-4", "level-4")):
        assert choose_head(text, source.info, TrainConfig()).levels(source.info.levels) == (level,)
    taps = scenes(4, blocks=3).info
    assert choose_head("fcn", taps, TrainConfig()).levels(taps.levels) == ("block-2",)
    with pytest.raises(SpecError, match="unknown level 'level-9'; did you mean level-"):
        choose_head("fcn:level=level-9", source.info, TrainConfig()).inputs(source.info)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("upernet", {"layers": 3}, "an FPN has no layers: give neck=bifpn, or leave layers=3 out"),
        ("upernet", {"separable": False}, "an FPN has no separable"),
        ("upernet", {"bn_momentum": 0.01}, "an FPN has no bn_momentum"),
        ("upernet", {"edge_convs": True}, "an FPN has no edge_convs"),
        ("upernet", {"neck": "bifpn"}, "neck=bifpn needs its number of layers"),
        ("upernet", {"neck": "bifpn", "layers": 1, "bn_momentum": 2.0}, "bn_momentum in (0, 1]"),
        ("upernet", {"aux": True, "aux_weight": -1.0}, "aux_weight >= 0, got -1.0"),
        ("upernet", {"neck": "pan"}, "unknown neck of upernet: 'pan'"),
        ("upernet", {"aux_weight": 1.0}, "there is no auxiliary head: give aux=true"),
        ("upernet", {"width": 0}, "width >= 1"),
        ("upernet", {"dropout": 1.0}, "dropout in [0, 1)"),
        ("upernet", {"adaptors": "simpel"}, "unknown choice of adaptors: 'simpel'; did you mean simple"),
        ("upernet", {"adaptors": "simple"}, "these have strides 4, 8, 16, 32: take adaptors=none"),
        ("fcn", {"num_convs": 0}, "num_convs >= 1"),
        ("fcn", {"width": 0}, "width >= 1"),
        ("fcn", {"dropout": -0.1}, "dropout in [0, 1)"),
    ],
)
def test_options_without_meaning_are_errors(name: str, options: dict, message: str):
    with pytest.raises(SpecError, match=re.escape(message)):
        _built(f"semantic/{name}", _inputs((8, 8, 8, 8), 5), {"width": 8, **options})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fcn", {"level": "l3"}),
        ("upernet", {"aux": True, "norm_inputs": True}),
        ("upernet", {"neck": "bifpn", "layers": 2}),
    ],
)
def test_initial_weights_are_those_of_the_references(name: str, options: dict):
    """mmsegmentation: Kaiming normal (fan out) before a ReLU, deviation 0.01 for classifiers. Norms are neutral."""
    torch.manual_seed(0)
    module = _built(f"semantic/{name}", _inputs((96, 96, 96, 96), 50), {"width": 96, **options})
    convolutions = 0
    for path, part in module.named_modules():
        if isinstance(part, torch.nn.Conv2d) and not path.startswith("neck.layers") and "project" not in path:
            classifies = path.endswith("classify")
            expected = 0.01 if classifies else (2 / (part.out_channels * part.kernel_size[0] ** 2)) ** 0.5
            assert float(part.weight.detach().std()) == pytest.approx(expected, rel=0.05)
            assert abs(float(part.weight.detach().mean())) < 0.05 * expected
            assert part.bias is None or not classifies or not part.bias.detach().any()
            convolutions += 1
        elif isinstance(part, torch.nn.BatchNorm2d):
            in_bifpn = path.startswith("neck.") and "neck" in options
            assert (part.eps, part.momentum) == (1e-3 if in_bifpn else 1e-5, 0.1)
        if isinstance(part, (torch.nn.BatchNorm2d, torch.nn.LayerNorm)):
            assert part.weight.eq(1).all()
            assert part.bias.eq(0).all()
    assert convolutions > 2


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


@pytest.mark.parametrize(
    ("text", "steps", "lr", "blocks"),
    [
        ("linear", 150, 3e-2, 0),
        ("fcn:level=4,width=32", 60, 1e-2, 0),
        ("upernet:width=32", 60, 3e-3, 0),
        ("upernet:width=32,neck=bifpn,layers=2", 60, 1e-2, 0),
        ("upernet:width=32", 60, 1e-2, 4),
    ],
)
def test_heads_overfit_four_samples_whose_features_carry_the_label(
    scenes, tmp_path, text: str, steps: int, lr: float, blocks: int
):
    source = scenes(4, size=128, strides=(4, 8, 16, 32), blocks=blocks)
    held = scenes(4, size=128, strides=(4, 8, 16, 32), blocks=blocks, role="evaluation")
    config = TrainConfig(iterations=steps, batch_size=4, lr=lr, weight_decay=0.0, checkpoint_every=0)
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
