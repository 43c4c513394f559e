import json

import numpy as np
import pytest
import torch
from pycocotools.mask import encode

from fcache.cache_spec import DataError, TargetSpec
from fcache.heads import Detections, detections_json, draw_detections
from fcache.heads.detections import decode_masks

SPEC = TargetSpec(
    "instances", "x", ("cat", "dog"), palette=((200, 0, 0), (0, 0, 200)), conversion={"category_ids": [17, 18]}
)
SIZE = (60, 80)


def detections(*found: tuple[tuple[int, int, int, int], float, int]) -> Detections:
    """Detections whose masks fill the upper halves of their boxes."""
    masks = []
    for (x0, y0, x1, y1), _, _ in found:
        mask = np.zeros(SIZE, np.uint8, order="F")
        mask[y0 : (y0 + y1) // 2, x0:x1] = 1
        masks.append(encode(mask)["counts"])
    return Detections(
        boxes=torch.tensor([f[0] for f in found], dtype=torch.float32).reshape(-1, 4),
        scores=torch.tensor([f[1] for f in found]),
        labels=torch.tensor([f[2] for f in found], dtype=torch.int64),
        masks=tuple(masks),
        size=SIZE,
    )


def test_masks_are_mixed_in_and_boxes_drawn():
    image = np.full((*SIZE, 3), 100, np.uint8)
    drawn = draw_detections(image, detections(((30, 20, 70, 56), 0.9, 0)), SPEC)
    assert drawn.dtype == np.uint8
    assert tuple(drawn[37, 60]) == (150, 50, 50)
    assert tuple(drawn[45, 60]) == (100, 100, 100)
    assert all(tuple(drawn[y, x]) == (200, 0, 0) for y, x in ((55, 50), (50, 30), (50, 69)))
    assert tuple(drawn[57, 50]) == (100, 100, 100)


def test_only_what_is_certain_enough_is_drawn_and_listed():
    image = np.zeros((*SIZE, 3), np.uint8)
    found = detections(((5, 5, 20, 20), 0.9, 1), ((40, 40, 60, 58), 0.3, 0))
    legend = draw_detections(image, found, SPEC)[:, 80:]
    assert (legend == (0, 0, 200)).all(-1).any()
    assert not (legend == (200, 0, 0)).all(-1).any()
    assert (draw_detections(image, found, SPEC, min_score=0.2)[:, 80:] == (200, 0, 0)).all(-1).any()
    nothing = draw_detections(image, found, SPEC, min_score=0.95)
    assert np.array_equal(nothing, image), "without a legend"


def test_an_image_of_another_size_is_refused():
    with pytest.raises(DataError, match=r"\(4, 4\).*\(60, 80\)"):
        draw_detections(np.zeros((4, 4, 3), np.uint8), detections(), SPEC)


def test_the_list_is_in_the_form_of_cocos_results():
    found = detections(((5, 6, 20, 26), 0.75, 1))
    (entry,) = json.loads(json.dumps(detections_json(found, SPEC)))
    assert entry["bbox"] == [5, 6, 15, 20]
    assert (entry["category_id"], entry["class"], entry["score"]) == (18, "dog", 0.75)
    assert entry["segmentation"]["size"] == [60, 80]
    assert entry["segmentation"]["counts"].encode() == found.masks[0]


def test_masks_are_decoded_as_by_pycocotools():
    found = detections(((5, 6, 20, 26), 0.75, 1), ((0, 0, 80, 60), 0.5, 0))
    masks = decode_masks(found.masks, SIZE)
    assert masks.sum(axis=(1, 2)).tolist() == [150, 2400]
    assert decode_masks((), SIZE).shape == (0, 60, 80)
