"""Folders of images: classes by name, ids by path, and one numbering for both splits."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcache.cache_spec import DataError
from fcache.extractor.datasets import dataset_names, open_split


def write(path: Path, size: tuple[int, int] = (3, 4), **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((*size, 3), dtype=np.uint8)).save(path, format="PNG", **options)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("train/dog/b.JPG", "train/dog/a.png", "train/cat/deep/x.jpeg", "train/bird/y.webp", "val/dog/z.png"):
        write(tmp_path / name)
    return tmp_path


def test_every_dataset_is_found_by_its_file_name() -> None:
    assert dataset_names() == ("ade20k", "coco", "imagefolder", "kinetics400")


def test_classes_are_alphabetical_and_ids_are_paths(root: Path) -> None:
    split = open_split("imagefolder", root, "train")
    assert split.targets[0].class_names == ("bird", "cat", "dog")
    assert [s.id for s in split.samples] == ["bird/y.webp", "cat/deep/x.jpeg", "dog/a.png", "dog/b.JPG"]
    assert [split.load(split.root, s).targets["class"] for s in split.samples] == [0, 1, 2, 2]
    assert split.samples[0].path == "train/bird/y.webp"
    assert pickle.loads(pickle.dumps(split)).samples == split.samples


def test_both_splits_number_the_classes_alike(root: Path) -> None:
    split = open_split("imagefolder", root, "val")
    assert split.targets == open_split("imagefolder", root, "train").targets
    assert split.load(split.root, split.samples[0]).targets["class"] == 2


def test_hidden_and_other_files_are_passed_over(root: Path) -> None:
    write(root / "train/dog/.hidden.png")
    write(root / "train/.cache/a.png")
    write(root / "train/dog/.thumbs/a.png")
    (root / "train/dog/notes.txt").write_text("x")
    assert len(open_split("imagefolder", root, "train").samples) == 4


def test_linked_class_folders_are_followed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write(elsewhere / "q.png")
    os.symlink(elsewhere, root / "train/ant")
    split = open_split("imagefolder", root, "train")
    assert split.samples[0].id == "ant/q.png"
    assert split.load(split.root, split.samples[0]).image.shape == (3, 4, 3)


def test_the_orientation_is_applied(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    write(root / "val/dog/z.png", exif=exif)
    split = open_split("imagefolder", root, "val")
    assert split.image_size(split.root, split.samples[0]) == (4, 3)
    assert split.load(split.root, split.samples[0]).image.shape == (4, 3, 3)


def test_a_class_that_training_lacks_is_an_error(root: Path) -> None:
    write(root / "val/cow/a.png")
    with pytest.raises(DataError, match=r"cow \(1 in all\)"):
        open_split("imagefolder", root, "val")


def test_empty_classes_and_folders_are_errors(root: Path, tmp_path: Path) -> None:
    (root / "train/cow").mkdir()
    with pytest.raises(DataError, match=r"without an image: cow"):
        open_split("imagefolder", root, "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="one folder a class"):
        open_split("imagefolder", tmp_path / "empty", "val")
    (tmp_path / "empty/train").mkdir()
    with pytest.raises(DataError, match=r"empty/val: expected a folder"):
        open_split("imagefolder", tmp_path / "empty", "val")


def test_a_bare_folder_opens_for_evaluation_only(root: Path) -> None:
    split = open_split("imagefolder", root / "train", "val")
    assert split.role == "evaluation"
    assert split.samples[0].path == "bird/y.webp"
    with pytest.raises(DataError, match="split 'val' only"):
        open_split("imagefolder", root / "train", "train")


def test_real_folders_open(test_data: Path) -> None:
    train, val = (open_split("imagefolder", test_data / "imagefolder", s) for s in ("train", "val"))
    assert (len(train.samples), len(val.samples)) == (10, 6)
    assert train.targets[0].class_names == ("ants", "bees")
    photos = open_split("imagefolder", test_data / "imagenet_wnid", "val")
    assert len(photos.samples) == len(photos.targets[0].class_names) == 17
    sizes = [photos.image_size(photos.root, s) for s in photos.samples]
    assert sizes == [photos.load(photos.root, s).image.shape[:2] for s in photos.samples]
