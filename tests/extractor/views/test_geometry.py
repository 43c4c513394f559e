"""A view's matrix says exactly what its pixels show, for images and labels alike."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import InterpolationMode, v2

from fcache.cache_spec import IGNORE, DataError
from fcache.cache_spec.view import invert_affine, transform_points
from fcache.extractor.datasets import RawSample
from fcache.extractor.views import (
    CentreCrop,
    Cut,
    Drawn,
    Fit,
    KeepRatio,
    RandAugment,
    ResizedCrop,
    ScaleCrop,
    ViewedSample,
    apply_view,
    canvas,
    cut_view,
    draw_view,
)
from fcache.extractor.views.draws import Step
from fcache.extractor.views.steps import show

PLACES = {
    "scale-crop": ScaleCrop(size=(96, 80), long=400, short=100, scale=(0.5, 2.0), flip=0.5),
    # Pictures smaller than the crop, so that there is padding.
    "padded": ScaleCrop(size=(200, 160), long=300, short=90, scale=(0.7, 1.3), flip=0.5),
    "keep-ratio": KeepRatio(long=300, short=150),
    "resized-crop": ResizedCrop(
        size=(64, 48), scale=(0.3, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5, interpolation="bilinear"
    ),
    "centre-crop": CentreCrop(size=(64, 48), short=100, interpolation="bilinear"),
    "fit": Fit(size=(100, 130)),
}


def ramp(height: int, width: int) -> np.ndarray:
    """An image whose red is its column and whose green is its row."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8)


def cut_one(place, raw: RawSample, *, view: int, role: str = "training", looks=()) -> ViewedSample:
    cut = Cut(place, looks)
    size = (raw.image.shape[0], raw.image.shape[1])
    return cut_view(cut, seed=3, sample_id="s", view=view, raw=raw, canvas=canvas(cut, size), role=role)


def centres(size: tuple[int, int]) -> np.ndarray:
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    return np.stack([columns, rows], axis=-1)


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("size", [(170, 230), (240, 150)])
def test_pixels_show_the_image_points_that_the_matrix_says(name: str, size: tuple[int, int]) -> None:
    flips = set()
    for view in range(8):
        viewed = cut_one(PLACES[name], RawSample(ramp(*size)), view=view)
        assert viewed.image.shape == (3, *viewed.view.valid)
        flips.add(viewed.drawn.frame.flipped)
        points = transform_points(viewed.view.to_image, centres(viewed.view.valid))
        # Antialiasing looks beyond the border only near it.
        top, left, height, width = viewed.drawn.frame.source
        near = np.array([left + 5, top + 5]), np.array([left + width - 5, top + height - 5])
        inside = ((points > near[0]) & (points < near[1])).all(-1)
        assert inside.sum() > 500
        shown = show(ramp(*size).astype(np.float32), viewed.drawn.frame)
        error = (shown[:2].permute(1, 2, 0).numpy() + 0.5 - points)[inside]
        # The weights of a sampled antialiasing kernel do not balance in every phase: a wobble of up to a tenth of a
        # pixel around an exact mean.
        assert np.abs(error).max() < 0.12
        assert np.abs(error.mean(0)).max() < 0.005, "a shift of the whole view would show here"
        assert (viewed.image - shown).abs().max() < 0.52, "8-bit colours round by half a step"
    assert flips == ({False, True} if hasattr(PLACES[name], "flip") else {False})


def test_pixels_of_rotated_and_sheared_views_follow_the_matrix_too() -> None:
    # A scale of exactly one half would round every average of two neighbours the same way.
    raw = RawSample(ramp(190, 230))
    drawn = draw_view(Cut(PLACES["fit"]), seed=0, sample_id="s", view=0, image_size=(190, 230))
    c, s = np.cos(0.3), np.sin(0.3)
    steps = (Step("warp", (c, -s, 12.0, s, c, -9.0)), Step("warp", (1.0, 0.2, 3.0, 0.0, 1.0, 5.0)))
    viewed = apply_view(Drawn(drawn.frame, steps), raw=raw, canvas=(100, 130), role="training")
    points = transform_points(viewed.view.to_image, centres(viewed.view.valid))
    between = transform_points(invert_affine(np.reshape(steps[1].values, (2, 3))), centres(viewed.view.valid))
    shown = ((between > 2) & (between < np.array(viewed.view.valid[::-1]) - 2)).all(-1)
    inside = ((points > 12) & (points < np.array([218, 178]))).all(-1) & shown
    error = (viewed.image[:2].permute(1, 2, 0).numpy() + 0.5 - points)[inside]
    assert inside.sum() > 3000
    found = apply_view(
        Drawn(drawn.frame, steps),
        raw=RawSample(raw.image, {"semantic": np.zeros((190, 230), np.uint8)}),
        canvas=(100, 130),
        role="training",
    ).targets["semantic/map"]
    gone = ((between < 0) | (between > np.array(viewed.view.valid[::-1]))).any(-1)
    assert gone.sum() > 100
    assert (found[: gone.shape[0], : gone.shape[1]][gone] == IGNORE).all()
    # Three resamplings that each round to 8 bits by up to a half, which is half a pixel of the image, and the wobble.
    assert np.abs(error).max() < 3 * 0.5 + 0.12
    assert np.abs(error.mean(0)).max() < 0.06


@given(
    name=st.sampled_from(sorted(PLACES)),
    view=st.integers(0, 1000),
    size=st.tuples(st.integers(60, 220), st.integers(60, 220)),
    corner=st.tuples(st.floats(0.1, 0.6), st.floats(0.1, 0.6)),
)
def test_the_box_of_a_mask_in_the_view_is_the_transformed_box(name, view, size, corner) -> None:
    top, left = int(corner[0] * size[0]), int(corner[1] * size[1])
    bottom, right = top + size[0] // 3, left + size[1] // 3
    labels = np.zeros(size, dtype=np.uint8)
    labels[top:bottom, left:right] = 1
    viewed = cut_one(PLACES[name], RawSample(ramp(*size), {"semantic": labels}), view=view)
    corners = transform_points(viewed.view.matrix, np.array([[left, top], [right, bottom]], dtype=float))
    low, high = corners.min(0), corners.max(0)
    limit = np.array(viewed.view.valid[::-1])
    low, high = low.clip(0, limit), high.clip(0, limit)
    rows, columns = np.nonzero(viewed.targets["semantic/map"] == 1)
    if (high - low).min() < 1:
        return
    found = np.array([[columns.min(), rows.min()], [columns.max() + 1, rows.max() + 1]])
    assert np.abs(found - np.stack([low, high])).max() <= 0.5 + 1e-6


@given(name=st.sampled_from(sorted(PLACES)), view=st.integers(0, 1000), augmented=st.booleans())
def test_labels_are_those_at_the_image_point_of_each_pixel(name: str, view: int, augmented: bool) -> None:
    labels = np.random.default_rng(0).integers(0, 150, (90, 120)).astype(np.uint8)
    looks = (RandAugment(probability=1.0, operations=3),) if augmented else ()
    viewed = cut_one(PLACES[name], RawSample(ramp(90, 120), {"semantic": labels}), view=view, looks=looks)
    found = viewed.targets["semantic/map"]
    height, width = viewed.view.valid
    assert found.shape == viewed.view.canvas
    assert (found[height:] == IGNORE).all()
    assert (found[:, width:] == IGNORE).all()
    points = transform_points(viewed.view.to_image, centres((height, width)))
    # Points on the very border between two pixels may go to either.
    clear = (np.abs(points - np.rint(points)) > 1e-4).all(-1)
    column, row = np.floor(points).astype(int).transpose(2, 0, 1)
    known = clear & (found[:height, :width] != IGNORE)
    np.testing.assert_array_equal(found[:height, :width][known], labels[row[known], column[known]])
    if not any(step.name == "warp" for step in viewed.drawn.steps):
        assert (found[:height, :width] != IGNORE).all()


def test_labels_under_a_warp_cover_what_the_picture_covers() -> None:
    labels = np.zeros((160, 160), dtype=np.uint8)
    labels[40:120, 30:110] = 1
    image = np.repeat(labels[:, :, None] * 255, 3, axis=2)
    drawn = draw_view(Cut(Fit(size=(160, 160))), seed=0, sample_id="s", view=0, image_size=(160, 160))
    warp = Step("warp", (0.9, -0.3, 40.0, 0.25, 0.95, -10.0))
    viewed = apply_view(
        Drawn(drawn.frame, (warp,)), raw=RawSample(image, {"semantic": labels}), canvas=(160, 160), role="training"
    )
    found = viewed.targets["semantic/map"]
    assert 0.02 < (found == IGNORE).mean() < 0.5
    bright = viewed.image[0].numpy() > 190
    assert (bright[found != IGNORE] == (found[found != IGNORE] == 1)).mean() > 0.99


def test_flipped_labels_mirror_the_unflipped_ones() -> None:
    labels = np.random.default_rng(1).integers(0, 9, (60, 80)).astype(np.uint8)
    raw = RawSample(ramp(60, 80), {"semantic": labels})
    straight, flipped = (
        cut_one(ScaleCrop(size=(30, 40), long=40, short=30, scale=(1.0, 1.0), flip=flip), raw, view=0)
        for flip in (0.0, 1.0)
    )
    np.testing.assert_array_equal(flipped.targets["semantic/map"], straight.targets["semantic/map"][:, ::-1])
    assert torch.equal(flipped.image, straight.image.flip(2))


@pytest.mark.parametrize("size", [(360, 480), (481, 333), (256, 300)])
def test_centre_crops_equal_torchvisions(size: tuple[int, int]) -> None:
    image = np.random.default_rng(2).integers(0, 256, (*size, 3)).astype(np.uint8)
    viewed = cut_one(CentreCrop(size=(224, 224), short=256), RawSample(image), view=0, role="evaluation")
    transform = v2.Compose([v2.Resize(256, InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(224)])
    assert torch.equal(viewed.image, transform(torch.from_numpy(image).permute(2, 0, 1)))


@pytest.mark.parametrize(
    ("image", "expected"),
    # mmcv's rescale to (2048, 512): the long side within 2048, the short one within 512.
    [
        ((512, 683), (512, 683)),
        ((360, 480), (512, 683)),
        ((100, 1000), (205, 2048)),
        ((1536, 2048), (512, 683)),
        ((1, 9), (228, 2048)),
    ],
)
def test_keep_ratio_sizes_and_buckets(image: tuple[int, int], expected: tuple[int, int]) -> None:
    place = KeepRatio(long=2048, short=512)
    drawn = draw_view(Cut(place), seed=0, sample_id="s", view=0, image_size=image)
    assert drawn.frame.valid == expected
    for multiple in (32, 14):
        bucket = canvas(Cut(place), image, multiple=multiple)
        assert all(b % multiple == 0 and 0 <= b - e < multiple for b, e in zip(bucket, expected, strict=True))


def test_a_view_larger_than_planned_is_bad_data() -> None:
    drawn = draw_view(Cut(KeepRatio(long=64, short=32)), seed=0, sample_id="s", view=0, image_size=(50, 100))
    with pytest.raises(DataError, match="64x32, planned were at most 32x32"):
        apply_view(drawn, raw=RawSample(ramp(50, 100)), canvas=(32, 32), role="evaluation")
