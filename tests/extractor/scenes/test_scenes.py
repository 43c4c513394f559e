"""Synthetic scenes: real files, equal bytes for equal seeds, annotations that agree with each other."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcache.cache_spec import SpecError
from fcache.extractor.coco import decode_mask
from fcache.extractor.datasets import open_split
from fcache.extractor.scenes import CLASSES, make_scene, render, write_coco_scenes, write_scenes


def files(root: Path) -> dict[str, str]:
    found = sorted(p for p in root.rglob("*") if p.is_file())
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def test_scenes_open_as_ade20k(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", train=5, val=3, size=(64, 96), seed=1)
    train, val = (open_split("ade20k", tmp_path / "scenes", s) for s in ("train", "val"))
    assert (len(train.samples), len(val.samples)) == (5, 3)
    assert train.targets[0].class_names == CLASSES
    for i, sample in enumerate(val.samples):
        raw = val.load(val.root, sample)
        truth = render(make_scene(1, -1 - i, size=(64, 96)))
        np.testing.assert_array_equal(raw.targets["semantic"], truth.semantic)
        assert np.abs(raw.image.astype(int) - truth.image).mean() < 8, "JPEG changes the photo a little"


def test_equal_seeds_give_equal_files_and_more_photos_change_none(tmp_path: Path) -> None:
    for name, seed, train in (("a", 0, 3), ("b", 0, 3), ("c", 1, 3), ("d", 0, 4)):
        write_scenes(tmp_path / name, train=train, val=2, size=(48, 64), seed=seed)
    a, b, c, d = (files(tmp_path / name) for name in "abcd")
    assert a == b
    assert all(a[k] != c[k] for k in a)
    assert {k: v for k, v in d.items() if k in a and "objectInfo" not in k} == {
        k: v for k, v in a.items() if "objectInfo" not in k
    }


def test_nothing_is_overwritten_and_nothing_is_left_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("x")
    with pytest.raises(SpecError, match="empty folder"):
        write_scenes(tmp_path / "mine", train=1, val=1, size=(48, 48))
    with pytest.raises(SpecError, match="at least 1 photo"):
        write_scenes(tmp_path / "new", train=0, val=1, size=(48, 48))

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", full)
    with pytest.raises(OSError, match="No space"):
        write_scenes(tmp_path / "new", train=1, val=1, size=(48, 48))
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("time", [0.0, 1.5])
def test_annotations_of_a_moment_agree(time: float) -> None:
    for index in range(12):
        scene = make_scene(0, index, size=(72, 96))
        found = render(scene, time=time)
        assert found.image.shape == (72, 96, 3)
        assert set(np.unique(found.semantic)) <= {*range(len(CLASSES)), 255}
        things = [t.at(time) for t in scene.things]
        for i, thing in enumerate(things):
            mask = found.instances == i + 1
            assert found.visible[i] == mask.sum()
            if not mask.any():
                assert (found.boxes[i] == 0).all()
                continue
            rows, columns = np.nonzero(mask)
            assert found.boxes[i].tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            expected = 255 if thing.name == "clutter" else CLASSES.index(thing.name)
            assert (found.semantic[mask] == expected).all()
            np.testing.assert_allclose(found.depth[mask], thing.position[2], rtol=1e-6)
            for x, y, state in found.keypoints[i]:
                inside = 0 <= x < 96 and 0 <= y < 72
                assert (state > 0) == inside
                if inside:
                    assert (state == 2) == (found.instances[int(y), int(x)] == i + 1)
        assert (found.depth[found.semantic == 0] == 0).all()
        assert (found.depth[(found.semantic != 0) & (found.semantic != 255)] > 0).all()
        stuff = found.semantic[found.instances == 0]
        assert set(np.unique(stuff)) <= {0, 1, 2}


def test_nearer_things_hide_farther_ones() -> None:
    hidden = 0
    for index in range(20):
        scene = make_scene(2, index, size=(96, 96))
        alone = [render(_only(scene, i)).instances == 1 for i in range(len(scene.things))]
        together = render(scene).instances
        for i, mask in enumerate(alone):
            covering = together[mask & (together != i + 1)]
            hidden += len(covering)
            assert all(scene.things[j - 1].position[2] <= scene.things[i].position[2] for j in np.unique(covering))
    assert hidden > 1000


def test_scenes_open_as_coco_with_every_figure_that_is_seen(tmp_path: Path) -> None:
    write_coco_scenes(tmp_path / "a", train=6, val=3, size=(64, 96), seed=1)
    train, val = (open_split("coco", tmp_path / "a", s) for s in ("train", "val"))
    assert (len(train.samples), len(val.samples)) == (6, 3)
    assert train.targets == val.targets
    assert train.targets[0].class_names == CLASSES[3:]
    objects = 0
    for i, sample in enumerate(val.samples):
        raw = val.load(val.root, sample)
        found, truth = raw.targets["instances"], render(make_scene(1, -1 - i, size=(64, 96)))
        figures = np.flatnonzero((truth.labels >= 3) & (truth.visible >= 16))
        objects += len(figures)
        np.testing.assert_array_equal(found.boxes, truth.boxes[figures])
        np.testing.assert_array_equal(found.labels, truth.labels[figures] - 3)
        for j, k in enumerate(figures):
            np.testing.assert_array_equal(decode_mask(found.masks[j], found.size), truth.instances == k + 1)
            assert found.record["annotations"][j]["area"] == truth.visible[k]
        assert np.abs(raw.image.astype(int) - truth.image).mean() < 8, "JPEG changes the photo a little"
    assert objects > 8
    write_coco_scenes(tmp_path / "b", train=6, val=3, size=(64, 96), seed=1)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    # More photos, or another layout, never shift those that are there.
    write_coco_scenes(tmp_path / "c", train=8, val=1, size=(64, 96), seed=1)
    write_scenes(tmp_path / "d", train=1, val=1, size=(64, 96), seed=1)
    a, c, d = files(tmp_path / "a"), files(tmp_path / "c"), files(tmp_path / "d")
    assert all(c[name] == digest for name, digest in a.items() if name.startswith("train2017"))
    assert a["train2017/000000000001.jpg"] == d["images/training/scene_training_000000.jpg"]
    first, more = (json.loads((tmp_path / n / "annotations/instances_train2017.json").read_text()) for n in "ac")
    assert more["annotations"][: len(first["annotations"])] == first["annotations"]
    with pytest.raises(SpecError, match="expected a new or empty folder"):
        write_coco_scenes(tmp_path / "a", train=1, val=1, size=(64, 96))


def _only(scene, index: int):
    from dataclasses import replace

    return replace(scene, things=(scene.things[index],))


def test_a_scene_moves_and_rendering_is_pure() -> None:
    scene = make_scene(0, 4, size=(64, 64))
    a, b, later = render(scene), render(scene), render(scene, time=0.5)
    np.testing.assert_array_equal(a.image, b.image)
    assert (a.instances != later.instances).any()
    assert (render(make_scene(0, 5, size=(64, 64))).image != a.image).any()


def test_every_class_is_seen_and_colour_alone_does_not_tell_it() -> None:
    counts = np.zeros(len(CLASSES), dtype=int)
    means: dict[int, list[np.ndarray]] = {k: [] for k in range(len(CLASSES))}
    for index in range(60):
        found = render(make_scene(3, index, size=(64, 64)))
        for k in np.unique(found.semantic[found.semantic != 255]):
            counts[k] += 1
            means[k].append(found.image[found.semantic == k].mean(0))
    assert counts.min() >= 15
    # Mean colours of a class scatter more within it than between classes.
    between = np.std([np.mean(m, axis=0) for m in means.values()], axis=0)
    within = np.mean([np.std(m, axis=0) for m in means.values()], axis=0)
    assert (within > 1.5 * between).all()


@pytest.mark.parametrize("size", [(16, 16), (40, 200), (200, 40), (65, 33)])
def test_any_shape_of_picture_renders(size: tuple[int, int]) -> None:
    for index in range(5):
        assert render(make_scene(0, index, size=size), time=index).image.shape == (*size, 3)


def test_scenes_in_coco_layout_may_have_maps_of_all_classes(tmp_path: Path):
    write_coco_scenes(tmp_path / "a", train=2, val=1, size=(64, 96), stuff=True)
    write_coco_scenes(tmp_path / "b", train=2, val=1, size=(64, 96))
    maps = sorted(p.relative_to(tmp_path / "a").as_posix() for p in (tmp_path / "a").rglob("*.png"))
    assert maps == [
        "stuffthingmaps/train2017/000000000001.png",
        "stuffthingmaps/train2017/000000000002.png",
        "stuffthingmaps/val2017/000001000000.png",
    ]
    rendered = render(make_scene(0, 0, size=(64, 96)))
    with Image.open(tmp_path / "a" / maps[0]) as found:
        np.testing.assert_array_equal(np.array(found), rendered.semantic)
    for file in (p for p in (tmp_path / "b").rglob("*") if p.is_file()):
        assert file.read_bytes() == (tmp_path / "a" / file.relative_to(tmp_path / "b")).read_bytes()
