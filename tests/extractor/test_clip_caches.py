"""Caches of clips: what is stored is what the backbone says of the frames that were chosen."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from videobuilder import cut_in_front, number_of, reference_frames, write_video

from fcache.cache_spec import SpecError, StreamConfig, open_cache, open_source
from fcache.extractor import (
    TTA,
    ExtractionStarted,
    ExtractResult,
    Job,
    SampleQuarantined,
    SeenPhotos,
    Unreadable,
    endings_of,
    extract,
    find_photos,
    open_live,
    open_photos,
    open_views,
    plan,
)
from fcache.extractor.forward import features_of
from fcache.extractor.prepare import load_job_backbone, prepare
from fcache.extractor.videos import read_frames
from fcache.extractor.views import CentreCrop, Cut, cut_views, plan_views

MakeJob = Callable[..., Job]
REAL = {
    "mobilenetv2_100": "mobilenetv2_100.tv_int8_dequant.safetensors",
    "vit_tiny_patch16_224": "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors",
}
CENTRE = CentreCrop((64, 64), short=64)
UNREADABLE = "decord_corrupted.mp4"


def run(job: Job) -> tuple[ExtractResult, list[Any]]:
    events: list[Any] = []
    return extract(job, report=events.append), events


def stream(job: Job, split: str, *, batch_size: int = 2, kinds: tuple[str, ...] = ("clip",)) -> Any:
    config = StreamConfig(batch_size=batch_size, order="sequential", kinds=kinds)
    return open_source(open_cache(job.cache), split, config)


@pytest.mark.parametrize("model", ["test_resnet", "test_vit"])
def test_an_fp32_cache_of_clips_equals_the_live_source_bit_for_bit(make_clip_job: MakeJob, model: str) -> None:
    job = make_clip_job(model=model, encoding="fp32", levels=("last", "pooled"), limit=4, shard_records=4)
    run(job)
    for split in job.splits:
        cached, live = stream(job, split), open_live(job, split, batch_size=2, order="sequential")
        assert cached.info.levels == live.info.levels
        for epoch in range(2):
            for a, b in zip(cached.blocks(epoch), live.blocks(epoch), strict=True):
                assert (a.ids, a.views, a.view_indices) == (b.ids, b.views, b.view_indices)
                assert all(len(view.frames) == 8 for view in a.views)
                np.testing.assert_array_equal(a.targets["clip/label"], b.targets["clip/label"])
                for name, level in b.levels.items():
                    assert torch.equal(torch.from_numpy(a.levels[name].decode(np)), level.decode(torch)), (split, name)


def test_levels_have_a_time_axis_and_follow_from_what_is_asked_for(make_clip_job: MakeJob) -> None:
    job = make_clip_job()
    (last,) = prepare(job).wanted.groups[0].levels
    assert (last.name, last.dims, last.shape, last.stride) == ("level-32", "T C H W", (8, 96, 2, 2), 32)
    both = prepare(replace(job, levels=("pooled", "16"))).wanted.groups[0].levels
    assert [(x.name, x.dims, x.shape, x.stride) for x in both] == [
        ("level-16", "T C H W", (8, 192, 4, 4), 16),
        ("pooled", "T C", (8, 96), 32),
    ]
    # Frames are part of a cache's identity and of what heads are built from; the input size is not.
    assert prepare(job).wanted.features.backbone.levels[0].shape == (8, 96, 0, 0)
    prices = plan(job, measure=False)
    assert prices.level_bytes == {"level-32": 8 * 96 * (2 * 2 + 4)}
    assert prices.level_choices["pooled"] == 8 * (96 + 4)
    assert list(prices.level_choices) == ["level-2", "level-4", "level-8", "level-16", "level-32", "pooled"]


def test_pooled_is_the_mean_of_the_last_map_of_each_frame(make_clip_job: MakeJob) -> None:
    job = make_clip_job(levels=("32", "pooled"), splits=("val",))
    for block in open_live(job, "val", batch_size=3, order="sequential").blocks(0):
        levels = {name: level.decode(torch) for name, level in block.levels.items()}
        torch.testing.assert_close(levels["pooled"], levels["level-32"].mean((3, 4)), rtol=1e-6, atol=1e-6)
        assert levels["pooled"].shape == (3, 8, 96)


def test_frames_go_through_the_backbone_in_order_and_alone(make_clip_job: MakeJob) -> None:
    job = make_clip_job(splits=("val",), limit=1)
    prepared = prepare(job)
    (block,) = open_live(job, "val", batch_size=1, order="sequential").blocks(0)
    found = block.levels["level-32"].decode(torch)[0]
    # The middle 15 of 30 frames, every second.
    assert block.views[0].frames == tuple(range(7, 22, 2))
    video = job.root / prepared.splits["val"].samples[0].path
    shown = read_frames(video, lambda count: block.views[0].frames)
    assert [number_of(frame) for frame in shown.pixels] == list(block.views[0].frames)
    # Each frame as an image of its own, cut as the clip is.
    alone = load_job_backbone(replace(job, levels=("32",)), replace(prepared.recipe, training=Cut(CENTRE)))
    (plan,) = plan_views(prepared.recipe.evaluation, TTA(), shown.pixels.shape[1:3], multiple=32)
    for i, frame in enumerate(shown.pixels):
        expected = features_of(list(cut_views(frame, (plan,))), (64, 64), alone)["level-32"][0]
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[0], found[1], atol=1e-2)


@pytest.mark.parametrize("encoding", ["int8", "rot:0.5"])
def test_clips_are_stored_in_every_kind_of_encoding_and_grow_by_views(make_clip_job: MakeJob, encoding: str) -> None:
    job = make_clip_job(encoding=encoding, splits=("train",), views=1, shard_records=6)
    run(job)
    assert run(replace(job, views=2))[0].records == 6
    cached, live = (
        stream(job, "train", batch_size=6),
        open_live(replace(job, views=2), "train", batch_size=6, order="sequential"),
    )
    for epoch in range(2):
        ((a,), (b,)) = (list(source.blocks(epoch)) for source in (cached, live))
        assert a.views == b.views
        x, y = torch.from_numpy(a.levels["level-32"].decode(np)), b.levels["level-32"].decode(torch)
        assert float((x - y).norm() / y.norm()) < 0.1
    assert {view.frames for view in a.views} & {v.frames for v in next(iter(cached.blocks(0))).views} != set(a.views)


def test_bad_videos_are_quarantined_and_missing_ones_are_said(make_clip_job: MakeJob, tmp_path: Path) -> None:
    root = tmp_path / "data"
    good = write_video(root / "val/run/good.mp4", count=20)
    (root / "val/run/cut.mp4").write_bytes(good.read_bytes()[:-300])
    (root / "val/run/text.avi").write_text("no video")
    cut_in_front(good, root / "val/run/edited.mp4", 0.3)
    (root / "val.csv").write_text(
        "".join(f"val/run/{n} 0\n" for n in ("good.mp4", "cut.mp4", "text.avi", "edited.mp4", "no.mp4"))
    )
    (root / "classes.txt").write_text("run\n")
    result, events = run(make_clip_job(root=root, splits=("val",)))
    assert sorted(result.quarantined) == ["run/cut.mp4", "run/text.avi"]
    assert "cut short: the box 'm" in result.quarantined["run/cut.mp4"]
    assert "expected an MP4, MOV, Matroska, WebM or AVI file" in result.quarantined["run/text.avi"]
    assert [e.notes for e in events if isinstance(e, ExtractionStarted)] == [
        ("val: 1 of 5 listed videos are missing: val/run/no.mp4 (1 in all)",)
    ]
    assert sorted(e.sample for e in events if isinstance(e, SampleQuarantined)) == ["run/cut.mp4", "run/text.avi"]
    assert plan(make_clip_job(root=root, splits=("val",)), measure=False).notes == (
        "val: 1 of 5 listed videos are missing: val/run/no.mp4 (1 in all)",
    )


def test_videos_need_a_recipe_of_clips_and_images_one_of_images(make_clip_job: MakeJob, make_job: MakeJob) -> None:
    with pytest.raises(SpecError, match="'imagenet' is one of images, .* holds videos; use --view-recipe kinetics400"):
        prepare(make_clip_job(view_recipe="imagenet"))
    with pytest.raises(SpecError, match="'kinetics400' is one of clips of videos, .* images; use --view-recipe ade20k"):
        prepare(make_job(view_recipe="kinetics400"))


def test_test_views_are_the_clips_and_crops_of_each_video(make_clip_job: MakeJob) -> None:
    job = make_clip_job(splits=("val",))
    source = open_views(job, "val", tta=TTA(clips=4, crops=3), batch_size=2)
    assert source.info.levels[0].shape == (8, 96, 0, 0)
    plain = {
        block.ids[0]: block.levels["level-32"].decode(torch)[0]
        for block in open_live(job, "val", batch_size=1, order="sequential").blocks(0)
    }
    seen = 0
    for group in source.groups():
        blocks = list(group.blocks())
        assert len(blocks) == group.num_views == 12
        assert group.targets["clip/label"].shape == (len(group),)
        for i in range(len(group)):
            views = [block.views[i] for block in blocks]
            # Clips of 15 frames from 0, 5, 10 and 15 on.
            assert [v.frames[0] for v in views] == [0] * 3 + [5] * 3 + [10] * 3 + [15] * 3
            assert len({v.to_view for v in views}) == 3
        seen += len(group)
    assert seen == 3
    # A single view of the middle is the evaluation record.
    for group in open_views(job, "val", tta=TTA(), batch_size=1).groups():
        (block,) = group.blocks()
        assert torch.equal(block.levels["level-32"].decode(torch)[0], plain[block.ids[0]])


def test_videos_from_anywhere_are_read_as_test_views(make_clip_job: MakeJob, clips: Path, tmp_path: Path) -> None:
    job = make_clip_job()
    (tmp_path / "broken.mp4").write_bytes(b"x")
    found = find_photos([clips / "val", tmp_path / "broken.mp4"], endings=endings_of(job))
    assert [f.path.name for f in found] == ["g.mp4", "h.mkv", "i.mp4", "broken.mp4"]
    items = list(open_photos(job).read([f.path for f in found], tta=TTA(clips=2, crops=3), batch_size=2))
    photos = [p for item in items if isinstance(item, SeenPhotos) for p in item.photos]
    assert sorted(p.path.name for p in photos) == ["g.mp4", "h.mkv", "i.mp4"]
    for photo in photos:
        assert photo.image.shape == (16, 48, 64, 3)
        assert (
            [number_of(frame) for frame in photo.image] == list(photo.frames) == [*range(0, 15, 2), *range(15, 30, 2)]
        )
    (bad,) = [item for item in items if isinstance(item, Unreadable)]
    assert "expected an MP4, MOV, Matroska, WebM or AVI file" in bad.reason


@pytest.mark.parametrize("model", REAL)
def test_every_readable_real_clip_is_extracted_and_the_broken_one_says_why(
    make_clip_job: MakeJob, test_data: Path, model: str
) -> None:
    weights = str(test_data / "weights" / REAL[model])
    job = make_clip_job(
        model=model, weights=weights, root=test_data / "videos_unlabelled", splits=("val",), precision="bf16"
    )
    result, _ = run(job)
    assert list(result.quarantined) == [UNREADABLE]
    assert "damaged, not all of its frames can be decoded (Error sending packet)" in result.quarantined[UNREADABLE]
    source = stream(job, "val", batch_size=1, kinds=())
    views = {block.ids[0]: block.views[0] for block in source.blocks(0)}
    assert len(views) == 9
    # As they are stored all four are 568 wide and 320 high.
    turned = {name: views[f"decord_video_{name}.mov"].image_size for name in (0, 90, 180, 270)}
    assert turned == {0: (320, 568), 90: (568, 320), 180: (320, 568), 270: (568, 320)}


def test_real_clips_are_those_of_a_sequential_decode_and_upright(test_data: Path) -> None:
    for name in ("video_0.mov", "video_90.mov", "video_180.mov", "video_270.mov", "unordered.mov"):
        path = test_data / "videos_unlabelled" / f"decord_{name}"
        assert np.array_equal(read_frames(path, range).pixels, reference_frames(path)), name


def test_labelled_real_clips_keep_their_classes_through_processes(make_clip_job: MakeJob, test_data: Path) -> None:
    weights = str(test_data / "weights" / REAL["mobilenetv2_100"])
    job = make_clip_job(
        model="mobilenetv2_100",
        weights=weights,
        root=test_data / "kinetics400",
        limit=3,
        views=1,
        precision="bf16",
        workers=1,
    )
    result, _ = run(job)
    assert (result.records, dict(result.quarantined)) == (6, {})
    source = stream(job, "val", batch_size=1)
    names = source.info.target("clip").class_names
    for block in source.blocks(0):
        assert names[int(block.targets["clip/label"][0])] == block.ids[0].split("/")[0]
