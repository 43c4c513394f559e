"""Objects in views: boxes and masks follow the view's matrix, and what is not in the view is not in its targets."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_masks

from fcache.cache_spec import SpecError
from fcache.cache_spec.targets import target_arrays, unpack_masks
from fcache.cache_spec.view import transform_points
from fcache.extractor.coco import Bounds, decode_mask
from fcache.extractor.coco.index import _crossings
from fcache.extractor.datasets import Instances, RawSample
from fcache.extractor.views import (
    CentreCrop,
    Cut,
    Fit,
    KeepRatio,
    RandAugment,
    ResizedCrop,
    ScaleCrop,
    ViewedSample,
    canvas,
    cut_view,
    instance_limits,
)
from fcache.extractor.views.frames import largest_scale

JITTER = ScaleCrop(size=(96, 96), long=96, short=96, scale=(0.1, 2.0), flip=0.5)
PLACES = {
    "jitter": JITTER,
    "keep-ratio": KeepRatio(long=133, short=80),
    "resized-crop": ResizedCrop(size=(64, 48), scale=(0.3, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5),
    "centre-crop": CentreCrop(size=(64, 48), short=60),
    "fit": Fit(size=(100, 130)),
}


def rle(mask: np.ndarray) -> bytes:
    return coco_masks.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]


def objects(boxes, masks, *, size: tuple[int, int], crowd=None) -> Instances:
    """Objects with these boxes (x0, y0, x1, y1) and masks [H, W]."""
    records = [
        {
            "id": 7 * i + 1,
            "image_id": 5,
            "category_id": 3,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": int(np.sum(mask)),
            "iscrowd": int(crowd[i]) if crowd is not None else 0,
            "segmentation": {"size": list(size), "counts": rle(np.asarray(mask)).decode()},
        }
        for i, ((x0, y0, x1, y1), mask) in enumerate(zip(boxes, masks, strict=True))
    ]
    return Instances(
        size=size,
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        labels=np.arange(len(boxes), dtype=np.int32),
        crowd=np.array([r["iscrowd"] for r in records], dtype=np.uint8),
        ids=np.array([r["id"] for r in records], dtype=np.int64),
        masks=tuple(r["segmentation"]["counts"].encode() for r in records),
        record={"image": {"id": 5, "height": size[0], "width": size[1]}, "annotations": records},
    )


def filled(boxes, size: tuple[int, int]) -> Instances:
    """Objects that fill their boxes, whose sides are whole numbers."""
    masks = []
    for x0, y0, x1, y1 in boxes:
        mask = np.zeros(size, dtype=np.uint8)
        mask[y0:y1, x0:x1] = 1
        masks.append(mask)
    return objects(boxes, masks, size=size)


def cut_one(place, found: Instances, *, view: int = 0, role: str = "training", looks=()) -> ViewedSample:
    cut = Cut(place, looks)
    raw = RawSample(np.zeros((*found.size, 3), dtype=np.uint8), {"instances": found})
    return cut_view(cut, seed=1, sample_id="s", view=view, raw=raw, canvas=canvas(cut, found.size), role=role)


def masks_of(viewed: ViewedSample) -> list[np.ndarray]:
    counts = unpack_masks(viewed.targets["instances/rle"], viewed.targets["instances/rle_ends"])
    return [decode_mask(c, viewed.view.canvas) for c in counts]


def check(viewed: ViewedSample, found: Instances) -> None:
    """What holds for every view of any objects."""
    t, view = viewed.targets, viewed.view
    count = len(t["instances/labels"])
    limits = instance_limits(
        [Bounds(found.size, len(found.masks), _bound(found))], Cut(JITTER), view.canvas, "training"
    )
    for a in target_arrays("instances", limits=limits, canvas=view.canvas, role="training"):
        assert t[a.path].dtype == a.dtype, a.path
        assert a.path == "instances/rle" or t[a.path].shape == (count, *a.shape[1:]), a.path
    boxes = t["instances/boxes"]
    assert np.isfinite(boxes).all()
    assert np.isfinite(t["instances/area"]).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()
    assert (boxes >= 0).all()
    assert (boxes <= np.array([view.valid[1], view.valid[0]] * 2)).all()
    assert (np.diff(t["instances/ids"]) > 0).all()
    for mask, area in zip(masks_of(viewed), t["instances/area"], strict=True):
        assert mask.shape == view.canvas
        assert mask.sum() == area >= 1
        assert not mask[view.valid[0] :].any()
        assert not mask[:, view.valid[1] :].any()


def _bound(found: Instances) -> int:
    return sum(_crossings(r["segmentation"]) for r in found.record["annotations"])


@st.composite
def boxes_in(draw, size: tuple[int, int] = (70, 110)):
    x0, y0 = draw(st.integers(0, size[1] - 1)), draw(st.integers(0, size[0] - 1))
    return x0, y0, draw(st.integers(x0 + 1, size[1])), draw(st.integers(y0 + 1, size[0]))


@pytest.mark.parametrize("name", PLACES)
@settings(max_examples=10)
@given(st.lists(boxes_in(), min_size=1, max_size=4), st.integers(0, 30))
def test_a_box_drawn_as_a_mask_stays_its_box(name: str, boxes, view: int):
    found = filled(boxes, (70, 110))
    viewed = cut_one(PLACES[name], found, view=view)
    check(viewed, found)
    for box, mask in zip(viewed.targets["instances/boxes"], masks_of(viewed), strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        tight = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        # Pixels of the mask have their centres in the box, or on the pixel's border.
        assert np.abs(np.array(tight) - box).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("name", PLACES)
def test_masks_are_the_images_masks_warped_by_the_matrix(name: str):
    size = (70, 110)
    noise = np.random.default_rng(0).random((6, *size)) < np.array([0.02, 0.1, 0.3, 0.5, 0.9, 1.0])[:, None, None]
    found = objects([(0, 0, 110, 70)] * 6, noise, size=size)
    flips, sizes = set(), set()
    for view in range(12):
        viewed = cut_one(PLACES[name], found, view=view)
        check(viewed, found)
        flips.add(viewed.drawn.frame.flipped)
        sizes.add(viewed.view.valid)
        rows, columns = np.mgrid[: viewed.view.valid[0], : viewed.view.valid[1]] + 0.5
        points = transform_points(viewed.view.to_image, np.stack([columns, rows], axis=-1))
        column, row = np.floor(points + 1e-7).astype(int).transpose(2, 0, 1)
        kept = {int(i): m for i, m in zip(viewed.targets["instances/labels"], masks_of(viewed), strict=True)}
        for i, mask in enumerate(noise):
            expected = mask[row.clip(0, 69), column.clip(0, 109)]
            if i not in kept:
                assert not expected.any()
            else:
                shown = kept[i][: viewed.view.valid[0], : viewed.view.valid[1]]
                np.testing.assert_array_equal(shown, expected)
    if name == "jitter":
        assert flips == {False, True}
        assert {s for s in sizes if s != (96, 96)}, "a scale below 1 leaves part of the canvas empty"


def test_a_flipped_view_mirrors_boxes_and_masks():
    found = filled([(3, 5, 20, 30), (50, 0, 110, 70)], (70, 110))
    place = ScaleCrop(size=(70, 110), long=110, short=70, scale=(1.0, 1.0), flip=0.5)
    plain, flipped = None, None
    for view in range(20):
        viewed = cut_one(place, found, view=view)
        if viewed.drawn.frame.flipped:
            flipped = viewed
        else:
            plain = viewed
    assert plain is not None
    assert flipped is not None
    a, b = plain.targets["instances/boxes"], flipped.targets["instances/boxes"]
    np.testing.assert_array_equal(a, [[3, 5, 20, 30], [50, 0, 110, 70]])
    np.testing.assert_array_equal(b, [[90, 5, 107, 30], [0, 0, 60, 70]])
    for x, y in zip(masks_of(plain), masks_of(flipped), strict=True):
        np.testing.assert_array_equal(x[:, ::-1], y)


def test_a_one_pixel_object_is_there_where_it_is_a_pixel_and_gone_where_it_is_less():
    found = filled([(40, 30, 41, 31)], (70, 110))
    counts = set()
    for view in range(40):
        viewed = cut_one(JITTER, found, view=view)
        check(viewed, found)
        scale = viewed.drawn.frame.resized[1] / 110
        count = len(viewed.targets["instances/labels"])
        counts.add(count)
        if scale < 1:
            assert count == 0
        if count:
            assert viewed.targets["instances/area"][0] >= 1
    assert counts == {0, 1}


def test_a_box_cut_by_the_crop_ends_at_the_crop():
    found = filled([(0, 0, 110, 70)], (70, 110))
    place = ScaleCrop(size=(40, 50), long=110, short=110, scale=(1.0, 1.0), flip=0.0)
    viewed = cut_one(place, found)
    np.testing.assert_array_equal(viewed.targets["instances/boxes"], [[0, 0, 50, 40]])
    assert viewed.targets["instances/area"].tolist() == [2000]
    outside = filled([(0, 0, 2, 2), (108, 68, 110, 70)], (70, 110))
    seen = [len(cut_one(place, outside, view=v).targets["instances/labels"]) for v in range(20)]
    assert min(seen) == 0
    assert max(seen) <= 1


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_the_box_of_an_object_that_the_crop_cuts_is_drawn_round_what_is_left(flip: float):
    # An L: a thin stroke down, and at its foot one to the right. Of four times its size a quarter or so is seen.
    mask = np.zeros((70, 110), dtype=np.uint8)
    mask[5:65, 10:14] = 1
    mask[61:65, 10:90] = 1
    found = objects([(10, 5, 90, 65)], [mask], size=(70, 110))
    place = ScaleCrop(size=(140, 220), long=220, short=220, scale=(2.0, 2.0), flip=flip)
    smaller = 0.0
    for view in range(20):
        viewed = cut_one(place, found, view=view)
        check(viewed, found)
        for box, shown in zip(viewed.targets["instances/boxes"], masks_of(viewed), strict=True):
            rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
            np.testing.assert_array_equal(box, [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            corners = transform_points(viewed.drawn.matrix, np.array([[10.0, 5.0], [90.0, 65.0]]))
            clipped = np.clip(corners, 0, (220, 140))
            smaller = max(smaller, np.abs(np.diff(clipped, axis=0)).prod() - (box[2:] - box[:2]).prod())
    assert smaller > 10_000, "the annotated box clipped is much larger somewhere"


def test_an_annotated_box_is_moved_as_it_is_and_not_drawn_round_the_mask():
    mask = np.zeros((70, 110), dtype=np.uint8)
    mask[10:20, 10:20] = 1
    found = objects([(9.25, 8.5, 21.75, 20.5)], [mask], size=(70, 110))
    place = Fit(size=(140, 220))
    np.testing.assert_array_equal(cut_one(place, found).targets["instances/boxes"], [[18.5, 17, 43.5, 41]])


def test_an_image_without_objects_has_empty_targets():
    found = objects([], [], size=(70, 110))
    viewed = cut_one(PLACES["fit"], found, role="evaluation")
    check(viewed, found)
    assert viewed.targets["instances/boxes"].shape == (0, 4)
    assert len(viewed.targets["instances/rle"]) == 0
    truth = json.loads(viewed.targets["instances/truth"].tobytes())
    assert truth == {"image": {"id": 5, "height": 70, "width": 110}, "annotations": []}


def test_five_hundred_objects_and_a_crowd_keep_their_order_and_fit_their_limits():
    random = np.random.default_rng(1)
    corners = random.integers(0, (100, 60), (500, 2))
    sides = random.integers(1, 30, (500, 2))
    boxes = [
        (int(x), int(y), int(min(110, x + w)), int(min(70, y + h)))
        for (x, y), (w, h) in zip(corners, sides, strict=True)
    ]
    masks = []
    for x0, y0, x1, y1 in boxes:
        mask = np.zeros((70, 110), dtype=np.uint8)
        # A checkerboard: as many runs as there can be.
        mask[y0:y1, x0:x1] = np.indices((y1 - y0, x1 - x0)).sum(0) % 2 == 0
        masks.append(mask)
    found = objects(boxes, masks, size=(70, 110), crowd=np.arange(500) % 100 == 0)
    for name, place in PLACES.items():
        for role in ("training", "evaluation"):
            viewed = cut_one(place, found, view=3, role=role)
            check(viewed, found)
            limits = instance_limits([Bounds((70, 110), 500, _bound(found))], Cut(place), viewed.view.canvas, role)
            for a in target_arrays("instances", limits=limits, canvas=viewed.view.canvas, role=role):
                assert len(viewed.targets[a.path]) <= a.shape[0], (name, a.path)
    assert viewed.targets["instances/crowd"].sum() == 5
    assert len(json.loads(viewed.targets["instances/truth"].tobytes())["annotations"]) == 500


@pytest.mark.parametrize("name", PLACES)
def test_a_column_of_the_image_is_no_more_columns_of_a_view_than_its_bound_says(name: str) -> None:
    """One column of pixels, wherever it is: the view's masks have so many columns, and that many there can be."""
    most = 0
    for column in range(0, 110, 3):
        mask = np.zeros((70, 110), dtype=np.uint8)
        mask[:, column] = 1
        found = objects([(0, 0, 110, 70)], [mask], size=(70, 110))
        for view in range(30):
            for shown in masks_of(cut_one(PLACES[name], found, view=view)):
                most = max(most, int(shown.any(0).sum()))
    bound = int(largest_scale(PLACES[name], (70, 110))) + 1
    assert most <= bound
    # A crop of one pixel may fill a view; nothing draws such crops here.
    assert name == "resized-crop" or most >= bound - 1


@settings(max_examples=20)
@given(st.lists(st.floats(0, 70), min_size=6, max_size=60), st.integers(0, 50), st.sampled_from(sorted(PLACES)))
def test_a_view_of_a_polygon_fits_its_limit(numbers: list[float], view: int, name: str):
    segmentation = [numbers[: len(numbers) // 2 * 2]]
    counts = coco_masks.merge(coco_masks.frPyObjects(segmentation, 70, 110))["counts"]
    found = objects([(0, 0, 110, 70)], [decode_mask(counts, (70, 110))], size=(70, 110))
    viewed = cut_one(PLACES[name], found, view=view)
    limits = instance_limits(
        [Bounds((70, 110), 1, _crossings(segmentation))], Cut(PLACES[name]), viewed.view.canvas, "training"
    )
    assert len(viewed.targets["instances/rle"]) <= limits["instances_rle_bytes"]


def test_the_truth_is_what_the_evaluation_of_coco_reads():
    found = filled([(3, 5, 20, 30)], (70, 110))
    truth = json.loads(cut_one(JITTER, found, role="evaluation").targets["instances/truth"].tobytes())
    (annotation,) = truth["annotations"]
    assert (annotation["image_id"], annotation["bbox"], annotation["area"]) == (5, [3, 5, 17, 25], 425)
    assert coco_masks.area(annotation["segmentation"]) == 425
    assert "instances/truth" not in cut_one(JITTER, found).targets


def test_views_that_are_rotated_or_sheared_are_refused():
    found = filled([(3, 5, 20, 30)], (70, 110))
    cut = Cut(PLACES["resized-crop"], (RandAugment(probability=1.0, operations=9),))
    with pytest.raises(SpecError, match="scaled, cropped and flipped"):
        cut_one(cut.place, found, looks=cut.looks)
    with pytest.raises(SpecError, match="without RandAugment, such as coco-lsj"):
        instance_limits([Bounds((70, 110), 1, 9)], cut, (64, 48), "training")
