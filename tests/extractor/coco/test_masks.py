"""Run lengths of COCO: every form that an annotation has them in, and masks written from a part."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pycocotools import mask as coco_masks

from fcache.cache_spec import DataError
from fcache.extractor.coco import decode_mask, encode_part, mask_area, mask_box, most_bytes, segmentation_rle
from fcache.extractor.coco.index import _crossings
from fcache.extractor.coco.masks import run_lengths

SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12))


@st.composite
def masks(draw) -> np.ndarray:
    height, width = draw(SIZES)
    bits = draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    return np.array(bits, dtype=np.uint8).reshape(height, width)


def rle(mask: np.ndarray) -> bytes:
    return coco_masks.encode(np.asfortranarray(mask))["counts"]


def crossings(mask: np.ndarray) -> int:
    """How often the columns of a mask cross its borders, those at the picture's edges too."""
    return int(np.abs(np.diff(np.pad(mask, ((1, 1), (0, 0))).astype(int), axis=0)).sum())


@given(masks(), SIZES, SIZES)
def test_a_mask_written_from_a_part_equals_the_whole(part: np.ndarray, before: tuple[int, int], after: tuple[int, int]):
    top, left = before[0] - 1, before[1] - 1
    size = (top + part.shape[0] + after[0] - 1, left + part.shape[1] + after[1] - 1)
    whole = np.zeros(size, dtype=np.uint8)
    whole[top : top + part.shape[0], left : left + part.shape[1]] = part
    counts = encode_part(part.astype(bool), top, left, size)
    assert counts == rle(whole)
    np.testing.assert_array_equal(decode_mask(counts, size), whole)


@given(masks())
def test_run_lengths_are_read_from_their_text(mask: np.ndarray):
    size = (mask.shape[0], mask.shape[1])
    runs = run_lengths(rle(mask))
    assert runs.sum() == mask.size
    flat = np.repeat(np.arange(len(runs)) % 2, runs)
    np.testing.assert_array_equal(flat, mask.ravel(order="F"))
    for counts in (rle(mask).decode(), runs.tolist()):
        assert segmentation_rle({"size": list(size), "counts": counts}, size) == rle(mask)
    assert mask_area(rle(mask), size) == mask.sum()


def test_long_runs_are_read_from_their_text():
    size = (3000, 4000)
    runs = [11_000_000, 5, 900_000, 3, 99_992]
    counts = coco_masks.frPyObjects({"counts": runs, "size": list(size)}, *size)["counts"]
    assert run_lengths(counts).tolist() == runs


@given(st.lists(st.floats(-2, 34), min_size=6, max_size=40), st.integers(1, 3))
@example([10.3, 3.0, 10.7, 3.0, 10.7, 30.0, 10.3, 30.0], 1)
def test_a_polygon_takes_no_more_bytes_than_its_bound(numbers: list[float], pieces: int):
    polygon = numbers[: len(numbers) // 2 * 2]
    segmentation = [[n * k / pieces for n in polygon] for k in range(1, pieces + 1)]
    size = (32, 32)
    counts = segmentation_rle(segmentation, size)
    assert counts == coco_masks.merge(coco_masks.frPyObjects(segmentation, *size))["counts"]
    assert crossings(decode_mask(counts, size)) <= _crossings(segmentation)
    assert len(counts) <= most_bytes(_crossings(segmentation), 1, size)


@given(masks())
def test_run_lengths_take_no_more_bytes_than_their_bound(mask: np.ndarray):
    size = (mask.shape[0], mask.shape[1])
    for counts in (rle(mask).decode(), run_lengths(rle(mask)).tolist()):
        bound = _crossings({"size": list(size), "counts": counts})
        assert len(rle(mask)) <= most_bytes(bound, 1, size)
        assert crossings(mask) <= bound


def test_the_box_of_a_mask_is_tight():
    mask = np.zeros((9, 12), dtype=np.uint8)
    mask[2:5, 3:8] = 1
    assert mask_box(rle(mask), (9, 12)) == (2, 3, 3, 5)
    assert mask_box(rle(np.zeros((9, 12), dtype=np.uint8)), (9, 12))[2:] == (0, 0)


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([], "has no segmentation"),
        (None, "has no segmentation"),
        ([[1, 1, 5, 5]], "a polygon of 4 numbers, expected x and y of three points"),
        ([[1, 1, 5, 5, 3, 3, 2]], "a polygon of 7 numbers"),
        ([[1, 1, 5, 1, 5, 5], [1, 2]], "a polygon of 2 numbers"),
        ([5, 6, 7, 8, 9, 10], "a polygon of 5 numbers"),
        ([[1, 1, 5, "x", 3, 3]], "no number"),
        ([[1, 1, 5, float("nan"), 3, 3]], "not finite"),
        ([[1, 1, 1e9, 2, 3, 3]], r"a polygon point \(1e\+09, 2\) outside the image of 10x8 pixels"),
        ({"size": [8, 10], "counts": [3, 4]}, "run lengths of 7 pixels, its image has 80"),
        ({"size": [8, 10], "counts": [90, -10]}, "run lengths of 80 pixels"),
        ({"size": [10, 8], "counts": [80]}, r"run lengths for the size \[10, 8\], its image has \[8, 10\]"),
        ({"size": [8, 10], "counts": [80.5]}, "neither a text nor a list of whole numbers"),
        ({"size": [8, 10]}, "neither a text nor a list"),
        ({"size": [8, 10], "counts": "€"}, "run lengths"),
        ({"size": [8, 10], "counts": ""}, "run lengths of 0 pixels"),
        ({"size": [8, 10], "counts": "oooooooooooooooo"}, "no text of COCO's form"),
        ({"size": [8, 10], "counts": "0" * 40}, "run lengths of 0 pixels"),
    ],
)
def test_broken_masks_say_what_is_wrong(segmentation, reason: str):
    with pytest.raises(DataError, match=reason):
        segmentation_rle(segmentation, (8, 10))
