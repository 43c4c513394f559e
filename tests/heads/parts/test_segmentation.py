import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fcache.cache_spec.testing import plain_view
from fcache.heads.parts.segmentation import CHUNK, labels_at_original_size, pixel_loss


def test_the_loss_is_the_mean_over_labelled_pixels_or_over_all():
    logits, labels = torch.randn(2, 5, 4, 4), torch.randint(0, 5, (2, 8, 8)).to(torch.uint8)
    labels[0, :4] = 255
    large = F.interpolate(logits, size=(8, 8), mode="bilinear")
    valid = F.cross_entropy(large, labels.long(), ignore_index=255)
    torch.testing.assert_close(pixel_loss(logits, labels, ignore=255, over_valid=True), valid)
    share = (labels != 255).float().mean()
    torch.testing.assert_close(pixel_loss(logits, labels, ignore=255, over_valid=False), valid * share)


@pytest.mark.parametrize("over_valid", [True, False])
def test_a_batch_without_any_label_has_loss_zero_and_no_gradient(over_valid: bool):
    logits = torch.randn(2, 5, 4, 4, requires_grad=True)
    loss = pixel_loss(logits, torch.full((2, 8, 8), 255, dtype=torch.uint8), ignore=255, over_valid=over_valid)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not logits.grad.any()


def test_labels_are_taken_at_the_original_size_of_the_valid_part():
    # The left 3/4 of the canvas hold image: class 1 there at the left, class 2 at the right; padding says class 3.
    logits = torch.zeros(4, 8, 16)
    logits[1, :, :6] = 5.0
    logits[2, :, 6:12] = 5.0
    logits[3, :, 12:] = 99.0
    view = plain_view((32, 64), valid=(32, 48), image_size=(64, 96))
    labels = labels_at_original_size(logits, view)
    assert labels.shape == (64, 96)
    assert labels.dtype == torch.uint8
    np.testing.assert_array_equal(np.unique(labels[:, :44]), [1])
    np.testing.assert_array_equal(np.unique(labels[:, 52:92]), [2])


def test_labels_in_chunks_of_classes_equal_those_of_one_argmax(monkeypatch):
    logits = torch.randn(9, 6, 7)
    logits[4] = logits[2]
    view = plain_view((24, 28), valid=(20, 26), image_size=(31, 40))
    canvas = F.interpolate(logits[None], size=(24, 28), mode="bilinear")[:, :, :20, :26]
    expected = F.interpolate(canvas, size=(31, 40), mode="bilinear")[0].argmax(0)
    assert CHUNK >= 31 * 40
    for chunk in (31 * 40, 31 * 40 * 4, CHUNK):
        monkeypatch.setattr("fcache.heads.parts.segmentation.CHUNK", chunk)
        assert torch.equal(labels_at_original_size(logits, view).long(), expected)
