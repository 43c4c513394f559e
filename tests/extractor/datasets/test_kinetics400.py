import shutil
from pathlib import Path

import pytest

from fcache.cache_spec import DataError, SpecError
from fcache.extractor.datasets import kinetics400 as module
from fcache.extractor.datasets import open_split


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Names and sizes of videos: opening a split reads none of them."""
    for name in ("train/run/a.mp4", "train/run/deep/b.mkv", "train/sit/c.AVI", "val/sit/d.webm"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    (tmp_path / "train/run/notes.txt").write_text("no video")
    (tmp_path / "train/run/.hidden.mp4").write_text("no video")
    return tmp_path


def labels(root: Path, split: str) -> dict[str, str]:
    """Class names by sample."""
    opened = open_split("kinetics400", root, split)
    names = opened.targets[0].class_names
    return {s.id: names[s.annotation["clip"]] for s in opened.samples}


def test_class_folders_give_labels_in_alphabetical_order(root: Path) -> None:
    opened = open_split("kinetics400", root, "train")
    assert opened.targets[0].class_names == ("run", "sit")
    assert labels(root, "train") == {"run/a.mp4": "run", "run/deep/b.mkv": "run", "sit/c.AVI": "sit"}
    assert open_split("kinetics400", root, "val").targets == opened.targets
    assert labels(root, "val") == {"sit/d.webm": "sit"}
    assert opened.notes == ()


def test_the_folders_of_mmaction2_are_the_same_data(root: Path, tmp_path: Path) -> None:
    before = labels(root, "train")
    for split in ("train", "val"):
        (root / split).rename(root / f"videos_{split}")
    assert labels(root, "train") == before


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("train.csv", "train/"),
        ("train.csv", ""),
        ("kinetics400_train_list_videos.txt", ""),
        ("train.txt", "ABS/train/"),
    ],
)
def test_lists_say_which_videos_there_are_wherever_their_paths_begin(root: Path, name: str, prefix: str) -> None:
    prefix = prefix.replace("ABS", str(root))
    (root / name).write_text(f"{prefix}sit/c.AVI 0\n\n{prefix}run/a.mp4 1\n")
    (root / "classes.txt").write_text("sitting\nrunning\n")
    shutil.rmtree(root / "val")
    found = labels(root, "train")
    assert {Path(i).name: c for i, c in found.items()} == {"a.mp4": "running", "c.AVI": "sitting"}
    assert all((root / s.path).is_file() for s in open_split("kinetics400", root, "train").samples)


def test_ids_are_the_same_with_a_list_and_without(root: Path) -> None:
    bare = {s.id: s.digest for s in open_split("kinetics400", root, "train").samples}
    (root / "train.csv").write_text("train/run/a.mp4 0\ntrain/run/deep/b.mkv 0\ntrain/sit/c.AVI 1\n")
    (root / "val.csv").write_text("val/sit/d.webm 1\n")
    (root / "classes.txt").write_text("run\nsit\n")
    assert {s.id: s.digest for s in open_split("kinetics400", root, "train").samples} == bare


def test_class_names_are_the_folders_where_a_list_puts_them(root: Path) -> None:
    (root / "train.csv").write_text("train/sit/c.AVI 0\ntrain/run/a.mp4 1\n")
    assert open_split("kinetics400", root, "train").targets[0].class_names == ("sit", "run")
    # The validation split has no list, but the same classes.
    assert labels(root, "val") == {"sit/d.webm": "sit"}
    (root / "train.csv").write_text("train/sit/c.AVI 0\ntrain/run/a.mp4 0\n")
    with pytest.raises(DataError, match=r"cannot be told from the folders .* add a classes\.txt"):
        open_split("kinetics400", root, "train")


def test_missing_videos_are_counted_and_left_out(root: Path) -> None:
    (root / "train.csv").write_text("train/run/a.mp4 0\ntrain/run/gone.mp4 0\ntrain/sit/c.AVI 1\ntrain/sit/no.mp4 1\n")
    opened = open_split("kinetics400", root, "train")
    assert [s.id for s in opened.samples] == ["run/a.mp4", "sit/c.AVI"]
    assert opened.notes == ("train: 2 of 4 listed videos are missing: train/run/gone.mp4, train/sit/no.mp4 (2 in all)",)
    (root / "train.csv").write_text("train/run/gone.mp4 0\n")
    (root / "classes.txt").write_text("run\nsit\n")
    with pytest.raises(DataError, match="none of the 1 videos of split 'train' is there"):
        open_split("kinetics400", root, "train")


def test_a_folder_of_videos_alone_is_an_evaluation_split_without_labels(tmp_path: Path) -> None:
    for name in ("b.mov", "a.mp4", "more/c.avi"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    opened = open_split("kinetics400", tmp_path, "val")
    assert ([s.id for s in opened.samples], opened.targets) == (["a.mp4", "b.mov", "more/c.avi"], ())
    with pytest.raises(DataError, match="opens as split 'val' only, without labels"):
        open_split("kinetics400", tmp_path, "train")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train.csv": "label,youtube_id,time_start,time_end,split\n"}, "line 1: expected 'path label'"),
        ({"train.csv": "train/run/a.mp4 run\n"}, "line 1: expected 'path label' with a label from 0"),
        ({"train.csv": "train/run/a.mp4 7\n", "classes.txt": "run\nsit\n"}, "the label 7, there are 2 class names"),
        ({"train.csv": "", "train.txt": ""}, r"expected one list .* found \['train.csv', 'train.txt'\]; keep one"),
        ({"classes.txt": "run\nrun\n"}, "expected different class names, one a line, found 2"),
        ({"classes.txt": "run\n"}, r"class folders that classes.txt lacks: sit \(1 in all\)"),
        ({"train/loose.mp4": ""}, r"a folder for each class, found the video loose.mp4 beside them"),
        ({"val/fly/e.mp4": ""}, r"class folders that train lacks: fly"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(root: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    with pytest.raises(DataError, match=message):
        open_split("kinetics400", root, "train")


def test_videos_are_refused_where_they_cannot_be_decoded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "decord", None)
    with pytest.raises(SpecError, match="videos are decoded by decord"):
        module.open_split(root, "train")


def test_the_real_clips_have_the_labels_of_their_lists(test_data: Path) -> None:
    found = labels(test_data / "kinetics400", "val")
    assert len(found) == 8
    assert found == {i: i.split("/")[0] for i in found}
    assert len(open_split("kinetics400", test_data / "kinetics400", "train").samples) == 12
