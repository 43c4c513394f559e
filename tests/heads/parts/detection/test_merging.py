"""Detections of an image: boxes moved back from views, masks pasted and encoded."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_masks

from fcache.cache_spec import View
from fcache.cache_spec.testing import plain_view
from fcache.heads.parts.detection.boxes import Found
from fcache.heads.parts.detection.merging import encode_masks, merge_detections, pasted

OPTIONS = {"nms_threshold": 0.5, "detections": 100}


def found(boxes, scores=None, labels=None, masks=None) -> Found:
    n = len(boxes)
    return Found(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        scores=torch.tensor([0.9 - 0.1 * i for i in range(n)] if scores is None else scores),
        labels=torch.tensor([0] * n if labels is None else labels, dtype=torch.int64),
        masks=torch.ones(n, 28, 28) if masks is None else masks,
    )


def decoded(detections) -> np.ndarray:
    return np.stack([_decoded(m, detections.size) for m in detections.masks])


def _decoded(counts: bytes, size: tuple[int, int]) -> np.ndarray:
    """The mask of a compressed RLE, by way of its uncompressed form."""
    values, i = [], 0
    while i < len(counts):
        x, k, more = 0, 0, True
        while more:
            c = counts[i] - 48
            x |= (c & 0x1F) << (5 * k)
            more, i, k = bool(c & 0x20), i + 1, k + 1
            if not more and c & 0x10:
                x |= -1 << (5 * k)
        values.append(x + values[-2] if len(values) > 2 else x)
    flat = np.repeat(np.arange(len(values)) % 2, values)
    return flat.reshape(size[1], size[0]).T.astype(bool)


@given(st.data())
def test_masks_are_encoded_as_pycocotools_encodes_them(data):
    height, width = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    top, left = data.draw(st.tuples(st.integers(0, height - 1), st.integers(0, width - 1)))
    h, w = data.draw(st.tuples(st.integers(0, height - top), st.integers(0, width - left)))
    bits = data.draw(st.lists(st.booleans(), min_size=h * w, max_size=h * w))
    part = np.array(bits, dtype=bool).reshape(h, w)
    whole = np.zeros((height, width), np.uint8, order="F")
    whole[top : top + h, left : left + w] = part
    assert encode_masks([(part, top, left)], (height, width)) == (coco_masks.encode(whole)["counts"],)


def test_a_full_mask_covers_the_pixels_whose_centres_the_box_covers():
    part, top, left = pasted(np.ones((28, 28), np.float32), np.array([2.4, 3.6, 10.49, 20.49]), (30, 30))
    rows, columns = np.nonzero(part)
    assert (rows.min() + top, rows.max() + top) == (4, 19)
    assert (columns.min() + left, columns.max() + left) == (2, 9)
    assert part[4 - top : 20 - top, 2 - left : 10 - left].all()


def test_a_drawn_shape_comes_back_at_any_size():
    y, x = (np.mgrid[:28, :28] + 0.5) / 14 - 1
    disc = np.clip((1 - np.hypot(x, y)) * 14 + 0.5, 0, 1).astype(np.float32)
    box = np.array([10.3, 5.7, 210.9, 155.2])
    part, top, left = pasted(disc, box, (200, 300))
    rows, columns = np.nonzero(part)
    expected = np.pi / 4 * (box[2] - box[0]) * (box[3] - box[1])
    assert part.sum() == pytest.approx(expected, rel=0.01)
    assert (columns.mean() + 0.5 + left, rows.mean() + 0.5 + top) == pytest.approx((110.6, 80.45), abs=0.1)


def test_boxes_beyond_the_image_are_cut_and_those_of_a_pixel_stay():
    view = plain_view((64, 64), image_size=(64, 64))
    said = merge_detections([found([[-5, -5, 10, 10], [60, 60, 80, 80], [7, 7, 8, 8]])], [view], OPTIONS)
    assert said.boxes.tolist() == [[0, 0, 10, 10], [60, 60, 64, 64], [7, 7, 8, 8]]
    assert [int(m.sum()) for m in decoded(said)] == [100, 16, 1]


def test_views_are_scaled_back_by_their_own_geometry():
    view = plain_view((96, 128), valid=(80, 100), image_size=(40, 200))
    said = merge_detections([found([[10, 20, 50, 60]])], [view], OPTIONS)
    torch.testing.assert_close(said.boxes, torch.tensor([[20.0, 10.0, 100.0, 30.0]]))
    assert said.size == (40, 200)
    mask = decoded(said)[0]
    assert mask[10:30, 20:100].all()
    assert mask.sum() == 20 * 80


def test_a_mirrored_view_says_the_same():
    left = torch.zeros(1, 28, 28)
    left[:, :, :14] = 1
    plain = plain_view((64, 64), image_size=(64, 64))
    mirrored = View((-1.0, 0.0, 64.0, 0.0, 1.0, 0.0), (64, 64), (64, 64), (64, 64))
    one = merge_detections([found([[10, 20, 30, 40]], masks=left)], [plain], OPTIONS)
    two = merge_detections([found([[34, 20, 54, 40]], masks=left.flip(2))], [mirrored], OPTIONS)
    assert torch.equal(one.boxes, two.boxes)
    assert one.masks == two.masks
    both = merge_detections(
        [found([[10, 20, 30, 40]], masks=left), found([[34, 20, 54, 40]], [0.95], masks=left.flip(2))],
        [plain, mirrored],
        OPTIONS,
    )
    assert (len(both), both.scores.tolist(), both.masks) == (1, [pytest.approx(0.95)], one.masks)


def test_of_several_views_the_best_of_a_class_stay():
    view = plain_view((64, 64), image_size=(64, 64))
    one = found([[0, 0, 20, 20], [30, 30, 50, 50]], [0.9, 0.3], [0, 1])
    two = found([[1, 1, 21, 21], [30, 30, 50, 50]], [0.8, 0.7], [0, 0])
    both = merge_detections([one, two], [view] * 2, OPTIONS)
    assert [(round(float(s), 1), int(k)) for s, k in zip(both.scores, both.labels, strict=True)] == [
        (0.9, 0),
        (0.7, 0),
        (0.3, 1),
    ]
    assert len(merge_detections([one, two], [view] * 2, {**OPTIONS, "detections": 2})) == 2


def test_an_image_with_nothing_found():
    view = plain_view((64, 64), image_size=(30, 40))
    said = merge_detections([found([])], [view], OPTIONS)
    assert (len(said), said.masks, said.boxes.shape) == (0, (), (0, 4))
