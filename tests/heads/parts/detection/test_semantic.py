"""The semantic branch: where it reads labels, where regions read it, and what its loss weighs."""

import math

import pytest
import torch

from fcache.heads.parts.detection.semantic import SemanticBranch, semantic_loss


def test_its_loss_is_a_fifth_of_the_cross_entropy_of_labelled_places():
    labels = torch.full((2, 32, 32), 255, dtype=torch.uint8)
    labels[0, :16] = 3
    assert float(semantic_loss(torch.zeros(2, 7, 4, 4), labels)) == pytest.approx(0.2 * math.log(7))
    assert float(semantic_loss(torch.zeros(2, 7, 4, 4), torch.full_like(labels, 255))) == 0


def test_labels_are_read_at_the_middle_of_a_place():
    labels = torch.zeros(1, 32, 32, dtype=torch.uint8)
    labels[:, 4::8, 4::8] = 1
    logits = torch.zeros(1, 2, 4, 4)
    logits[:, 1] = 50.0
    assert float(semantic_loss(logits, labels)) == pytest.approx(0, abs=1e-6)


def test_regions_read_the_embedding_at_the_stride_of_the_second_map():
    branch = SemanticBranch(4, (4.0, 8.0, 16.0, 32.0, 64.0), 3)
    places = (torch.arange(32) + 0.5) * 8
    y, x = torch.meshgrid(places, places, indexing="ij")
    embedding = torch.stack([x, y])[None]
    boxes = torch.tensor([[50.0, 70.0, 120.0, 200.0], [91.0, 33.0, 99.5, 61.0]])
    found = branch.pool(embedding, [boxes], 14)
    share = (torch.arange(14) + 0.5) / 14
    for axis in (0, 1):
        wanted = boxes[:, axis, None] + share * (boxes[:, axis + 2] - boxes[:, axis])[:, None]
        torch.testing.assert_close(found[:, axis].mean(dim=1 + axis), wanted, atol=2e-3, rtol=0)


def test_maps_of_all_strides_are_fused_at_the_second():
    branch = SemanticBranch(4, (4.0, 8.0, 16.0), 3)
    logits, embedding = branch([torch.rand(2, 4, n, n + 8) for n in (32, 16, 8)])
    assert logits.shape == (2, 3, 16, 24)
    assert embedding.shape == (2, 4, 16, 24)
