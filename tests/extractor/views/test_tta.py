"""Test-time views: which ones a text names, where they lie, and what they show."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fcache.cache_spec import SpecError
from fcache.extractor.datasets import RawSample
from fcache.extractor.views import (
    SCALES,
    TTA,
    CentreCrop,
    ColourJitter,
    Cut,
    Drawn,
    Fit,
    KeepRatio,
    ResizedCrop,
    apply_view,
    canvas,
    cut_views,
    parse_tta,
    plan_views,
)

ADE = Cut(KeepRatio(long=2048, short=512))
CROP = (512, 512)


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    ("text", "expected", "name"),
    [
        ("plain", TTA(), "plain"),
        ("flip", TTA(flip=True), "flip"),
        ("ms", TTA(SCALES), "ms"),
        ("ms-flip", TTA(SCALES, flip=True), "ms-flip"),
        ("flip-ms", TTA(SCALES, flip=True), "ms-flip"),
        ("ms-flip:scales=0.5,1,1.5", TTA((0.5, 1.0, 1.5), flip=True), "ms-flip:scales=0.5,1,1.5"),
        ("ms:scales=0.3333333333,1e-05", TTA((0.3333333333, 1e-05)), "ms:scales=0.3333333333,1e-05"),
        ("slide", TTA(window=(512, 512), stride=(341, 341)), "slide:window=512,stride=341"),
        (
            "ms-slide:window=300x400,scales=1,2,stride=100",
            TTA((1.0, 2.0), window=(300, 400), stride=(100, 100)),
            "ms-slide:scales=1,2,window=300x400,stride=100",
        ),
    ],
)
def test_a_text_names_views_and_views_have_one_name(text: str, expected: TTA, name: str) -> None:
    found = parse_tta(text, crop=CROP)
    assert found == expected
    assert found.name == name
    assert parse_tta(name, crop=(1, 1)) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ms-flop", "did you mean flip"),
        ("msflip", "ms-flip|did you mean|ms"),
        ("ms-ms", "at most once"),
        ("plain-flip", "at most once"),
        ("flip:scales=1", "scales= belongs to ms"),
        ("ms:window=3", "window= belongs to slide"),
        ("ms:scale=1,2", "did you mean scales"),
        ("ms:scales=1,x", "scales are numbers"),
        ("ms:scales=1,1", "different positive"),
        ("ms:scales=0,1", "different positive"),
        ("ms:scales=nan", "finite|positive"),
        ("ms:scales=inf", "finite"),
        ("ms:0.5", "option=value"),
        ("ms:scales=0.5,scales=1", "scales= is given twice"),
        ("slide:window=big", "window is a number"),
        ("slide:window=0", "at least 1"),
        ("slide:window=64,stride=65", "gaps"),
        ("slide:window=64x32,stride=48", "gaps"),
    ],
)
def test_a_wrong_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_tta(text, crop=CROP)


# (2048, 512) times a ratio, rounded down; then one factor for both sides, the result rounded to the nearest pixel.
@pytest.mark.parametrize(
    ("image", "sizes"),
    [
        ((512, 683), [(256, 342), (384, 512), (512, 683), (640, 854), (768, 1025), (896, 1195)]),
        ((360, 480), [(256, 341), (384, 512), (512, 683), (640, 853), (768, 1024), (896, 1195)]),
        ((100, 1000), [(102, 1024), (154, 1536), (205, 2048), (256, 2560), (307, 3072), (358, 3584)]),
    ],
)
def test_scales_follow_the_reference_s_rule(image: tuple[int, int], sizes: list[tuple[int, int]]) -> None:
    plans = plan_views(ADE, TTA(SCALES, flip=True), image, multiple=32)
    assert [p.view.valid for p in plans] == [size for size in sizes for _ in range(2)]
    assert [p.frame.flipped for p in plans] == [False, True] * 6
    for p in plans:
        assert all(c % 32 == 0 and 0 <= c - v < 32 for c, v in zip(p.canvas, p.view.valid, strict=True))
    assert plans[4].canvas == canvas(ADE, image)


def test_a_ratio_of_a_half_of_an_odd_side_rounds_down() -> None:
    # 51.5 and 499.5 are 51 and 499: neither rounded up, nor to the nearest even number.
    (plan,) = plan_views(Cut(KeepRatio(long=999, short=103)), TTA((0.5,)), (200, 300), multiple=1)
    assert plan.view.valid == (51, 77)
    (plan,) = plan_views(Cut(KeepRatio(long=999, short=999)), TTA((0.5,)), (300, 300), multiple=1)
    assert plan.view.valid == (499, 499)


def test_other_evaluation_views_scale_with_their_canvas() -> None:
    (half,) = plan_views(Cut(Fit(size=(100, 130))), TTA((0.5,)), (200, 200), multiple=32)
    assert (half.view.valid, half.canvas) == ((50, 50), (64, 96))
    (whole,) = plan_views(Cut(Fit(size=(100, 130))), TTA(), (200, 200), multiple=32)
    # At scale 1 the canvas is the evaluation record's, whatever it is.
    assert (whole.view.valid, whole.canvas) == ((100, 100), (100, 130))
    crops = plan_views(Cut(CentreCrop(size=(64, 48), short=80)), TTA((0.5, 1.0)), (160, 200), multiple=8)
    assert [p.view.valid for p in crops] == [(32, 24), (64, 48)]
    # The same content: the crop's corner lies at the same place of the image.
    corners = [p.view.to_image @ [0.0, 0.0, 1.0] for p in crops]
    np.testing.assert_allclose(corners[0], corners[1], atol=1.0)


def reference_windows(height: int, width: int, crop: tuple[int, int], stride: tuple[int, int]) -> list[tuple[int, ...]]:
    """Sliding windows as the issue states them, by a plain walk."""
    found = []
    for y in range(0, 10**6, stride[0]):
        for x in range(0, 10**6, stride[1]):
            bottom, right = min(y + crop[0], height), min(x + crop[1], width)
            found.append((max(bottom - crop[0], 0), max(right - crop[1], 0), bottom, right))
            if right == width:
                break
        if bottom == height:
            break
    return found


@given(
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)),
    st.booleans(),
)
def test_windows_lie_a_stride_apart_the_last_inside_and_cover_the_picture(size, window, share, flip) -> None:
    stride = (max(1, int(window[0] * share[0])), max(1, int(window[1] * share[1])))
    cut = Cut(Fit(size=size))
    plans = plan_views(cut, TTA(flip=flip, window=window, stride=stride), size, multiple=8)
    expected = reference_windows(*size, window, stride)
    assert len(plans) == len(expected) * (2 if flip else 1)
    count = np.zeros(size, int)
    for plan, (top, left, bottom, right) in zip(plans, expected * 2, strict=False):
        view = plan.view
        assert view.valid == (bottom - top, right - left)
        assert all(c % 8 == 0 and 0 <= c - v < 8 for c, v in zip(view.canvas, view.valid, strict=True))
        # Where the window's corner comes from; a mirrored picture is walked from its own left.
        x, y = view.to_image @ [0.0, 0.0, 1.0]
        assert y == pytest.approx(top)
        assert x == pytest.approx(size[1] - left if plan.frame.flipped else left)
        count[top:bottom, left:right] += 1
    assert count.min() > 0


WHOLE = (KeepRatio(long=300, short=100), Fit(size=(96, 120)))
WINDOWS = ("flip-slide:window=40x64,stride=30", "ms-slide:scales=0.5,1.3,window=33")


@pytest.mark.parametrize(
    ("place", "text"),
    [
        *((place, "ms-flip") for place in (*WHOLE, CentreCrop(size=(64, 48), short=80))),
        *((place, text) for place in WHOLE for text in WINDOWS),
    ],
)
def test_cut_views_show_what_apply_view_shows(place, text: str) -> None:
    image = picture(90, 131)
    plans = plan_views(Cut(place), parse_tta(text, crop=CROP), (90, 131), multiple=16)
    for plan, pixels in zip(plans, cut_views(image, plans), strict=True):
        viewed = apply_view(Drawn(plan.frame, ()), raw=RawSample(image), canvas=plan.canvas, role="evaluation")
        assert torch.equal(pixels, viewed.image)
        assert plan.view == viewed.view


def test_views_that_make_no_sense_are_refused() -> None:
    with pytest.raises(SpecError, match="whole image"):
        plan_views(Cut(CentreCrop(size=(64, 48), short=80)), TTA(window=(8, 8), stride=(8, 8)), (90, 90), multiple=1)
    place = ResizedCrop(size=(64, 48), scale=(0.3, 1.0), ratio=(0.7, 1.4), flip=0.5)
    with pytest.raises(SpecError, match="drawn at random"):
        plan_views(Cut(place), TTA(flip=True), (90, 90), multiple=1)
    with pytest.raises(SpecError, match="random looks"):
        plan_views(Cut(Fit(size=(64, 48)), (ColourJitter(0.4),)), TTA(flip=True), (90, 90), multiple=1)
