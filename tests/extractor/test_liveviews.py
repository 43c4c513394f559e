"""Test-time views of an evaluation split: what the backbone is shown, how often, and what heads make of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from fcache.cache_spec import DataError, LevelSpec, SpecError
from fcache.extractor import TTA, Job, LiveViews, open_live, open_views
from fcache.extractor.images import load_image
from fcache.extractor.liveviews import images_together
from fcache.extractor.prepare import prepare
from fcache.extractor.views import SCALES, Cut, KeepRatio, plan_views
from fcache.heads import TrainConfig, choose_head, evaluate_heads, evaluate_views, see, view_batches
from fcache.heads.evaluate import TrainedHead
from fcache.heads.parts.classmaps import share_strips

MakeJob = Callable[..., Job]


def views_of(job: Job, tta: TTA, batch_size: int | None = 1) -> LiveViews:
    return open_views(replace(job, splits=("val",)), "val", tta=tta, batch_size=batch_size)


def watched(source: LiveViews) -> tuple[LiveViews, list[tuple[int, ...]]]:
    """The same source, and a list that gets the shape of all that its backbone is run on."""
    shapes: list[tuple[int, ...]] = []
    backbone = source.prepared.backbone

    def forward(images: Tensor) -> dict[str, Tensor]:
        shapes.append(tuple(images.shape))
        return backbone.forward(images)

    prepared = replace(source.prepared, backbone=replace(backbone, forward=forward))
    return LiveViews(prepared, source.split, source.tta, source.batch_size), shapes


def built(text: str, info: object, seed: int = 0) -> TrainedHead:
    choice = choose_head(text, info, TrainConfig(iterations=1))
    torch.manual_seed(seed)
    inputs = choice.inputs(info)
    return TrainedHead(text, choice.head, choice.options, inputs, choice.head.build(inputs, choice.options).eval())


def probabilities(head: TrainedHead, source: LiveViews) -> dict[str, Tensor]:
    found = {}
    for group in source.groups():
        for seen in see(head, view_batches([head], group)):
            found[seen.id] = torch.cat([x for _, x in share_strips(seen.outputs, seen.views)], dim=1)
    return found


def test_the_plain_view_is_the_live_source_s(make_job: MakeJob) -> None:
    job = make_job()
    live = open_live(job, "val", batch_size=1, order="sequential")
    blocks = {block.ids: block for block in live.blocks(0)}
    source = views_of(job, TTA())
    assert source.num_groups == len(blocks) == 4
    assert source.info.features == live.info.features
    assert source.info.extent["views"] == "plain"
    for group in source.groups():
        (block,) = group.blocks()
        other = blocks[group.ids]
        assert (block.views, block.view_indices) == (other.views, other.view_indices)
        for name, level in other.levels.items():
            assert torch.equal(block.levels[name].decode(torch), level.decode(torch))
        assert group.targets.keys() == other.targets.keys()
        for path, values in other.targets.items():
            for x, y in zip(group.targets[path], values, strict=True):
                np.testing.assert_array_equal(x, y)
    head = built("linear", source.info)
    assert evaluate_views([head], source)[0].scores.values == evaluate_heads([head], live)[0].scores.values


@pytest.mark.parametrize("model", ["test_resnet", "swinv2-t"])
def test_ms_flip_equals_averaging_by_hand(make_job: MakeJob, scenes: Path, model: str) -> None:
    job = make_job(model=model, limit=1)
    source = views_of(job, TTA(SCALES, flip=True))
    head = built("linear", source.info)
    ((name, found),) = probabilities(head, source).items()
    backbone = source.prepared.backbone
    pixels = load_image(scenes / "images" / "validation" / f"{name}.jpg", apply_orientation=False)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (backbone.spec.mean, backbone.spec.std))
    total = torch.zeros_like(found)
    # Scenes are 64x80, the evaluation view fits (256, 64): its factor is 1, so views have these sizes.
    for height, width in ((32, 40), (48, 60), (64, 80), (80, 100), (96, 120), (112, 140)):
        for flip in (False, True):
            x = tv.resize(image, [height, width], antialias=True)
            x = ((x.flip(2) if flip else x) / 255 - mean) / std
            canvas = (-(-height // 32) * 32, -(-width // 32) * 32)
            x = F.pad(x, (0, canvas[1] - width, 0, canvas[0] - height))[None]
            with torch.inference_mode():
                logits = head.module(backbone.forward(x))[0]
            logits = F.interpolate(logits, size=canvas, mode="bilinear")[:, :, :height, :width]
            logits = F.interpolate(logits.flip(3) if flip else logits, size=(64, 80), mode="bilinear")
            total += logits[0].softmax(0)
    torch.testing.assert_close(found, total / 12, rtol=1e-4, atol=1e-5)
    assert (found - total.roll(1, 2) / 12).abs().max() > 1e-3


def test_the_backbone_runs_once_a_view_however_many_heads(make_job: MakeJob) -> None:
    source, shapes = watched(views_of(make_job(limit=3), TTA((0.5, 1.0), flip=True)))
    heads = [built("linear", source.info, seed) for seed in range(3)]
    together = evaluate_views(heads, source)
    assert len(shapes) == 3 * 4
    assert all(n == 1 for n, *_ in shapes)
    del shapes[:]
    for head, found in zip(heads, together, strict=True):
        alone = evaluate_views([head], source)[0]
        for name, states in alone.states.items():
            np.testing.assert_array_equal(states, found.states[name])
    assert len(shapes) == 3 * 3 * 4


def test_images_of_equal_canvases_go_together(make_job: MakeJob) -> None:
    tta = TTA((0.5, 1.0), flip=True)
    source, shapes = watched(views_of(make_job(), tta, batch_size=None))
    head = built("linear", source.info)
    together = evaluate_views([head], source)[0]
    # Four scenes of one size in four views.
    assert [n for n, *_ in shapes] == [4] * 4
    alone = evaluate_views([head], views_of(make_job(), tta))[0]
    assert together.ids == alone.ids
    for name, states in alone.states.items():
        assert np.abs(together.states[name] - states).sum() <= 8
    assert source.num_groups == 1
    assert views_of(make_job(), tta, batch_size=3).num_groups == 2


def test_large_views_go_alone_and_small_ones_by_the_megapixel() -> None:
    large = plan_views(Cut(KeepRatio(long=2048, short=512)), TTA(SCALES), (512, 683), multiple=32)
    assert images_together(large) == 1
    small = plan_views(Cut(KeepRatio(long=300, short=300)), TTA(), (300, 300), multiple=1)
    assert images_together(small) == 11
    assert images_together(plan_views(Cut(KeepRatio(long=32, short=32)), TTA(), (9, 9), multiple=1)) == 16


def pointwise(source: LiveViews) -> LiveViews:
    """The source with a backbone whose features are the pixels themselves."""

    def levels_at(canvas: tuple[int, int]) -> tuple[LevelSpec, ...]:
        return (LevelSpec("pixels", "C H W", (3, *canvas), 1),)

    backbone = replace(
        source.prepared.backbone,
        size_multiple=8,
        levels_at=levels_at,
        forward=lambda images: {"pixels": images.clone()},
    )
    return LiveViews(replace(source.prepared, backbone=backbone), source.split, source.tta, source.batch_size)


@pytest.mark.parametrize("text", ["window", "ms"])
def test_windows_of_a_pointwise_backbone_and_head_are_the_whole_image(make_job: MakeJob, text: str) -> None:
    scales = (1.0,) if text == "window" else (0.5, 1.0, 1.5)
    job = make_job(limit=2)
    whole = pointwise(views_of(job, TTA(scales, flip=True)))
    sliding = pointwise(views_of(job, TTA(scales, flip=True, window=(40, 50), stride=(17, 33))))
    info = replace(whole.info, levels=whole.prepared.backbone.levels_at((0, 0)))
    head = built("linear", info)
    expected = probabilities(head, whole)
    for name, found in probabilities(head, sliding).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-6)
        assert found.std() > 0
    views = next(iter(sliding.groups())).num_views
    assert views > next(iter(whole.groups())).num_views > 1


def test_windows_are_seen_anew_by_the_backbone(make_job: MakeJob) -> None:
    job = make_job(limit=1)
    head = built("linear", views_of(job, TTA()).info)
    whole = probabilities(head, views_of(job, TTA()))
    source, shapes = watched(views_of(job, TTA(window=(32, 32), stride=(32, 16))))
    sliding = probabilities(head, source)
    # 64x80: two rows, and columns from 0, 16, 32, 48.
    assert shapes == [(1, 3, 32, 32)] * 8
    for name, found in sliding.items():
        assert (found - whole[name]).abs().max() > 1e-3


def test_a_training_split_has_no_test_time_views(make_job: MakeJob) -> None:
    with pytest.raises(SpecError, match="training split"):
        LiveViews(prepare(make_job(splits=("train",))), "train", TTA(flip=True), None)


def copied(scenes: Path, root: Path) -> tuple[Path, Path]:
    """A copy of the scenes, and its first validation photo."""
    for path in scenes.rglob("*.*"):
        target = root / path.relative_to(scenes)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return root, min((root / "images" / "validation").iterdir())


def test_a_photo_that_cannot_be_decoded_is_named(make_job: MakeJob, scenes: Path, tmp_path: Path) -> None:
    root, photo = copied(scenes, tmp_path / "data")
    photo.write_bytes(photo.read_bytes()[:-400])
    with pytest.raises(DataError, match=f"sample '{photo.stem}'"):
        list(views_of(make_job(root=root), TTA(flip=True)).groups())


def test_a_photo_that_changes_after_planning_is_refused(make_job: MakeJob, scenes: Path, tmp_path: Path) -> None:
    root, photo = copied(scenes, tmp_path / "data")
    source = views_of(make_job(root=root), TTA(flip=True))
    Image.new("RGB", (100, 64)).save(photo)
    mask = root / "annotations" / "validation" / f"{photo.stem}.png"
    Image.new("L", (100, 64)).save(mask)
    with pytest.raises(DataError, match="100x64 pixels, its header said 80x64"):
        list(source.groups())
