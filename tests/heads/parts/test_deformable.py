import math

import pytest
import torch

from fcache.heads.parts.deformable import DeformableAttention, deformable_attention, places_of
from fcache.heads.parts.positions import sine_positions

F64 = torch.float64


def _pixel(value: torch.Tensor, y: int, x: int) -> torch.Tensor:
    """A pixel [C] of a map [C, H, W], zero outside."""
    inside = 0 <= y < value.shape[1] and 0 <= x < value.shape[2]
    return value[:, y, x] if inside else torch.zeros(len(value), dtype=value.dtype)


def _by_loops(values: list[torch.Tensor], places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    batch, count, heads = weights.shape[:3]
    channels = values[0].shape[2]
    out = torch.zeros(batch, count, heads, channels, dtype=F64)
    for b, n, m, level, p in torch.cartesian_prod(*(torch.arange(k) for k in weights.shape)).tolist():
        value = values[level][b, m]
        x = float(places[b, n, m, level, p, 0]) * value.shape[2] - 0.5
        y = float(places[b, n, m, level, p, 1]) * value.shape[1] - 0.5
        left, top = math.floor(x), math.floor(y)
        for dy in (0, 1):
            for dx in (0, 1):
                share = (dx * (x - left) + (1 - dx) * (1 - x + left)) * (dy * (y - top) + (1 - dy) * (1 - y + top))
                out[b, n, m] += weights[b, n, m, level, p] * share * _pixel(value, top + dy, left + dx)
    return out.flatten(2)


def test_deformable_attention_equals_plain_loops():
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, dtype=F64, generator=generator)

    values = [uniform(2, 3, 4, h, w) - 0.5 for h, w in ((2, 3), (5, 4))]
    # Places beyond the borders too.
    places = 1.6 * uniform(2, 7, 3, 2, 4, 2) - 0.3
    weights = uniform(2, 7, 3, 8).softmax(-1).unflatten(3, (2, 4))
    found = deformable_attention(values, places, weights)
    assert (found - _by_loops(values, places, weights)).abs().max() <= 4.5e-16


def test_attention_begins_as_means_along_a_ring():
    torch.manual_seed(0)
    layer = DeformableAttention(32, heads=8, levels=3)
    # The spread that a forgotten initialisation has not: all samples would lie at one place.
    assert float(layer.offsets.bias.detach().std()) == pytest.approx(2.38, abs=0.01)
    offsets = layer.offsets.bias.view(8, 3, 4, 2)
    torch.testing.assert_close(offsets[0, 0], torch.tensor([[k, 0.0] for k in (1.0, 2.0, 3.0, 4.0)]))
    torch.testing.assert_close(offsets[3, 2], torch.tensor([[-k, k] for k in (1.0, 2.0, 3.0, 4.0)]))
    assert not layer.offsets.weight.any()
    assert not layer.weights.weight.any()


def test_a_layer_that_looks_straight_ahead_gives_back_its_values():
    # Offsets zero, one level: every place samples its own centre, whatever the weights.
    layer = DeformableAttention(8, heads=2, levels=1).double()
    with torch.no_grad():
        layer.offsets.bias.zero_()
        layer.value.weight.copy_(torch.eye(8))
        layer.out.weight.copy_(torch.eye(8))
    x = torch.randn(2, 15, 8, dtype=F64)
    found = layer(x, torch.randn(15, 8, dtype=F64), places_of([(3, 5)], device=x.device, dtype=F64))
    torch.testing.assert_close(found, x, rtol=0, atol=1e-14)


def test_offsets_are_in_pixels_of_the_level_that_is_sampled():
    # One sample, two pixels to the left and one down, of two levels that count alike.
    layer = DeformableAttention(8, heads=1, levels=2, points=1).double()
    with torch.no_grad():
        layer.offsets.bias.copy_(torch.tensor([-2.0, 1.0] * 2))
        layer.value.weight.copy_(torch.eye(8))
        layer.out.weight.copy_(torch.eye(8))
    x = torch.randn(1, 30 + 2, 8, dtype=F64)
    found = layer(x, torch.zeros(32, 8, dtype=F64), places_of([(3, 10), (2, 1)], device=x.device, dtype=F64))
    fine = x[0, :30].view(3, 10, 8)
    # Of the coarse level it lies outside.
    torch.testing.assert_close(found[0, :30].view(3, 10, 8)[:2, 2:], fine[1:, :-2] / 2, rtol=0, atol=1e-14)


def test_places_are_pixels_row_by_row():
    places = places_of([(1, 2), (2, 1), (3, 4)], device=torch.device("cpu"), dtype=F64)
    assert places.centres[:4].tolist() == [[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]]
    assert len(places.centres) == 16
    assert places.extents.tolist() == [[2, 1], [1, 2], [4, 3]]


def test_sine_positions_have_the_row_in_the_first_half_and_the_column_in_the_second():
    found = sine_positions((3, 5), 8, device=torch.device("cpu"), dtype=F64).view(3, 5, 8)
    assert torch.equal(found[1, :, :4], found[1, :1, :4].expand(5, 4))
    assert torch.equal(found[:, 2, 4:], found[:1, 2, 4:].expand(3, 4))
    angle = 2 * math.pi * 2 / 5
    expected = [math.sin(angle), math.cos(angle), math.sin(angle / 100), math.cos(angle / 100)]
    assert found[0, 1, 4:].tolist() == pytest.approx(expected, abs=1e-6)
