import warnings
from types import SimpleNamespace

import pytest
import torch
from timm.layers import create_pool2d
from torch import nn

from fcache.cache_spec import SpecError
from fcache.heads.parts import BiFPN
from fcache.heads.parts.bifpn import max_pool_to

with warnings.catch_warnings():
    # It registers models with timm in a way that timm has deprecated.
    warnings.simplefilter("ignore")
    from effdet.efficientdet import BiFpn

SWIN_B = (128, 256, 512, 1024)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _reference(channels: tuple[int, ...], width: int, *, extra: int, layers: int, separable: bool, image: tuple):
    config = SimpleNamespace(
        num_levels=len(channels) + extra,
        min_level=2,
        max_level=1 + len(channels) + extra,
        image_size=image,
        norm_layer=None,
        norm_kwargs={"eps": 1e-3, "momentum": 0.1},
        act_type="swish",
        fpn_config=None,
        fpn_name="bifpn_fa",
        fpn_channels=width,
        fpn_cell_repeats=layers,
        separable_conv=separable,
        pad_type="same",
        downsample_type="max",
        upsample_type="nearest",
        apply_resample_bn=True,
        redundant_bias=False,
        conv_bn_relu_pattern=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return BiFpn(config, [{"num_chs": c} for c in channels])


def _copy_block(ours: nn.Module, theirs: nn.Module) -> None:
    """A 1x1 block, or the convolution and BatchNorm at the end of a node."""
    own = {n: t for n, t in ours.state_dict().items() if n != "weights"}
    other = theirs.state_dict()
    assert [t.shape for t in own.values()] == [t.shape for t in other.values()]
    theirs.load_state_dict(dict(zip(other, own.values(), strict=True)))


def _copy(ours: BiFPN, theirs: nn.Module, *, given: int) -> None:
    """All weights of ours into effdet's; every parameter of theirs is set once."""
    last = len(ours.layers[0].top_down)
    for k in range(ours.extra_levels):
        if k == 0:
            _copy_block(ours.project_extra, theirs.resample[str(given)].conv)
    for n, layer in enumerate(ours.layers):
        nodes = theirs.cell[n].fnode
        for i, fuse in enumerate(layer.top_down):
            _copy_node(fuse, nodes[last - 1 - i])
        for i, fuse in enumerate(layer.bottom_up):
            _copy_node(fuse, nodes[last + i])
    if not ours.project_back:
        return
    first = theirs.cell[0].fnode
    for i, block in enumerate(ours.project):
        node = first[last - 1 - i] if i < last else first[0]
        _copy_block(block, node.combine.resample[str(i)].conv)
    for i, block in enumerate(ours.project_back, start=1):
        _copy_block(block, first[last + i - 1].combine.resample[str(i)].conv)


def _copy_node(ours: nn.Module, theirs: nn.Module) -> None:
    theirs.combine.edge_weights.data.copy_(ours.weights)
    _copy_block(ours, theirs.after_combine)


def _randomise(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith(("running_var", "norm.weight")):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif name.endswith("weights"):
                # Some are negative, and then count for nothing.
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 2 - 0.3)
            elif name.endswith(("running_mean", "norm.bias")):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)


def _sizes(image: tuple[int, int], levels: int) -> list[tuple[int, int]]:
    sizes = [image]
    for _ in range(levels + 1):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    return sizes[2:]


@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize(
    ("channels", "extra", "image"),
    # Even and odd sizes, with and without coarser levels of its own.
    [((6, 10, 14, 18), 1, (256, 320)), ((6, 10, 14), 2, (200, 328)), ((6, 10), 0, (76, 100))],
)
def test_edge_convolutions_and_all_equal_the_bifpn_of_effdet(channels, extra: int, image, separable: bool):
    ours = BiFPN(channels, 12, layers=2, extra_levels=extra, separable=separable, edge_convs=True)
    theirs = _reference(channels, 12, extra=extra, layers=2, separable=separable, image=image)
    _randomise(ours)
    _copy(ours, theirs, given=len(channels))
    assert _count(ours) == _count(theirs)
    ours, theirs = ours.double(), theirs.double()
    sizes = _sizes(image, len(channels))
    maps = [torch.randn(3, c, *size).double() for c, size in zip(channels, sizes, strict=True)]
    with torch.no_grad():
        for mode in (False, True):
            found, expected = ours.train(mode)(maps), theirs.train(mode)(list(maps))
            assert [x.shape for x in found] == [x.shape for x in expected]
            for a, b in zip(found, expected, strict=True):
                assert float((a - b).abs().max()) < 1e-12
    statistics = [t for n, t in ours.layers.state_dict().items() if "running" in n]
    ordered = [t for n, t in theirs.cell.state_dict().items() if "running" in n and ".combine." not in n]
    assert sorted(float(t.sum()) for t in statistics) == pytest.approx(sorted(float(t.sum()) for t in ordered))


@pytest.mark.parametrize("separable", [True, False])
def test_a_fresh_layer_equals_a_cell_of_effdet_in_float32(separable: bool):
    torch.manual_seed(0)
    ours = BiFPN((5, 6, 7, 8), 12, layers=1, separable=separable)
    theirs = _reference((12,) * 4, 12, extra=0, layers=1, separable=separable, image=(168, 200))
    _copy(ours, theirs, given=4)
    assert _count(ours.layers) == _count(theirs)
    maps = [torch.randn(2, 5 + i, *size) for i, size in enumerate(_sizes((168, 200), 4))]
    with torch.no_grad():
        for mode, tolerance in ((False, 1e-6), (True, 3e-6)):
            ours.train(mode)
            projected = [p(x) for p, x in zip(ours.project, maps, strict=True)]
            found = ours.layers[0](projected, projected)
            for a, b in zip(found, theirs.train(mode)(list(projected)), strict=True):
                assert float((a - b).abs().max()) < tolerance


@pytest.mark.parametrize(
    ("separable", "millions"),
    [
        (True, {1: 1.30, 2: 1.85, 3: 2.40, 4: 2.94, 5: 3.49, 9: 5.68}),
        (False, {1: 5.48, 2: 10.20, 3: 14.92, 4: 19.65, 5: 24.37, 9: 43.26}),
    ],
)
def test_parameter_counts_of_256_channels_on_p2_to_p6_of_swin_b(separable: bool, millions: dict[int, float]):
    with torch.device("meta"):
        for layers, expected in millions.items():
            module = BiFPN(SWIN_B, 256, layers=layers, extra_levels=1, separable=separable)
            assert round(_count(module) / 1e6, 2) == expected


def test_edge_convolutions_of_the_first_layer_cost_parameters():
    with torch.device("meta"):
        shared = BiFPN(SWIN_B, 64, layers=2, extra_levels=1)
        own = BiFPN(SWIN_B, 64, layers=2, extra_levels=1, edge_convs=True)
    assert (round(_count(shared) / 1e6, 3), round(_count(own) / 1e6, 3)) == (0.266, 0.381)


def test_initial_weights_are_as_documented():
    torch.manual_seed(0)
    module = BiFPN((64, 96), 128, layers=2, separable=True, edge_convs=True)
    full = BiFPN((64, 96), 128, layers=1, separable=False)
    bounds: dict[tuple[int, ...], float] = {
        (128, 64, 1, 1): (6 / (64 + 128)) ** 0.5,
        (128, 96, 1, 1): (6 / (96 + 128)) ** 0.5,
        (128, 1, 3, 3): (6 / 18) ** 0.5,
        (128, 128, 1, 1): (6 / 256) ** 0.5,
        (128, 128, 3, 3): (6 / (256 * 9)) ** 0.5,
    }
    seen = set()
    for part in (*module.modules(), *full.modules()):
        if isinstance(part, nn.Conv2d):
            bound = bounds[tuple(part.weight.shape)]
            assert part.bias is None
            assert float(part.weight.detach().abs().max()) <= bound
            assert float(part.weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.05)
            seen.add(tuple(part.weight.shape))
        elif isinstance(part, nn.BatchNorm2d):
            assert (part.eps, part.momentum) == (1e-3, 0.1)
            assert part.weight.eq(1).all()
            assert part.bias.eq(0).all()
    assert seen == set(bounds)
    assert all(p.eq(1).all() for n, p in module.named_parameters() if n.endswith("weights"))
    slow = BiFPN((4, 4), 4, layers=1, bn_momentum=0.01)
    assert {m.momentum for m in slow.modules() if isinstance(m, nn.BatchNorm2d)} == {0.01}


def test_halving_is_the_same_padding_of_tensorflow_and_rounding_down_needs_none():
    same = create_pool2d("max", kernel_size=3, stride=2, padding="same")
    for n in range(1, 34):
        x = torch.randn(1, 2, n, 3)
        assert torch.equal(max_pool_to(x, ((n + 1) // 2, 2)), same(x))
    x = torch.randn(1, 2, 15, 17)
    assert torch.equal(max_pool_to(x, (7, 8)), nn.functional.max_pool2d(x, 3, 2))


def test_every_pixel_counts_in_maps_pooled_to_any_size():
    for n in range(1, 20):
        for m in range(1, 20):
            x = torch.arange(n, dtype=torch.float32).view(1, 1, n, 1) - 7
            found = max_pool_to(x, (m, 1)).flatten()
            assert found.isfinite().all()
            assert float(found[-1]) == n - 8
            assert bool((found.diff() >= 0).all())
            assert float((-max_pool_to(-x, (m, 1))).flatten()[0]) == -7
            if n == m:
                assert torch.equal(found, x.flatten())


@pytest.mark.parametrize("layers", [1, 9])
@pytest.mark.parametrize(
    "sizes",
    [
        [(33, 47), (17, 24), (9, 12), (5, 6)],
        [(30, 30), (15, 15), (7, 7)],
        [(16, 16), (16, 16)],
        [(32, 32), (8, 8)],
        [(5, 1), (3, 1), (2, 1), (1, 1), (1, 1), (1, 1)],
    ],
)
def test_any_sizes_any_number_of_levels_and_layers_keep_their_sizes(sizes: list[tuple[int, int]], layers: int):
    module = BiFPN([3] * len(sizes), 4, layers=layers)
    found = module([torch.randn(2, 3, *size) for size in sizes])
    assert [tuple(x.shape) for x in found] == [(2, 4, *size) for size in sizes]
    assert all(x.isfinite().all() for x in found)


def test_what_cannot_be_fused_says_so():
    with pytest.raises(SpecError, match="two levels or more, got 1"):
        BiFPN((8,), 8, layers=1)
    with pytest.raises(SpecError, match="layers >= 1"):
        BiFPN((8, 8), 8, layers=0)
    with pytest.raises(SpecError, match="bn_momentum in"):
        BiFPN((8, 8), 8, layers=1, bn_momentum=0.0)
    with pytest.raises(SpecError, match="batch_size 2 or more"):
        BiFPN((8, 8), 8, layers=1)([torch.randn(1, 8, 2, 2), torch.randn(1, 8, 1, 1)])
    assert len(BiFPN((8,), 8, layers=1, extra_levels=1)([torch.randn(2, 8, 4, 4)])) == 2
