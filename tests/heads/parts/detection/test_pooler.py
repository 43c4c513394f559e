"""Pooling from a pyramid: exact where the maps are linear, from the level that fits."""

import numpy as np
import pytest
import torch

from fcache.heads.parts.detection.pooler import AlignedPooler


def ramp(size: int, stride: float) -> torch.Tensor:
    """A map [1, 2, size, size] that says where its places are, x and y in input pixels."""
    places = (torch.arange(size) + 0.5) * stride
    y, x = torch.meshgrid(places, places, indexing="ij")
    return torch.stack([x, y])[None].float()


@pytest.mark.parametrize("strides", [(4.0, 8.0, 16.0, 32.0), (3.5, 7.0, 14.0, 28.0), (8.0,)])
def test_a_linear_ramp_is_pooled_exactly(strides):
    pooler = AlignedPooler(strides)
    maps = [ramp(int(1024 / s), s) for s in strides]
    rng = np.random.default_rng(0)
    centres, sides = rng.uniform(400, 600, (40, 2)), np.exp(rng.uniform(np.log(8), np.log(700), (40, 2)))
    boxes = torch.from_numpy(np.concatenate([centres - sides / 2, centres + sides / 2], axis=1)).float()
    for size in (7, 14):
        found = pooler(maps, [boxes], size)
        share = (torch.arange(size) + 0.5) / size
        for axis in (0, 1):
            wanted = boxes[:, axis, None] + share * (boxes[:, axis + 2] - boxes[:, axis])[:, None]
            lines = found[:, axis].mean(dim=1 + axis)
            torch.testing.assert_close(lines, wanted, atol=2e-3, rtol=0)


def test_boxes_are_pooled_from_the_levels_of_the_fpn_paper():
    pooler = AlignedPooler((4.0, 8.0, 16.0, 32.0))
    sides = [1.0, 55.0, 111.99, 112.0, 223.99, 224.0, 447.9, 448.0, 5000.0]
    boxes = torch.tensor([[0.0, 0.0, s, s] for s in sides])
    assert pooler.levels_of(boxes).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]


def test_a_finer_pyramid_pools_at_its_own_strides():
    assert AlignedPooler((2.0, 4.0)).levels_of(torch.tensor([[0.0, 0, 55, 55], [0, 0, 56, 56]])).tolist() == [0, 1]


def test_boxes_of_several_images_and_none_at_all():
    pooler = AlignedPooler((4.0, 8.0))
    maps = [torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 16, 16), torch.zeros(3, 1, 8, 8)]
    box = torch.tensor([[8.0, 8, 40, 40]])
    found = pooler(maps, [box[:0], box.repeat(2, 1), box], 7)
    assert found[:, 0, 3, 3].tolist() == [1.0, 1.0, 2.0]
    assert pooler(maps, [box[:0]] * 3, 7).shape == (0, 1, 7, 7)
