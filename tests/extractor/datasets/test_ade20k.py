"""ADE20K's challenge layout: class lists, pairs of files, and labels converted exactly once."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcache.cache_spec import DataError, SpecError
from fcache.extractor.datasets import find_dataset, open_split
from fcache.extractor.datasets.dataset import palette

LIST = "Idx\tRatio\tName\n1\t0.5\twall\n2\t0.3\tbuilding, edifice \n3\t0.2\tdoor;gate\n"


def write_pair(root: Path, name: str, mask: np.ndarray, *, folder: str = "training", size=None) -> None:
    height, width = size or mask.shape
    Image.fromarray(np.full((height, width, 3), 7, dtype=np.uint8)).save(root / "images" / folder / f"{name}.jpg")
    Image.fromarray(mask).save(root / "annotations" / folder / f"{name}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for kind in ("images", "annotations"):
        for folder in ("training", "validation"):
            (tmp_path / kind / folder).mkdir(parents=True)
    (tmp_path / "objectInfo3.txt").write_text(LIST)
    for folder in ("training", "validation"):
        for name in ("b", "a"):
            write_pair(tmp_path, name, np.array([[0, 1, 2, 3]], dtype=np.uint8), folder=folder)
    return tmp_path


def labels(root: Path, index: int = 0) -> list[int]:
    split = open_split("ade20k", root, "train")
    return split.load(split.root, split.samples[index]).targets["semantic"].ravel().tolist()


def test_zero_becomes_ignore_and_labels_begin_at_zero(root: Path) -> None:
    split = open_split("ade20k", root, "train")
    raw = split.load(split.root, split.samples[0])
    assert raw.targets["semantic"].dtype == np.uint8
    assert labels(root) == [255, 0, 1, 2]
    assert [s.id for s in split.samples] == ["a", "b"]
    assert split.role == "training"
    assert open_split("ade20k", root, "val").role == "evaluation"
    target = split.targets[0]
    assert target.class_names == ("wall", "building", "door")
    assert (target.kind, target.ignore, len(target.palette)) == ("semantic", 255, 3)
    assert split.image_size(split.root, split.samples[0]) == (1, 4)


def test_a_split_survives_pickling(root: Path) -> None:
    split = open_split("ade20k", root, "train")
    again = pickle.loads(pickle.dumps(split))
    assert again.samples == split.samples
    assert again.load(again.root, again.samples[0]).targets["semantic"].tolist() == [[255, 0, 1, 2]]


def test_digests_follow_names_and_sizes_only(root: Path) -> None:
    before = open_split("ade20k", root, "train").samples
    mask = root / "annotations/training/a.png"
    mask.write_bytes(mask.read_bytes() + b"x")
    after = open_split("ade20k", root, "train").samples
    assert before[0].digest != after[0].digest
    assert before[1] == after[1]
    assert len(before[0].digest) == 16


def test_a_value_outside_the_class_list_names_file_and_value(root: Path) -> None:
    write_pair(root, "a", np.array([[0, 1, 4, 200]], dtype=np.uint8))
    with pytest.raises(DataError, match=r"training/a\.png: the value 4 is not .* \(1 to 3\)"):
        labels(root)


def test_masks_of_indices_and_of_sixteen_bits_are_integers_too(root: Path) -> None:
    indexed = Image.fromarray(np.array([[0, 3, 2, 1]], dtype=np.uint8), mode="P")
    indexed.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    indexed.save(root / "annotations/training/a.png")
    assert labels(root) == [255, 2, 1, 0]
    Image.fromarray(np.array([[0, 3, 2, 1]], dtype=np.uint16)).save(root / "annotations/training/a.png")
    assert labels(root) == [255, 2, 1, 0]
    Image.fromarray(np.zeros((1, 4, 3), dtype=np.uint8)).save(root / "annotations/training/a.png")
    with pytest.raises(DataError, match="one channel"):
        labels(root)


def test_missing_partners_are_named_and_counted(root: Path) -> None:
    for i in range(5):
        shutil.copy(root / "images/training/a.jpg", root / f"images/training/x{i}.jpg")
    with pytest.raises(DataError, match=r"images without a mask .*: x0, x1, x2, … \(5 in all\)"):
        open_split("ade20k", root, "train")
    for i in range(5):
        (root / f"images/training/x{i}.jpg").unlink()
    (root / "images/training/a.jpg").unlink()
    with pytest.raises(DataError, match=r"masks without an image .*: a \(1 in all\)"):
        open_split("ade20k", root, "train")


def test_sizes_must_agree(root: Path) -> None:
    write_pair(root, "a", np.zeros((1, 4), dtype=np.uint8), size=(2, 4))
    split = open_split("ade20k", root, "train")
    for read in (split.load, split.image_size):
        with pytest.raises(DataError, match=r"a\.jpg.*4x2.*a\.png has 4x1"):
            read(split.root, split.samples[0])


def test_the_orientation_of_annotated_photos_is_not_applied(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((1, 4, 3), dtype=np.uint8)).save(root / "images/training/a.jpg", exif=exif)
    split = open_split("ade20k", root, "train")
    assert split.load(split.root, split.samples[0]).image.shape == (1, 4, 3)


def test_missing_and_empty_folders_are_errors(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: expected a folder \(the data root of ade20k\)"):
        open_split("ade20k", tmp_path / "nowhere", "train")
    shutil.rmtree(root / "annotations/training")
    with pytest.raises(DataError, match=r"annotations/training: expected a folder"):
        open_split("ade20k", root, "train")
    for kind in ("images", "annotations"):
        for file in (root / kind / "validation").iterdir():
            file.unlink()
    with pytest.raises(DataError, match="holds no image"):
        open_split("ade20k", root, "val")


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(SpecError, match="did you mean ade20k"):
        find_dataset("ade20")
    with pytest.raises(SpecError, match="val"):
        open_split("ade20k", Path("."), "vall")


def test_dataset_toml_overrides_the_list_and_the_conversion(root: Path) -> None:
    (root / "dataset.toml").write_text('class_names = ["p", "q", "r"]\nzero_is_ignored = false\nignore_value = 3\n')
    assert labels(root) == [0, 1, 2, 255]
    assert open_split("ade20k", root, "train").targets[0].class_names == ("p", "q", "r")
    (root / "objectInfo3.txt").unlink()
    assert labels(root) == [0, 1, 2, 255]
    (root / "dataset.toml").write_text('class_names = ["p"]\nignore_value = 3\n')
    with pytest.raises(DataError, match="the value 2"):
        labels(root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class_name = ['a']", "class_name"),
        ("zero_is_ignored = 1", "zero_is_ignored"),
        ("ignore_value = 2", "ignore_value is 2"),
        ("class_names = []", "found 0"),
        ("class_names = ['a', 'a']", "different class names"),
        ("class_names = [1]", "texts"),
        ("= 1", "not TOML"),
    ],
)
def test_a_wrong_dataset_toml_is_an_error(root: Path, text: str, message: str) -> None:
    (root / "dataset.toml").write_text(text)
    with pytest.raises(DataError, match=message):
        open_split("ade20k", root, "train")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Idx\tName\n1\tSky\n2\tRoad\n", ("Sky", "Road")),
        ("Idx,Ratio,Name\n1,0.1,wall\n2,0.2,building;edifice\n", ("wall", "building")),
        ("1\tsky\n2\troad, route\n", ("sky", "road")),
        ("Idx\tName\n2\tb\n1\ta\n\n", ("a", "b")),
        (
            "Idx\tName\n1\tscreen, silver screen\n2\tscreen, crt screen\n",
            ("screen, silver screen", "screen, crt screen"),
        ),
    ],
)
def test_class_lists_of_several_forms_are_read(root: Path, text: str, expected: tuple[str, ...]) -> None:
    (root / "objectInfo3.txt").write_text(text)
    assert open_split("ade20k", root, "train").targets[0].class_names == expected


@pytest.mark.parametrize(
    "text", ["", "Idx\tName\n", "Idx\tName\n1\ta\n3\tb\n", "Idx\tName\n1\ta\n1\tb\n", "wall\nsky\n"]
)
def test_a_class_list_with_gaps_or_without_numbers_is_an_error(root: Path, text: str) -> None:
    (root / "objectInfo3.txt").write_text(text)
    with pytest.raises(DataError, match=r"objectInfo3\.txt"):
        open_split("ade20k", root, "train")


def test_exactly_one_class_list_is_expected(root: Path) -> None:
    (root / "objectInfo4.txt").write_text(LIST)
    with pytest.raises(DataError, match=r"objectInfo3\.txt', 'objectInfo4\.txt"):
        open_split("ade20k", root, "train")
    for file in root.glob("objectInfo*"):
        file.unlink()
    with pytest.raises(DataError, match="found none"):
        open_split("ade20k", root, "train")


def test_palettes_have_different_colours_and_a_fixed_beginning() -> None:
    assert len(set(palette(150))) == 150
    assert palette(3) == palette(150)[:3] == ((255, 38, 38), (30, 79, 199), (92, 143, 21))


def test_real_ade20k_has_its_150_classes(test_data: Path) -> None:
    split = open_split("ade20k", test_data / "ADEChallengeData2016", "val")
    names = split.targets[0].class_names
    assert (len(names), names[0], names[1], names[12], names[149]) == (150, "wall", "building", "person", "flag")
    assert len(split.samples) == 3
    for sample in split.samples:
        raw = split.load(split.root, sample)
        with Image.open(split.root / sample.annotation["mask"]) as opened:
            stored = np.array(opened).astype(int)
        np.testing.assert_array_equal(raw.targets["semantic"], np.where(stored == 0, 255, stored - 1))
        assert raw.image.shape[:2] == split.image_size(split.root, sample) == stored.shape


def test_real_camvid_has_eleven_classes(test_data: Path) -> None:
    split = open_split("ade20k", test_data / "camvid", "train")
    assert len(split.samples) == 120
    assert split.targets[0].class_names[:3] == ("Sky", "Building", "Pole")
    raw = split.load(split.root, split.samples[0])
    assert raw.image.shape == (360, 480, 3)
    assert set(np.unique(raw.targets["semantic"])) <= {*range(11), 255}
