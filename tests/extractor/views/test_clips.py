"""Clips of videos: which frames they have, how all are cut alike, and the 4 x 3 test views."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fcache.cache_spec import SpecError, to_json
from fcache.extractor.datasets import RawSample
from fcache.extractor.views import (
    TTA,
    CentreCrop,
    Clip,
    ClipCut,
    ResizedCrop,
    cut_view,
    cut_views,
    draw_frames,
    find_view_recipe,
    parse_tta,
    plan_views,
    spread_clips,
)

RECIPE = find_view_recipe("kinetics400")
SIZE = (48, 80)


def frames_of(view: int, count: int, *, role: str = "training", sample: str = "a") -> tuple[int, ...]:
    return draw_frames(RECIPE.cut(role), seed=0, sample_id=sample, view=view, count=count)


def clip(count: int = 16, size: tuple[int, int] = SIZE) -> RawSample:
    pixels = np.random.default_rng(0).integers(0, 256, (count, *size, 3)).astype(np.uint8)
    return RawSample(pixels, {"clip": 3}, tuple(range(5, 5 + count)))


def test_the_recipe_is_16_frames_over_61_of_the_video() -> None:
    assert to_json(RECIPE.training)["clip"] == {"frames": 16, "interval": 4, "start": "random"}
    assert to_json(RECIPE.evaluation)["clip"] == {"frames": 16, "interval": 4, "start": "middle"}
    place = RECIPE.training.place
    assert isinstance(place, ResizedCrop)
    assert (place.size, place.scale, place.flip) == ((224, 224), (0.25, 1.0), 0.5)
    assert RECIPE.evaluation.place == CentreCrop((224, 224), short=224, interpolation="bilinear")
    assert find_view_recipe("kinetics400-small").training.place.flip == 0.0  # type: ignore[union-attr]


def test_clips_lie_everywhere_in_the_video_and_depend_on_sample_and_view_alone() -> None:
    starts = [frames_of(view, 300)[0] for view in range(400)]
    assert min(starts) >= 0
    assert max(starts) <= 239
    assert all(any(low <= s < low + 24 for s in starts) for low in range(0, 240, 24))
    assert frames_of(7, 300) == frames_of(7, 300) == tuple(starts[7] + 4 * i for i in range(16))
    assert len({frames_of(v, 300) for v in range(20)} | {frames_of(v, 300, sample="b") for v in range(20)}) > 35


def test_a_test_clip_lies_in_the_middle() -> None:
    assert frames_of(0, 100, role="evaluation") == tuple(range(19, 80, 4))
    assert frames_of(0, 61, role="evaluation") == tuple(range(0, 61, 4))


@given(count=st.integers(1, 200), frames=st.integers(1, 20), interval=st.integers(1, 8), clips=st.integers(1, 6))
def test_frames_exist_and_clips_spread_from_the_first_frame_to_the_last(
    count: int, frames: int, interval: int, clips: int
) -> None:
    clip = Clip(frames, interval, "middle")
    spread = spread_clips(clip, count, clips)
    assert [len(c) for c in spread] == [frames] * clips
    assert all(0 <= n < count for c in spread for n in c)
    if count < clip.span:
        # Too short: it begins again behind its end.
        assert set(spread) == {tuple(i * interval % count for i in range(frames))}
        return
    starts = [c[0] for c in spread]
    assert [c[-1] for c in spread] == [s + clip.span - 1 for s in starts]
    if clips == 1:
        assert starts == [(count - clip.span) // 2]
    else:
        assert (starts[0], spread[-1][-1]) == (0, count - 1)
        steps = np.diff(starts)
        assert steps.max() - steps.min() <= 1


def test_all_frames_of_a_view_are_cut_alike_and_as_images_are() -> None:
    raw = clip()
    for view in range(4):
        cut = cut_view(RECIPE.training, seed=0, sample_id="a", view=view, raw=raw, canvas=(224, 224), role="training")
        assert cut.image.shape == (16, 3, 224, 224)
        assert cut.view.frames == raw.frames
        assert cut.view.image_size == SIZE
        assert cut.targets["clip/label"] == 3
        for i in (0, 9):
            still = RawSample(raw.image[i], raw.targets)
            alone = cut_view(
                RECIPE.training, seed=0, sample_id="a", view=view, raw=still, canvas=(224, 224), role="training"
            )
            assert torch.equal(alone.image, cut.image[i])
            assert (alone.view.to_view, alone.view.valid) == (cut.view.to_view, cut.view.valid)


def test_the_12_test_views_are_4_clips_by_3_crops() -> None:
    plans = plan_views(RECIPE.evaluation, TTA(clips=4, crops=3), SIZE, multiple=32)
    assert [p.clip for p in plans] == [k for k in range(4) for _ in range(3)]
    # 48x80 at a shorter side of 224 is 224x373: crops begin at columns 0, 74 or 75, and 149.
    assert [p.frame.window for p in plans[:3]] == [(0, 0, 224, 224), (0, 74, 224, 224), (0, 149, 224, 224)]
    assert [p.frame.window for p in plan_views(RECIPE.evaluation, TTA(crops=3), SIZE[::-1], multiple=32)] == [
        (0, 0, 224, 224),
        (74, 0, 224, 224),
        (149, 0, 224, 224),
    ]
    pixels = np.stack([clip().image, clip().image[::-1], clip().image // 2, clip().image // 3])
    cut = list(cut_views(pixels, plans))
    assert [x.shape for x in cut] == [(16, 3, 224, 224)] * 12
    assert torch.equal(cut[4], cut[1].flip(0))
    assert not torch.equal(cut[0], cut[1])
    # The middle crop is the evaluation record's.
    raw = RawSample(pixels[0], {}, tuple(range(16)))
    plain = cut_view(RECIPE.evaluation, seed=0, sample_id="a", view=0, raw=raw, canvas=(224, 224), role="evaluation")
    assert torch.equal(cut[1], plain.image)
    (only,) = plan_views(RECIPE.evaluation, TTA(), SIZE, multiple=32)
    assert (only.frame, only.canvas) == (plans[1].frame, plans[1].canvas)


def test_their_name_is_read_back() -> None:
    for text in ("4x3", "10x1", "1x3", "4x3-flip"):
        assert parse_tta(text, crop=(224, 224)).name == text
    assert parse_tta("4x3", crop=(224, 224)) == TTA(clips=4, crops=3)
    assert parse_tta("1x1", crop=(224, 224)).name == "plain"
    with pytest.raises(SpecError, match="unknown test-time view '4x2'; did you mean 4x3"):
        parse_tta("4x2", crop=(224, 224))
    with pytest.raises(SpecError, match="clips and crops of a video; this view recipe is one of images"):
        plan_views(find_view_recipe("imagenet").evaluation, TTA(clips=4, crops=3), SIZE, multiple=32)
    with pytest.raises(SpecError, match="1 or more clips in 1 or 3 crops, got 0x3"):
        TTA(clips=0, crops=3)
    with pytest.raises(SpecError, match="a clip has frames and an interval from 1"):
        ClipCut(RECIPE.evaluation.place, Clip(16, 0, "middle"))
