import itertools

import pytest
import torch

from fcache.cache_spec import LevelSpec
from fcache.heads.parts.clip_attention import OverAll, OverTime, OverWindows, clip_maps


@pytest.mark.parametrize("dims", ["T C H W", "C T H W", "C H W", "T C", "C"])
def test_maps_have_their_channels_last_and_every_axis(dims: str):
    sizes = {"T": 3, "C": 5, "H": 4, "W": 6}
    shape = tuple(sizes[d] for d in dims.split())
    x = torch.randn(2, *shape)
    found = clip_maps({"x": x}, LevelSpec("x", dims, shape, 32))
    assert found.shape == (2, *(sizes[d] if d in dims else 1 for d in "THW"), 5)
    present = "".join(d for d in "THWC" if d in dims)
    assert torch.equal(found.flatten(), torch.einsum(f"B{dims.replace(' ', '')}->B{present}", x).flatten())


@pytest.mark.parametrize(
    ("extents", "window", "shifted"),
    [
        ((4, 4, 6), (2, 2, 3), False),
        ((4, 4, 6), (2, 2, 3), True),
        ((5, 3, 4), (2, 2, 3), False),
        ((5, 3, 4), (2, 2, 3), True),
        ((6, 2, 2), (4, 7, 7), True),
        ((3, 2, 2), (8, 7, 7), True),
    ],
)
def test_a_place_sees_its_window_with_a_bias_for_every_offset_and_nothing_else(extents, window, shifted):
    torch.manual_seed(0)
    windows = OverWindows(12, heads=3, window=window, shifted=shifted)
    torch.nn.init.normal_(windows.biases)
    x = torch.randn(2, *extents, 12)
    places = list(itertools.product(*(range(n) for n in extents)))

    def window_of(place: tuple[int, ...]) -> tuple[int, ...]:
        sizes = [min(n, w) for n, w in zip(extents, window, strict=True)]
        shifts = [s // 2 if shifted and s < n else 0 for n, s in zip(extents, sizes, strict=True)]
        return tuple((i - shift) // size for i, shift, size in zip(place, shifts, sizes, strict=True))

    table = windows.biases.view(3, *(2 * n - 1 for n in window))
    scores = torch.full((3, len(places), len(places)), float("-inf"))
    for i, j in itertools.product(range(len(places)), repeat=2):
        if window_of(places[i]) == window_of(places[j]):
            offset = [a - b + w - 1 for a, b, w in zip(places[i], places[j], window, strict=True)]
            scores[:, i, j] = table[:, offset[0], offset[1], offset[2]]
    flat = x.flatten(1, 3)
    expected = windows.attention(flat, flat, flat, scores[None]).view(x.shape)
    torch.testing.assert_close(windows(x), expected)


def test_attention_over_time_is_apart_for_every_position_and_that_over_all_is_not():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, 2, 8)
    other = x.clone()
    other[:, 1, 2, 1] += 1
    for look, changed in ((OverTime(8, heads=2), 1), (OverAll(8, heads=2), 6)):
        difference = (look(x) - look(other)).abs().amax(dim=(0, 1, 4))
        assert int((difference > 1e-6).sum()) == changed
        assert look(x).shape == x.shape
