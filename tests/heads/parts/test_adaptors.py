import pytest
import torch
import torch.nn.functional as F

from fcache.cache_spec import LevelSpec
from fcache.heads.parts.adaptors import SimpleAdaptors, adapted_levels, adaptors_for, adapts, quarters


def _levels(*strides: int) -> list[LevelSpec]:
    return [LevelSpec(f"block-{i}", "C H W", (4, 0, 0), stride) for i, stride in enumerate(strides)]


@pytest.mark.parametrize(("channels", "millions"), [(768, 7.1), (1024, 12.6)])
def test_parameter_counts_are_those_of_the_vit_detection_paper(channels: int, millions: float):
    with torch.device("meta"):
        module = SimpleAdaptors((channels,) * 4)
    assert round(sum(p.numel() for p in module.parameters()) / 1e6, 1) == millions


def test_maps_become_four_two_one_and_half_times_as_large():
    """Every output pixel against the definition, written out for one position at a time."""
    torch.manual_seed(0)
    module = SimpleAdaptors((3, 4, 5, 6)).double()
    maps = [torch.randn(2, c, 3, 5).double() for c in (3, 4, 5, 6)]
    with torch.no_grad():
        four, two, one, half = module(maps)

        def double(layer: torch.nn.ConvTranspose2d, x: torch.Tensor) -> torch.Tensor:
            out = torch.empty(x.shape[0], layer.out_channels, 2 * x.shape[2], 2 * x.shape[3], dtype=x.dtype)
            for i in range(out.shape[2]):
                for j in range(out.shape[3]):
                    kernel = layer.weight[:, :, i % 2, j % 2]
                    out[:, :, i, j] = x[:, :, i // 2, j // 2] @ kernel + layer.bias
            return out

        first, norm, _, second = module.times_4
        inner = double(first, maps[0])
        mean = inner.mean((1, 2, 3), keepdim=True)
        spread = inner.var((1, 2, 3), keepdim=True, unbiased=False)
        normed = (inner - mean) / (spread + norm.eps).sqrt()
        torch.testing.assert_close(four, double(second, F.gelu(normed)))
        torch.testing.assert_close(two, double(module.times_2, maps[1]))
        assert torch.equal(one, maps[2])
        expected = torch.stack(
            [maps[3][:, :, i : i + 2, j : j + 2].amax((2, 3)) for i in (0, 2) for j in (0, 2, 4)], -1
        )
        assert torch.equal(half.flatten(2), expected)
    assert [tuple(x.shape[2:]) for x in (four, two, one, half)] == [(12, 20), (6, 10), (3, 5), (2, 3)]


def test_of_one_map_all_four_are_made():
    module = SimpleAdaptors((4,))
    x = torch.randn(2, 4, 6, 6)
    found = module([x])
    assert [tuple(y.shape) for y in found] == [(2, 4, n, n) for n in (24, 12, 6, 3)]
    assert found[2] is x


def test_initial_weights_are_those_of_torch():
    torch.manual_seed(0)
    module = SimpleAdaptors((64,) * 4)
    bound = (1 / (64 * 4)) ** 0.5
    for layer in (module.times_4[0], module.times_4[3], module.times_2):
        assert float(layer.weight.detach().abs().max()) <= bound
        assert float(layer.weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.05)
        assert float(layer.bias.detach().abs().max()) <= bound
    assert module.times_4[1].weight.eq(1).all()
    assert module.times_4[1].bias.eq(0).all()


def test_taps_are_those_at_the_end_of_each_quarter():
    assert quarters(12) == (2, 5, 8, 11)
    assert quarters(24) == (5, 11, 17, 23)
    assert quarters(4) == (0, 1, 2, 3)
    assert [quarters(n) for n in (1, 2, 3)] == [(0, 0, 0, 0), (0, 0, 1, 1), (0, 1, 2, 2)]
    for n in range(1, 49):
        assert quarters(n)[-1] == n - 1
        # What was taken once is taken again in full: a run reads the levels that it was built from.
        assert n < 4 or len(set(quarters(n))) == 4


def test_auto_adapts_what_shares_the_stride_of_a_plain_vit():
    assert all(adapts(_levels(*strides), "auto") for strides in ((16,), (14,) * 4, (16,) * 12))
    assert not any(adapts(_levels(*strides), "auto") for strides in ((32,), (8, 8), (4, 8, 16, 32), (16, 32)))
    assert adapts(_levels(8, 8), "simple")
    assert not adapts(_levels(16), "none")


def test_what_passes_adaptors_has_other_strides_and_what_does_not_keeps_its_own():
    module, channels, strides = adaptors_for(_levels(14, 14), "auto")
    assert isinstance(module, SimpleAdaptors)
    assert (channels, strides) == ([4] * 4, [3.5, 7.0, 14.0, 28.0])
    assert adaptors_for(_levels(14, 14), "none") == (None, [4, 4], [14.0, 14.0])


def test_only_the_taps_in_use_are_read():
    assert adapted_levels(_levels(*[16] * 12), "auto") == ("block-2", "block-5", "block-8", "block-11")
    assert adapted_levels(_levels(16, 16), "auto") == ("block-0", "block-1")
    assert len(adapted_levels(_levels(*[16] * 12), "none")) == 12
    assert len(adapted_levels(_levels(4, 8), "auto")) == 2
